"""Logs that no run ends for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from es_megatron.line_file import LineFile, kept_lines, replace_lines


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    file = LineFile(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        file.write("one")
        file.write("two")
        file.close()
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full cannot be written (No space left on device): the run goes on without it"
    ]


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    file = LineFile(path)
    file.write("one")
    assert path.read_text() == "one\n"
    file.close()
    again = LineFile(path)
    again.write("two")
    again.close()
    assert path.read_text() == "one\ntwo\n"


def test_what_is_to_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines.jsonl"
    assert kept_lines(path, lambda line: True) == []
    path.write_bytes(b'{"n": 1}\n{"n": 7}\nnonsense \xff\n3\n{"m": 1}\n{"n": 2}\n{"n": 3}')
    with caplog.at_level(logging.WARNING):
        kept = kept_lines(path, lambda line: line["n"] < 5)
    assert kept == ['{"n": 1}\n', '{"n": 2}\n'], "the last one has no end: it was being written"
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [3, 4, 5]
    replace_lines(path, kept)
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'
    assert list(tmp_path.iterdir()) == [path]
