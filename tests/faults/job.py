"""A job of several ranks whose processes may be killed, hang or leave: forked, as a launcher would start them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

from es_megatron import cli
from es_megatron.trainer.settings import write_settings
from tests import small_run

Prepare = Callable[[int], None]


def free_port() -> int:
    """A port nobody listens on, below those that the system hands out: no connection takes it in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port


def nothing(rank: int) -> None:
    """The preparation that changes nothing."""


class Job:
    """The command `es-megatron` on several ranks; the caller's modules are shared by fork."""

    started: ClassVar[list[Job]] = []
    """All of them; a fixture ends them after each test."""

    def __init__(self, ranks: int, arguments: Sequence[str], folder: Path, prepare: Prepare = nothing) -> None:
        """Start it.

        Args:
            ranks: how many.
            arguments: of the command.
            folder: takes what each rank prints.
            prepare: called in each rank before the command, with its number.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        Job.started.append(self)
        environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        context = multiprocessing.get_context("fork")
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            each = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            process = context.Process(target=self._rank, args=(rank, arguments, each, prepare))
            process.start()
            self.processes.append(process)

    def _rank(self, rank: int, arguments: Sequence[str], environment: dict[str, str], prepare: Prepare) -> None:
        os.setsid()  # so that what a rank starts can be found and ended with it
        output = os.open(self._folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        logging.getLogger().handlers.clear()  # pytest's
        code = 1
        try:
            prepare(rank)
            code = cli.main(arguments)
        except BaseException:  # noqa: BLE001 - told in the rank's output, like an interpreter does
            traceback.print_exc()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # a limit on file sizes holds for what it prints, too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        sys.exit(code)

    def said(self, rank: int) -> str:
        """What a rank has printed."""
        path = self._folder / f"rank{rank}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, text: str, rank: int = 0, seconds: float = 240.0) -> None:
        """Wait until a rank has printed something."""
        until = time.monotonic() + seconds
        while text not in self.said(rank):
            assert time.monotonic() < until, f"{text!r} did not come:\n{self.said(rank)}"
            assert self.processes[rank].is_alive(), self.said(rank)
            time.sleep(0.05)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a rank a signal."""
        os.kill(self.pid(rank), number)

    def pid(self, rank: int) -> int:
        """Process of a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def alive(self) -> bool:
        """Whether all ranks are still there."""
        return all(process.is_alive() for process in self.processes)

    def codes(self, seconds: float = 60.0) -> list[int | None]:
        """Exit codes within a time, negative for signals; None of a rank that was still there, and is ended."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        self.end()
        return found

    def left_behind(self) -> list[str]:
        """Processes that ranks have started and that are still there, by what the system says of them."""
        found: list[str] = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = status.read_text().rpartition(")")[2].split()
                if int(fields[3]) in {self.pid(rank) for rank in range(len(self.processes))} and fields[0] != "Z":
                    found.append(status.parent.name)
        return found

    def end(self) -> None:
        """End whatever is left."""
        for process in self.processes:
            with suppress(OSError):
                os.killpg(process.pid or 0, signal.SIGKILL) if process.pid else None
            process.join()


def start(
    tmp_path: Path, *overrides: str, ranks: int = 2, prepare: Prepare = nothing, folder: str = "told", **blend: Any
) -> Job:
    """Start the small run through the command, saving every 4 iterations; `blend` goes to `write_blend`."""
    data = tmp_path / "data"
    if not data.exists():
        small_run.write_blend(data, **blend)
    settings = small_run.settings_of(
        data / "blend.yaml", tmp_path / "run", "run.save_interval=4", "training.log_interval=2", *overrides
    )
    path = tmp_path / f"{folder}.yaml"
    write_settings(settings, path)
    return Job(ranks, ["pretrain", "--config", str(path)], tmp_path / folder, prepare)
