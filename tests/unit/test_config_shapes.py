"""Scripts of many shapes, run by bash with stand-ins for the launchers before and after patching."""

from __future__ import annotations

from pathlib import Path

import pytest

from es_megatron.checks.config_report import Wishes, examine
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.reading import Hints, read
from es_megatron.config_patch.writing import flags_of, patch, unpatch
from tests.shell_oracle import calls_of, expected, make_stand_ins, parses, plain
from tests.shell_shapes import FORMS, SCRIPT, Shape, shapes
from tests.unit.test_config_patch import GOLDEN, PATCHED

ENVIRONMENTS = ({}, {"NSYS": "true", "BF": "1", "SLURM_PROCID": "3"})
BY_FORM = {form: [shape for shape in shapes() if shape.name.startswith(f"{form}-")] for form in FORMS}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stand_ins(tmp_path_factory.mktemp("stand_ins"))


def check(shape: Shape, stand_ins: Path, folder: Path) -> None:
    path = folder / "train.sh"
    path.write_text(shape.text)
    source = read(path, Hints())
    report = examine(path.name, source, Wishes(EvolvedSamplingConfig(), frozenset()))
    assert [finding.line() for finding in report.findings if finding.blocks] == []
    config = report.proposal.config
    patched = patch(source, config)
    flags = " ".join(flags_of(config)).split()
    assert unpatch("script", patched) == (shape.text, True)
    assert parses(patched)
    shell = "sh" if shape.text.startswith("#!/bin/sh") else "bash"
    for environment in ENVIRONMENTS:
        before = calls_of(shape.text, stand_ins, folder, environment, shell)
        assert any(word.endswith(SCRIPT) for call in before for word in call), "the shape itself starts nothing"
        after = calls_of(patched, stand_ins, folder, environment, shell)
        assert [plain(call) for call in after] == [plain(expected(call, SCRIPT, flags)) for call in before]


@pytest.mark.parametrize("form", FORMS)
def test_the_flags_reach_the_training_script_and_nothing_else_changes(form, stand_ins, tmp_path):
    """Each form with four of its launchers and arguments; which ones differs from form to form."""
    kinds, first = BY_FORM[form], list(FORMS).index(form)
    for shape in [kinds[(first + 8 * number) % len(kinds)] for number in range(4)]:
        check(shape, stand_ins, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", FORMS)
def test_every_launcher_and_kind_of_arguments(form, stand_ins, tmp_path):
    for shape in BY_FORM[form]:
        check(shape, stand_ins, tmp_path)


@pytest.mark.parametrize("name", [name for name in PATCHED if name.endswith(".sh")])
def test_the_scripts_of_teams_too(name, stand_ins, tmp_path):
    told = {"DATA_PREFIX": "/d/x", "DATA_PATH": "/d/x", "HEAD": "h", "SLURM_NODEID": "0", "WANDB_PROJECT": ""}
    text = (GOLDEN / name).read_text().replace("/opt/megatron-lm", str(tmp_path)).replace("tee ", "cat # ")
    path = tmp_path / name
    path.write_text(text)
    source = read(path, Hints())
    config = EvolvedSamplingConfig()
    patched, flags = patch(source, config), " ".join(flags_of(config)).split()
    before, after = (calls_of(each, stand_ins, tmp_path, told) for each in (text, patched))
    assert any(word.endswith(SCRIPT) for call in before for word in call)
    assert [plain(call) for call in after] == [plain(expected(call, SCRIPT, flags)) for call in before]


REFUSED = {
    "an unknown launcher": (f"msrun --worker_num 8 {SCRIPT} --micro-batch-size 1", "`msrun`"),
    "a wrapper": (f'O="--micro-batch-size 1 --bf16"\nmpirun -np 4 bash entry.sh {SCRIPT} "$O"', "`bash entry.sh`"),
    "a wrapper in python": (f"python start.py {SCRIPT} --micro-batch-size 1", "`python start.py`"),
    "a launcher from elsewhere": (f"$LAUNCH {SCRIPT} --micro-batch-size 1 --global-batch-size 64", "--set LAUNCH="),
    "options in one word": (f'O="--micro-batch-size 1 --bf16"\ntorchrun {SCRIPT} "$O"', "as one word"),
    "options from elsewhere": (f"torchrun {SCRIPT} $ARGS", "--set 'ARGS="),
    "arguments of the caller": (f'torchrun {SCRIPT} "$@"', "--set '@="),
    "a script run by itself": (f"./{SCRIPT} --micro-batch-size 1", f"`{SCRIPT}`"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_seen_through_is_refused_and_nothing_is_called_ok(kind, tmp_path):
    text, told = REFUSED[kind]
    path = tmp_path / "train.sh"
    path.write_text(f"#!/bin/bash\n{text}\n")
    report = examine(path.name, read(path, Hints()), Wishes(EvolvedSamplingConfig(), frozenset()))
    refused = [finding.line() for finding in report.findings if finding.blocks]
    assert any(told in line for line in refused), refused
    if "elsewhere" in kind or "caller" in kind:
        values = {"LAUNCH": "torchrun --nproc_per_node 4"} if "LAUNCH" in text else {}
        values |= {
            "ARGS": "--micro-batch-size 1 --global-batch-size 64",
            "@": "--micro-batch-size 1 --global-batch-size 64",
        }
        again = read(path, Hints(values))
        assert not examine(path.name, again, Wishes(EvolvedSamplingConfig(), frozenset())).refused
        patched = patch(again, EvolvedSamplingConfig())
        assert f"-m es_megatron.run {SCRIPT}" in patched
        assert unpatch("script", patched) == (path.read_text(), True)


def test_two_launchers_that_take_a_module_differently_are_refused(tmp_path, capsys):
    from es_megatron import cli

    path = tmp_path / "train.sh"
    path.write_text(
        "if [ $DS = 1 ]; then R=deepspeed; else R='python -u'; fi\n"
        f"$R {SCRIPT} --micro-batch-size 1 --global-batch-size 64\n"
    )
    assert cli.main(["patch", str(path)]) == 2
    assert "another by `--module`" in capsys.readouterr().err
    assert cli.main(["patch", str(path), "--set", "DS=1"]) == 0
    assert f"--module es_megatron.run {SCRIPT}" in (tmp_path / "train.es.sh").read_text()


def test_a_script_of_another_name_is_found_by_its_options_or_by_name(tmp_path):
    path = tmp_path / "train.sh"
    path.write_text("torchrun --nproc_per_node 4 my_run.py --num-layers 2 --hidden-size 8 --micro-batch-size 1\n")
    assert read(path, Hints()).launches[0].script == "my_run.py"
    path.write_text('RUN=my_run.py\nCMD="torchrun $RUN --micro-batch-size 1"\n$CMD\n')
    assert read(path, Hints(script="my_run.py")).launches[0].script == "my_run.py"
