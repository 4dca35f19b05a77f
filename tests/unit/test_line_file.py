"""Logs that no run ends for."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from es_megatron.core.line_file import LineFile

NO_SPACE = "/dev/full cannot be written (No space left on device): the run goes on without it"


def written(path: Path, *lines: str, **options: Any) -> str:
    file = LineFile(path, **options)
    for line in lines:
        file.write(line)
    file.close()
    return path.read_text()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    file = LineFile(Path("/dev/full"), lambda line: True)
    file.write("one")
    file.write("two")
    file.close()
    assert told(caplog) == [NO_SPACE]


@pytest.mark.parametrize("options", [{}, {"keep": lambda line: True}, {"head": ["first"]}])
def test_a_file_that_cannot_be_opened_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("")
    file = LineFile(tmp_path / "file" / "log.txt", **options)
    file.write("one")
    file.close()
    assert len(told(caplog)) == 1
    assert "log.txt cannot be written" in told(caplog)[0]


def test_no_space_for_the_lines_that_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    opened: Callable[..., Any] = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: opened(Path("/dev/full") if self.suffix == ".partial" else self, *a, **k)
    )
    LineFile(path, lambda line: line["n"] < 2).write("three")
    assert len(told(caplog)) == 1
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n', "as it was: nothing is added after lines that were to go"


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "made" / "log.txt"
    file = LineFile(path)
    file.write("one")
    assert path.read_text() == "one\n"
    file.close()
    assert written(path, "two") == "one\ntwo\n"


def test_what_is_to_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 7}\nnonsense \xff\n3\n{"m": 1}\n{"n": 2}\n{"n": 3}')
    (tmp_path / "link").symlink_to(path)
    assert written(tmp_path / "link", "end", keep=lambda line: line["n"] < 5) == '{"n": 1}\n{"n": 2}\nend\n'
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [3, 4, 5]
    assert (tmp_path / "link").is_symlink()
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert written(path, keep=lambda line: line["n"] == 2, head=["first"]) == 'first\n{"n": 2}\n'
    assert sorted(tmp_path.iterdir()) == [tmp_path / "lines.jsonl", tmp_path / "link"]


def in_another_process(function: Callable[[], None]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(30)
    return process.exitcode


@pytest.mark.parametrize("options", [{}, {"keep": lambda line: False}, {"head": ["first"]}])
def test_a_file_that_another_process_writes_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    path = tmp_path / "lines.jsonl"
    file = LineFile(path, lambda line: True, ["head"])
    file.write("one")

    def second() -> None:
        other = LineFile(path, **options)
        other.write("two")
        other.close()
        assert told(caplog) == [f"{path} cannot be written (another process writes it): the run goes on without it"]

    assert in_another_process(second) == 0
    file.write("three")
    assert path.read_text() == "head\none\nthree\n"
    file.close()
    assert written(path, "four") == "head\none\nthree\nfour\n"
    assert told(caplog) == []


def test_a_file_that_was_replaced_while_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("old\n")
    opened: Callable[..., Any] = Path.open

    def open_and_replace(self: Path, *args: Any, **options: Any) -> Any:
        file = opened(self, *args, **options)
        monkeypatch.undo()
        (tmp_path / "new").write_text("new\n")
        (tmp_path / "new").rename(path)
        return file

    monkeypatch.setattr(Path, "open", open_and_replace)
    file = LineFile(path)
    file.write("line")
    file.close()
    assert path.read_text() == "new\nline\n"
