"""Configs of teams: read as bash reads them, patched as the golden files say, restored byte for byte.

The golden files stand beside the configs: NAME.report and NAME.diff. Write them anew with
`ES_WRITE_GOLDEN=1 python -m pytest tests/unit/test_config_patch.py`, and read the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from es_megatron import cli
from es_megatron.checks.config_report import Wishes, examine
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.existing_run import parse_options
from es_megatron.config_files.launches import read_script
from es_megatron.config_files.reading import Hints, read
from es_megatron.config_files.shell.traced import unknowns
from es_megatron.config_patch.writing import flags_of, patch, unpatch
from es_megatron.frameworks.arguments import add_arguments, read_switches
from tests.es_config import es_config

GOLDEN = Path(__file__).parent / "golden"
ESWP = ("--es-pruning-ratio", "0.2", "--passes", "3")
# config -> more arguments of `es-megatron patch`, exit code
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "dense_7b.sh": (ESWP, 0),
    "moe_slurm.sh": ((*ESWP, "--es-selection-inclusion-weights"), 0),
    "long_context.sh": (ESWP, 0),
    "ramp_up.sh": (ESWP, 0),
    "virtual_stages.sh": (ESWP, 0),
    "fp8_graphs.sh": (("--es-preset", "paper"), 1),
    "megatron_deepspeed.sh": (("--es-scorer", "every-k"), 0),
    "broken_sizes.sh": ((), 1),
    "broken_quote.sh": ((), 2),
    "args_file.txt": ((*ESWP, "--world-size", "8"), 0),
    "bridge.yaml": ((*ESWP, "--world-size", "16"), 0),
    "zero3.json": (ESWP, 0),
    "zero0_curriculum.json": (("--world-size", "8"), 1),
}
PATCHED = [name for name, (_, code) in CASES.items() if code == 0]
SCRIPTS = [name for name in CASES if name.endswith(".sh") and name != "broken_quote.sh"]
SMALL = "torchrun --nproc_per_node 4 pretrain_gpt.py --micro-batch-size 1 --global-batch-size 64"


def golden(name: str, text: str) -> str:
    path = GOLDEN / name
    if os.environ.get("ES_WRITE_GOLDEN"):
        path.write_bytes(text.encode())
    return path.read_bytes().decode()


@pytest.mark.parametrize("name", CASES)
def test_report_and_diff_are_the_golden_ones(name, capsys):
    more, code = CASES[name]
    assert cli.main(["patch", str(GOLDEN / name), "--diff", *more]) == code
    output = capsys.readouterr()
    assert output.err == golden(f"{name}.report", output.err)
    assert (output.out == "") == (code != 0)
    assert output.out == golden(f"{name}.diff", output.out) if code == 0 else not (GOLDEN / f"{name}.diff").exists()


@pytest.mark.parametrize("name", CASES)
def test_check_writes_nothing_and_tells_by_its_exit_code(name, tmp_path, capsys):
    more, code = CASES[name]
    shutil.copy(GOLDEN / name, tmp_path / name)
    assert cli.main(["patch", str(tmp_path / name), "--check", *more]) == code
    assert [path.name for path in tmp_path.iterdir()] == [name]
    output = capsys.readouterr()
    assert (output.out or output.err) == golden(f"{name}.report", output.out)


def apply_diff(text: str, diff: str) -> str:
    """What `patch` would make of a text, by the line numbers of the hunks."""
    old, new, at = text.splitlines(keepends=True), list[str](), 0
    for line in diff.splitlines(keepends=True)[2:]:
        if line.startswith("@@"):
            start = int(line.split()[1].split(",")[0].lstrip("-")) - 1
            new += old[at:start]
            at = start
        elif line.startswith("\\"):
            new[-1] = new[-1].removesuffix("\n")
        elif line.startswith("+"):
            new.append(line[1:])
        else:
            assert old[at] == line[1:]
            new += [old[at]] if line.startswith(" ") else []
            at += 1
    return "".join([*new, *old[at:]])


@pytest.mark.parametrize("name", PATCHED)
def test_patched_copy_comes_from_the_diff_and_is_restored_byte_for_byte(name, tmp_path):
    original = (GOLDEN / name).read_bytes()
    config = tmp_path / name
    config.write_bytes(original)
    config.chmod(0o750)
    assert cli.main(["patch", str(config), *CASES[name][0]]) == 0
    copy = config.with_name(f"{config.stem}.es{config.suffix}")
    assert config.read_bytes() == original
    assert copy.stat().st_mode & 0o777 == 0o750
    assert apply_diff(original.decode(), (GOLDEN / f"{name}.diff").read_bytes().decode()) == copy.read_bytes().decode()
    assert cli.main(["unpatch", str(copy)]) == 0
    assert copy.read_bytes() == original
    assert copy.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("name", PATCHED)
def test_patched_config_is_checked_with_its_own_settings_and_not_patched_twice(name, tmp_path, capsys):
    more = CASES[name][0]
    shutil.copy(GOLDEN / name, tmp_path / name)
    assert cli.main(["patch", str(tmp_path / name), "--in-place", *more]) == 0
    first = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("plan", "predicted"))]
    rest = [each for at, each in enumerate(more) if not each.startswith("--es") and not more[at - 1].startswith("--es")]
    assert cli.main(["patch", str(tmp_path / name), "--check", *rest]) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("plan", "predicted"))]
    assert first == again != []
    assert cli.main(["patch", str(tmp_path / name), *rest]) == 2
    assert "patched already" in capsys.readouterr().err


def arguments_in_bash(script: Path, folder: Path) -> list[list[str]]:
    """What the launchers of a script are really given: bash runs it, and stubs write their arguments down."""
    stubs, log = folder / "stubs", folder / "log"
    stubs.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    for name in ("torchrun", "python", "deepspeed"):
        (stubs / name).write_text(f'#!/bin/bash\n{{ printf "%s\\0" {name} "$@"; printf "\\n\\0"; }} >> "{log}"\n')
    (stubs / "srun").write_text('#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    for name in ("mkdir", "tee"):
        (stubs / name).write_text("#!/bin/bash\nexit 0\n")
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    environment = {
        "PATH": f"{stubs}:/usr/bin:/bin",
        "DATA_PREFIX": "/d/x",
        "DATA_PATH": "/d/x",
        "IMAGE": "i",
        "HEAD": "h",
    }
    text = script.read_text().replace("/opt/megatron-lm", str(folder)).replace("> train.log", "> /dev/null")
    runnable = folder / "runnable.sh"
    runnable.write_text(text)
    shell = "sh" if text.startswith("#!/bin/sh") else "bash"
    environment |= {"SLURM_NODEID": "0", "WANDB_PROJECT": ""}
    subprocess.run([shell, runnable], env=environment, cwd=folder, timeout=20, check=False, capture_output=True)
    return [call.split("\0")[:-1] for call in log.read_text().removesuffix("\n\0").split("\n\0")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_read_as_bash_reads_it(name, tmp_path):
    told = {"DATA_PREFIX": "/d/x", "DATA_PATH": "/d/x", "HEAD": "h", "SLURM_NODEID": "0", "WANDB_PROJECT": ""}
    script = read_script((GOLDEN / name).read_text(), told)
    (call,) = {tuple(call) for call in arguments_in_bash(GOLDEN / name, tmp_path)}
    launch = script.launches[0]
    ours = [*launch.before, launch.script, *(each for each in launch.arguments if unknowns(each) != ["@"])]
    assert ours[ours.index(call[0]) :] == list(call)


@pytest.mark.parametrize("name", [name for name in PATCHED if name.endswith(".sh")])
def test_a_patched_script_starts_the_runner_with_the_flags_and_all_it_had(name, tmp_path):
    assert cli.main(["patch", str(GOLDEN / name), "--output", str(tmp_path / name), *CASES[name][0]]) == 0
    before, after = (arguments_in_bash(path, tmp_path)[0] for path in (GOLDEN / name, tmp_path / name))
    at = next(place for place, each in enumerate(before) if each.endswith("pretrain_gpt.py"))
    module = after[at : at + 2]
    assert module == ["--module" if before[0] == "deepspeed" else "-m", "es_megatron.run"]
    flags = after[at + 3 : len(after) - (len(before) - at - 1)]
    assert after == [*before[:at], *module, before[at], *flags, *before[at + 1 :]]
    source = read(GOLDEN / name, Hints())
    config = examine(name, source, Wishes(*wishes_of(CASES[name][0]))).proposal.config
    assert flags == " ".join(flags_of(config)).split()


def wishes_of(more: tuple[str, ...]) -> tuple[EvolvedSamplingConfig, frozenset[str], float | None]:
    switches = read_switches(add_arguments(argparse.ArgumentParser()).parse_known_args(more)[0])
    told = parse_options(more).get("passes")
    return switches.config or EvolvedSamplingConfig(), switches.given, float(told[0]) if told else None


def test_blocks_of_yaml_and_json_build_the_settings(tmp_path):
    for name, load in (("bridge.yaml", yaml.safe_load), ("zero3.json", json.loads)):
        assert cli.main(["patch", str(GOLDEN / name), "--output", str(tmp_path / name), *CASES[name][0]]) == 0
        before, after = load((GOLDEN / name).read_text()), load((tmp_path / name).read_text())
        config = EvolvedSamplingConfig.from_mapping(after.pop("evolved_sampling"), name)
        assert (config.pruning.ratio, config.selection.keep_ratio, config.scorer.kind) == (0.2, 0.5, "history")
        assert after == before


ODD = {
    "crlf.sh": SMALL.replace(" --", " \\\r\n  --") + "\r\necho done\r\n",
    "unended.sh": "#!/bin/bash\n" + SMALL,
    "quoted.sh": f"cd x && \\\n  srun -N 2 --ntasks-per-node=4 bash -c 'cd /m; {SMALL}'\n",
    "branches.sh": f"if [ $HOSTNAME = a ]; then {SMALL}; else\n  {SMALL} --lr 1\nfi",
    "case.sh": f"case x in\n a) python pretrain_bert.py ;;\n x) {SMALL} ;; esac; echo done",
    "nested.sh": f'DIR=$(pwd)\nCMD="{SMALL.replace("pretrain", "${DIR}/pretrain")} $@"\nsrun sh -c "${{CMD}}"\n',
    "posix.sh": f"#!/bin/sh\nset -e\n{SMALL}\n",
    "latin.sh": f"# caf\udce9\n{SMALL}\n",
    "taken.sh": f'ES_ARGS=(--lr 1)\n{SMALL} "${{ES_ARGS[@]}}"\n',
    "backticks.sh": SMALL.replace(" --global", " `# one of four` \\\n  --global"),
    "one_line.txt": "--micro-batch-size 1 --global-batch-size 64   ",
    "continued.txt": "--micro-batch-size 1 \\\n    --global-batch-size 64\n\n",
    "comments.txt": "# sizes\r\n--micro-batch-size 1\r\n  # all\r\n  --global-batch-size 64  # B\r\n",
    "unended.yaml": "micro_batch_size: 1\nglobal_batch_size: 64",
    "crlf.yaml": "train:\r\n  micro_batch_size: 1\r\n  global_batch_size: 64\r\n\r\n",
    "one_line.json": '{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 1}',
    "crlf.json": '{\r\n\t"train_batch_size": 64,\r\n\t"train_micro_batch_size_per_gpu": 1\r\n}\r\n\r\n',
    "odd.json": '\n{ "zero_optimization" : {"stage":1 , "x": "a}\\"b{"} ,\n"train_batch_size":64}',
    "bom.json": '\ufeff{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 1}\n',
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_restored_byte_for_byte(name, tmp_path):
    original = ODD[name].encode("utf-8", "surrogateescape")
    path = tmp_path / name
    path.write_bytes(original)
    assert cli.main(["patch", str(path), "--in-place", "--world-size", "4"]) == 0
    patched = path.read_bytes()
    assert patched != original
    if name.endswith(".sh"):
        assert b"-m es_megatron.run " in patched
        subprocess.run(["bash", "-n", path], check=True, timeout=20)
    if b"\r\n" in original:
        assert patched.count(b"\n") == patched.count(b"\r\n")
    assert cli.main(["unpatch", str(path)]) == 0
    assert path.read_bytes() == original


@given(
    lines=st.lists(
        st.sampled_from(["", "# a comment", "export A=1", "X=(\n  1 # one\n)", 'echo "a\n b"', "\tls | cat"])
    ),
    ending=st.sampled_from(["", "\n", "\r\n", "\n\n# end", " \\\n  --lr 1e-4  # c", "; exit 0", " 2>&1 | tee log"]),
    launcher=st.sampled_from(["torchrun", "python -u", "srun python", "deepspeed", "FOO=1 torchrun"]),
    indent=st.sampled_from(["", "  ", "\t"]),
)
def test_any_script_is_restored(lines, ending, launcher, indent):
    text = "\n".join([*lines, f"{indent}{launcher} pretrain_gpt.py --micro-batch-size 1{ending}"])
    from es_megatron.config_files.reading import Source

    source = Source("script", text, (), read_script(text, {}).launches)
    patched = patch(source, es_config(pruning_ratio=0.5))
    assert "es_megatron.run pretrain_gpt.py" in patched
    assert unpatch("script", patched) == (text, True)


@pytest.mark.parametrize("name", ["train.sh", "arguments.txt"])
def test_strictness_is_written_and_taken_out_again(name, tmp_path):
    launch = SMALL if name == "train.sh" else "--num-layers 2 --micro-batch-size 1 --global-batch-size 64"
    text = f"{launch} --lr 1e-4 --bf16\n"
    path = tmp_path / name
    path.write_text(text)
    more = ["--world-size", "4", "--es-strict-versions", "--in-place"]
    assert cli.main(["patch", str(path), *more]) == 0
    assert "--es-strict-versions" in path.read_text()
    assert cli.main(["unpatch", str(path)]) == 0
    assert path.read_text() == text
    path.write_text(text.replace("--lr", "--es --es-strict-versions --lr"))
    assert cli.main(["unpatch", str(path)]) in (0, 2)
    assert "--lr 1e-4" in path.read_text()


def test_edits_made_after_patching_survive_unpatching(tmp_path, capsys):
    path = tmp_path / "train.sh"
    path.write_text(f"#!/bin/bash\n{SMALL}\n")
    assert cli.main(["patch", str(path), "--in-place"]) == 0
    path.write_text(
        path.read_text()
        .replace("--es-selection-keep-ratio 0.5", "--es-selection-keep-ratio 0.25")
        .replace("size 64", "size 128")
    )
    assert cli.main(["unpatch", str(path)]) == 0
    assert path.read_text() == f"#!/bin/bash\n{SMALL.replace('64', '128')}\n"
    assert "keeps those edits" in capsys.readouterr().out


def test_the_command_imports_no_megatron():
    code = "import sys; from es_megatron.checks import doctor; from es_megatron.config_patch import command, undo; "
    code += "print([name for name in ('megatron', 'deepspeed') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == "[]"
