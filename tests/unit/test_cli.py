"""The command's face: help that comes at once, examples that parse, hints, and what a mistake ends with."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import es_megatron
from es_megatron.cli import COMMANDS, GROUPS, Parser, main, parser_of
from es_megatron.score_files.command import add_arguments as add_scores

HEAVY = ("torch", "megatron", "deepspeed", "transformers", "matplotlib", "pyarrow", "jinja2", "safetensors")


def python(*words):
    return subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True, timeout=60)


def test_no_help_imports_what_takes_seconds():
    code = f"""
import contextlib, io, sys
from es_megatron.cli import COMMANDS, main
for words in ([], *([name] for name in COMMANDS)):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:
        main([*words, "--help"])
    assert "usage: " + " ".join(["es-megatron", *words]) in told.getvalue(), words
    found = sorted(set({HEAVY!r}) & set(sys.modules))
    assert not found, (words, found)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command_in_its_group_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for title, commands in GROUPS.items():
        assert f"\n{title}:\n" in told
        for name in commands:
            assert any(line.startswith(f"  {name} ") and len(line.split()) > 4 for line in told.splitlines()), name


@pytest.mark.parametrize(
    ("name", "words"), [(name, each) for name, found in COMMANDS.items() for each in found.examples]
)
def test_examples_are_what_the_command_takes(name, words):
    parser, act = parser_of(name)
    parser.parse_args(shlex.split(words.partition(" > ")[0]))
    assert callable(act)
    assert f"es-megatron {name} {words}".rstrip() in parser.format_help()


def test_the_package_is_a_command():
    done = python("-m", "es_megatron", "--version")
    assert (done.returncode, done.stdout) == (0, f"es_megatron {es_megatron.__version__}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "unknown command: pretrian. Did you mean `pretrain`?"),
        (["zzz"], "unknown command: zzz. There are: prepare, "),
        (["scores", "info", "runs", "--jsno"], "unknown: --jsno. Did you mean `--json`?"),
        (["patch", "x.sh", "--es-selection-keep-ration", "1"], "Did you mean `--es-selection-keep-ratio`?"),
        (["pretrain", "--config", "x", "--learning-rate", "1"], "training.lr=0.001. Did you mean `training.lr`?"),
        (["report", "x", "--zzz"], "unknown: --zzz."),
    ],
)
def test_what_is_not_known_is_refused_with_the_nearest(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_old_flags_that_are_hidden_are_not_offered():
    parser, _ = parser_of("plan")
    options = set(parser.options())
    assert "--es-selection-keep-ratio" in options
    assert "--es-keep-ratio" not in options


def test_options_of_subcommands_are_offered():
    parser = Parser(prog="x")
    add_scores(parser)
    assert "--seq-length" in set(parser.options())


def test_a_mistake_in_settings_is_told_before_megatron_is_imported(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {learning_rate: 1}\n")
    code = f"""
import sys
from es_megatron.cli import main
code = main(["pretrain", "--config", {str(path)!r}])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = python("-c", code)
    assert done.returncode == 2
    assert done.stderr.startswith("es-megatron pretrain: error: Unknown key `learning_rate`"), done.stderr
    assert done.stderr.rstrip().endswith("Did you mean `lr`?")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_error_that_cannot_be_printed_keeps_its_exit_code():
    with open("/dev/full", "w") as full:
        words = ["-m", "es_megatron", "pretrain", "--config", "nowhere.yaml"]
        ended = subprocess.run([sys.executable, *words], check=False, stderr=full, timeout=60)
    assert ended.returncode == 2
