"""Configs of teams: read as bash reads them, refused where they must be, patched as the golden files say, restored.

The golden files stand beside the configs: NAME.report and NAME.diff. Write them anew with
`ES_WRITE_GOLDEN=1 python -m pytest tests/unit/test_config_patch.py`, and read the difference.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from es_megatron import cli
from es_megatron.checks.config_report import Report, Wishes, examine
from es_megatron.config import EvolvedSamplingConfig, build
from es_megatron.config_files.existing_run import ExistingRun, chunks_of_layout, parse_options
from es_megatron.config_files.json_members import members_of
from es_megatron.config_files.launches import read_script
from es_megatron.config_files.passes import passes_of, training_share
from es_megatron.config_files.reading import Hints, read
from es_megatron.config_files.shell_syntax import Command, parse, parse_value
from es_megatron.config_files.shell_values import Shell, calculate, unknowns
from es_megatron.config_patch.writing import flags_of, patch, unpatch
from es_megatron.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
ESWP = ("--es-pruning-ratio", "0.2", "--passes", "3")
# config -> more arguments of `es-megatron patch`, exit code
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "dense_7b.sh": (ESWP, 0),
    "moe_slurm.sh": ((*ESWP, "--es-inclusion-weights"), 0),
    "long_context.sh": (ESWP, 1),
    "ramp_up.sh": (ESWP, 1),
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


def wish(**settings: object) -> Wishes:
    return Wishes(EvolvedSamplingConfig(**{"preset": "paper", **settings}), frozenset(settings), None)  # pyright: ignore[reportArgumentType]


def examined(
    tmp_path: Path, text: str, name: str = "train.sh", hints: Hints | None = None, **settings: object
) -> Report:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return examine(name, read(path, hints or Hints()), wish(**settings))


def found(report: Report, severity: str) -> str:
    return "\n".join(finding.line() for finding in report.findings if finding.severity == severity)


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
    options = parse_options(more)
    settings = {name.removeprefix("es_"): values for name, values in options.items() if name.startswith("es_")}
    typed = {name: float(v[0]) if v and v[0][0].isdigit() else v[0] if v else True for name, v in settings.items()}
    passes = float(options["passes"][0]) if "passes" in options else None
    return EvolvedSamplingConfig(**typed), frozenset(typed), passes  # pyright: ignore[reportArgumentType]


def test_blocks_of_yaml_and_json_build_the_settings(tmp_path):
    for name, load in (("bridge.yaml", yaml.safe_load), ("zero3.json", json.loads)):
        assert cli.main(["patch", str(GOLDEN / name), "--output", str(tmp_path / name), *CASES[name][0]]) == 0
        before, after = load((GOLDEN / name).read_text()), load((tmp_path / name).read_text())
        config = build(EvolvedSamplingConfig, after.pop("evolved_sampling"), name)
        assert (config.pruning_ratio, config.keep_ratio, config.scorer) == (0.2, 0.5, "history")
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
    patched = patch(source, EvolvedSamplingConfig(pruning_ratio=0.5))
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
        path.read_text().replace("--es-keep-ratio 0.5", "--es-keep-ratio 0.25").replace("size 64", "size 128")
    )
    assert cli.main(["unpatch", str(path)]) == 0
    assert path.read_text() == f"#!/bin/bash\n{SMALL.replace('64', '128')}\n"
    assert "keeps those edits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.sh", SMALL, "in pairs, but has 0 and 0"),
        ("b.sh", f"# >>> es-megatron (x) >>>\n{SMALL}", "in pairs, but has 1 and 0"),
        ("a.txt", "--lr 1", "no `--es-*` flags"),
        ("a.json", "{}", "no `evolved_sampling` block"),
        ("a.yaml", "a: 1", "in pairs"),
    ],
)
def test_what_is_not_patched_cannot_be_unpatched(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert cli.main(["unpatch", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.sh", "echo hello", "No line starts a training script"),
        ("named.sh", "echo pretrain_gpt.py; cp pretrain_gpt.py /tmp", "No line starts a training script"),
        ("open.sh", "A=(1 2\n", "Line 1: `(` is opened but never closed"),
        ("two.yaml", "a: 1\n---\nb: 2\n", "one document"),
        ("list.yaml", "- 1\n", "mapping"),
        ("other.yaml", "a: 1\n", "neither `micro_batch_size` nor"),
        ("bad.json", '{"train_batch_size": }', "must be JSON"),
        ("other.json", '{"a": 1}', "must be a DeepSpeed config"),
        ("number.sh", SMALL.replace("64", "many"), "`--global-batch-size` must be a whole number, but is 'many'"),
        ("missing.sh", None, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_cure(name, text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert cli.main(["patch", str(tmp_path / name), "--check"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "severity", "told"),
    [
        ("--context-parallel-size 2", "REFUSE", "its losses would be spread over them"),
        ("--context-parallel-size 1", "OK", "precision, CUDA graphs and parallelism"),
        ("--fp8-hybrid --es-scorer fresh", "REFUSE", "`--fp8-recipe delayed`: delayed scaling keeps a history"),
        ("--dataloader-type external", "REFUSE", "sample ids"),
        ("--dataloader-type cyclic", "NOTE", "its own order"),
        ("--num-experts 8 --moe-token-dropping", "NOTE", "neighbours"),
        ("--deepspeed --num-experts 64", "REFUSE", "experts have not been tried there"),
        ("--deepspeed --random-ltd", "REFUSE", "drops tokens"),
        ("--checkpoint-activations", "OK", "costs 3 forward passes"),
        ("--num-workers 5", "NOTE", "10 iterations early"),
        ("--use-checkpoint-args", "NOTE", "may come from the checkpoint"),
        ("--tensor-model-parallel-size 3", "REFUSE", "cannot be cut into TP 3 = 3. Cure: use 3 or 6 ranks"),
        ("--tensor-model-parallel-size 0", "REFUSE", "at least 1"),
        (
            "--micro-batch-size 5",
            "REFUSE",
            "multiple of micro-batch size x data-parallel size, here 5 x 4. Cure: use 60",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers 10 --num-layers-per-virtual-pipeline-stage 3",
            "REFUSE",
            "chunks",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6",
            "REFUSE",
            "interleaved stages need a multiple of the 4 pipeline stages. Cure: use a global batch size of 8",
        ),
        ("--global-batch-size $B", "NOTE", "`B`: not known from the file alone"),
        ("--global-batch-size 4", "REFUSE", "more than the plain one"),
    ],
)
def test_findings(more, severity, told, tmp_path):
    assert told in found(examined(tmp_path, f"{SMALL} {more}"), severity)


def test_set_tells_what_the_script_leaves_open(tmp_path):
    text = SMALL.replace("64", "$B").replace("per_node 4", "per_node $GPUS")
    assert examined(tmp_path, text).proposal.plan is None
    hints = Hints({"B": "96", "GPUS": "8"})
    plan = examined(tmp_path, text, hints=hints).proposal.plan
    assert plan is not None
    assert (plan.meta_batch, plan.kept) == (96, 24)
    plan = examined(tmp_path, text, hints=Hints({"global-batch-size": "32"}, world_size=4)).proposal.plan
    assert plan is not None
    assert (plan.meta_batch, plan.kept) == (32, 8)


def test_numbers_of_the_plan(tmp_path):
    # 16 micro-batches of 2 on DP 4, PP 2: plain (16 + 1) * 3, scoring 16 + 1, training (4 + 1) * 3
    text = (
        "torchrun --nproc_per_node 8 pretrain_gpt.py --pipeline-model-parallel-size 2 --micro-batch-size 2 "
        "--global-batch-size 128 --train-iters 1000"
    )
    proposal = examined(tmp_path, text, anneal=0.0).proposal
    assert proposal.plan is not None
    assert proposal.prediction is not None
    assert proposal.plan.kept == 32
    assert proposal.config.scoring_micro_batch_size is None
    assert proposal.prediction.selecting == pytest.approx(1 - (17 + 5 * 3) / (17 * 3))
    # full recompute: a backward pass costs three forward passes
    proposal = examined(tmp_path, text + " --recompute-granularity full", anneal=0.0).proposal
    assert proposal.prediction is not None
    assert proposal.prediction.selecting == pytest.approx(1 - (17 + 5 * 4) / (17 * 4))
    # without pipelining the scoring micro-batch may grow at no cost
    proposal = examined(tmp_path, SMALL, anneal=0.0).proposal
    assert proposal.config.scoring_micro_batch_size == 4
    assert proposal.prediction is not None
    assert proposal.prediction.saving == pytest.approx(1 - (1 + 3 * 0.25) / 3)


def test_keep_ratio_is_moved_only_if_it_was_not_told(tmp_path):
    text = SMALL.replace("size 64", "size 40")
    report = examined(tmp_path, text)
    assert report.proposal.plan is not None
    assert report.proposal.plan.kept == 8
    assert "b must be a multiple of 4 sequences here" in found(report, "NOTE")
    report = examined(tmp_path, text, keep_ratio=0.25)
    assert report.refused
    assert "Use `keep_ratio` 0.2 (b = 8)" in found(report, "REFUSE")


def test_scoring_micro_batch_that_was_told_must_fit(tmp_path):
    report = examined(tmp_path, SMALL, scoring_micro_batch_size=3)
    assert "must cut a rank's 16 sequences" in found(report, "REFUSE")
    assert examined(tmp_path, SMALL, scoring_micro_batch_size=16).proposal.config.scoring_micro_batch_size == 16


def test_second_launch_line_is_held_to_the_plan_of_the_first(tmp_path):
    other = SMALL.replace("per_node 4", "per_node 64")
    text = f"if [ $NODES = 1 ]; then\n{SMALL}\nelse\n{other}\nfi\n"
    report = examined(tmp_path, text)
    assert "launched on lines 2, 4" in report.heading
    assert "must be a multiple of 64" in found(report, "REFUSE")


def test_control_arms_cost_no_scoring(tmp_path):
    proposal = examined(tmp_path, SMALL, arm="uniform", anneal=0.0).proposal
    assert proposal.config.scoring_micro_batch_size is None
    assert proposal.prediction is not None
    assert proposal.prediction.saving == pytest.approx(0.75)
    assert not examined(tmp_path, SMALL, arm="plain").refused


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ('A=1; B="$A"2', "12"),
        ("B=${A:-4}", "4"),
        ("A=; B=${A:-4}", "4"),
        ("A=; B=${A-4}", ""),
        ("A=2; B=${A:+yes}", "yes"),
        ("A=(1 2 3); B=${#A[@]}", "3"),
        ("A=(1 2 3); B=${A[1]}", "2"),
        ("B=$((2 * (3 + 4) / 5 % 3 - 1))", "1"),
        ("A=8; B=$(( $A*2 ))", "16"),
        ("B=1; B+=2", "12"),
        ("A=2\nif [ $A -gt 1 ]; then B=many; else B=one; fi", "many"),
        ("A=x\nif [[ $A == y || -z $A ]]; then B=1; elif [[ $A == x ]]; then B=2; else B=3; fi", "2"),
        ("A=7b\ncase $A in 1b|3b) B=1;; 7*) B=2;; *) B=3;; esac", "2"),
        ("B=1; [ 1 -eq 2 ] && B=2", "1"),
        ("B=1; [ 1 -eq 2 ] || B=2", "2"),
        ("if ! [ a = b ]; then B=1; fi", "1"),
        ("export B='a b'", "a b"),
        (": <<EOF\nB=2\nEOF\nB=1", "1"),
        ('B="a\\"b"', 'a"b'),
        ("B=1 # B=2", "1"),
    ],
)
def test_values_are_those_of_bash(script, value):
    shell = Shell()
    for _ in shell.commands(parse(script)):
        pass
    assert shell.variables["B"] == value
    told = subprocess.run(
        ["bash", "-c", f'{script}\nprintf %s "$B"'], capture_output=True, text=True, timeout=20, check=False
    )
    assert told.stdout == value


@pytest.mark.parametrize(
    "script",
    [
        "B=$1",
        "B=$(hostname)",
        "B=1; if [ -n $X ]; then B=2; fi",
        "for B in 1 2; do :; done",
        "B=${A%x}",
        "B=$((A + 1))",
    ],
)
def test_what_the_text_does_not_tell_is_not_guessed(script):
    shell = Shell()
    for _ in shell.commands(parse(script)):
        pass
    value = shell.variables["B"]
    assert isinstance(value, str)
    assert len(unknowns(value)) == 1
    (field,) = shell.fields(parse_value("$B"), split=False)
    assert field.text == value
    (command,) = parse("echo $B")
    assert isinstance(command, Command)
    assert [each.text for each in shell.fields(command.words[1])] == [value]


def test_arithmetic_runs_nothing():
    assert calculate("2 ** 3", Shell()) is None
    assert calculate("1 / 0", Shell()) is None
    assert calculate("__import__", Shell()) is None


@pytest.mark.parametrize(("layout", "chunks"), [("E|t|t|L", 4), ("E(t|)*7L", 8), ("Et,(tt|)*3,(t|)*2,mL", 6)])
def test_chunks_of_a_pipeline_layout(layout, chunks):
    assert chunks_of_layout(layout) == chunks


def write_token_file(prefix: Path, documents: int, tokens: int) -> None:
    """Files as Megatron's IndexedDatasetBuilder writes them: zeros, one sequence per document."""
    prefix.with_suffix(".bin").write_bytes(bytes(4 * documents * tokens))
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, documents, documents + 1)
    lengths = struct.pack(f"<{documents}i", *[tokens] * documents)
    starts = struct.pack(f"<{documents}q", *range(0, 4 * documents * tokens, 4 * tokens))
    prefix.with_suffix(".idx").write_bytes(
        head + lengths + starts + struct.pack(f"<{documents + 1}q", *range(documents + 1))
    )


def test_passes_are_told_or_counted_from_the_files(tmp_path):
    write_token_file(tmp_path / "text", 10, 1001)
    arguments = ("--data-path", str(tmp_path / "text"), "--seq-length", "100", "--train-samples", "300")
    run = ExistingRun("script", parse_options(arguments))
    assert (passes_of(run, None).count, passes_of(run, 2.5).count) == (3.0, 2.5)
    half = ExistingRun("script", parse_options((*arguments, "--split", "50,50,0")))
    assert passes_of(half, None).count == 6.0
    gone = ExistingRun("script", parse_options(("--data-path", "/no/such", *arguments[2:])))
    assert "assumed" in passes_of(gone, None).source


def test_training_share():
    assert training_share("949,50,1") == 0.949
    assert training_share(None) == 1.0
    assert training_share("a,b") == 1.0


def test_members_of_json():
    text = '{"a": {"b": "}"}, "c": [1, {"d": 2}]}'
    opened, members = members_of(text)
    assert opened == 0
    assert [text[member.start : member.end] for member in members] == ['"a": {"b": "}"}', '"c": [1, {"d": 2}]']
    with pytest.raises(ConfigError):
        members_of('{"a" 1}')


def test_bad_arguments_of_the_command(tmp_path, capsys):
    path = tmp_path / "train.sh"
    path.write_text(SMALL)
    for more, message in (
        (["--set", "A"], "must be NAME=VALUE"),
        (["--world-size", "0"], "`--world-size` must be >= 1"),
        (["--passes", "-1"], "`--passes` must be > 0"),
        (["--es-keep-ratio", "1.5"], "`keep_ratio` must be in (0, 1]"),
        (["--no-es"], "nothing to put in"),
        (["--es-audit", "a b"], "must be a plain path"),
        (["--output", str(tmp_path / "no" / "such")], "cannot be written"),
    ):
        assert cli.main(["patch", str(path), *more]) == 2
        assert message in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["train.sh"]


def test_the_command_imports_no_megatron():
    code = "import sys; from es_megatron.checks import doctor; from es_megatron.config_patch import command, undo; "
    code += "print([name for name in ('megatron', 'deepspeed') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == "[]"
