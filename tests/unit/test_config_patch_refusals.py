"""What `es-megatron patch` and `unpatch` refuse: files they cannot use and bad arguments, each with its cure."""

from __future__ import annotations

import pytest

from es_megatron import cli
from tests.unit.test_config_patch import SMALL


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


def test_bad_arguments_of_the_command(tmp_path, capsys):
    path = tmp_path / "train.sh"
    path.write_text(SMALL)
    for more, message in (
        (["--set", "A"], "must be NAME=VALUE"),
        (["--world-size", "0"], "`--world-size` must be >= 1"),
        (["--passes", "-1"], "`--passes` must be > 0"),
        (["--es-selection-keep-ratio", "1.5"], "`selection.keep_ratio` must be in (0, 1]"),
        (["--no-es"], "nothing to put in"),
        (["--es-audit", "a b"], "must be a plain path"),
        (["--output", str(tmp_path / "no" / "such")], "cannot be written"),
    ):
        assert cli.main(["patch", str(path), *more]) == 2
        assert message in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["train.sh"]
