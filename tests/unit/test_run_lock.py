"""The lock of a run's folder, which its process's end releases."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from es_megatron.errors import ConfigError
from es_megatron.trainer.run_lock import NAME, RunLock


def hold(directory: Path, pipe: Any) -> None:
    RunLock(directory).take()
    pipe.send(os.getpid())
    signal.pause()


def refused(directory: Path, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunLock(directory).take()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "run", theirs))
    process.start()
    pid = ours.recv()
    refused(tmp_path / "run", f"but process {pid} on .* trains there. Wait for it, end it with `kill {pid}` on ")
    process.kill()
    process.join()
    lock = RunLock(tmp_path / "run")
    lock.take()
    lock.release()
    lock.release()
    lock.take()
    assert f'"pid": {os.getpid()}' in (tmp_path / "run" / NAME).read_text()
    lock.release()


def test_a_holder_that_has_not_written_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", raise_error(errno.EAGAIN))
    refused(tmp_path, "but another process trains there. Wait for it, end it")


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "lockf", raise_error(errno.ENOLCK))
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()
    (record,) = caplog.records
    assert "cannot be locked" in record.getMessage()


def raise_error(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
