"""The worker processes of a comparison and who trains what: runs start as soon as they can, failures stop nobody."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from es_megatron.bench.runs import Task


class Answer(NamedTuple):
    """What a worker says at the end of a run."""

    error: str
    """What went wrong, or nothing."""
    seconds: float = math.nan
    """Wall-clock of the run."""
    processor: float = math.nan
    """Seconds of processor, which other work on the machine does not lengthen as much."""


class Worker:
    """One worker process, started when first needed and again after it has died."""

    def __init__(self, log: Path) -> None:
        """`log` takes what its runs print."""
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def train(self, settings: Mapping[str, Any]) -> Answer:
        """Have a run trained."""
        answer = self._ask({"train": settings})
        if answer:
            return Answer(**json.loads(answer))
        process, self._process = self._started(), None
        return Answer(f"the worker process ended with exit code {process.wait()}; {self._log} has what it printed")

    def estimate(self, runs: Sequence[Mapping[str, Any]]) -> list[float]:
        """Seconds of each of several runs of one case; nan where they could not be told."""
        answer = self._ask({"estimate": list(runs)})
        return json.loads(answer)["seconds"] if answer else [math.nan] * len(runs)

    def _ask(self, request: Mapping[str, Any]) -> str:
        """One line of a worker that lives, nothing from one that has died."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = ""
        with suppress(OSError):  # a worker that has died answers nothing
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        return answer

    def close(self) -> None:
        """End the process at once."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
            self._process.wait()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "es_megatron.bench.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is for the command; workers end when it does
                )
        return self._process


class Crew:
    """Several workers on one list of tasks that grows as outcomes come in."""

    def __init__(
        self,
        ready: Callable[[], list[Task]],
        start: Callable[[Task], Mapping[str, Any]],
        finish: Callable[[Task, Answer], None],
    ) -> None:
        """Take the three things only the comparison knows.

        Args:
            ready: tasks that can start now, those under way among them.
            start: makes a task's folder and gives its settings.
            finish: takes note of a task's end.
        """
        self._ready, self._start, self._finish = ready, start, finish
        self._changed = threading.Condition()
        self._under_way: set[Task] = set()
        self._failure: BaseException | None = None

    def work(self, logs: list[Path]) -> None:
        """Train everything, with one worker for each log; raises what `start` or `finish` raise."""
        workers = [Worker(log) for log in logs]
        threads = [threading.Thread(target=self._guarded, args=(worker,), daemon=True) for worker in workers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as stop:  # Ctrl-C: what the workers are at is neither finished nor failed
            self._failure = stop
            raise
        finally:
            for worker in workers:
                worker.close()
        if self._failure is not None:
            raise self._failure

    def _guarded(self, worker: Worker) -> None:
        try:
            while (task := self._next()) is not None:
                answer = worker.train(self._start(task))
                with self._changed:
                    if self._failure is not None:
                        return
                    self._finish(task, answer)
                    self._under_way.discard(task)
                    self._changed.notify_all()
        except BaseException as failure:  # noqa: BLE001 - told by the main thread
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _next(self) -> Task | None:
        """Wait for a task nobody works on; None once there will be no more."""
        with self._changed:
            while self._failure is None:
                ready = self._ready()
                for task in ready:
                    if task not in self._under_way:
                        self._under_way.add(task)
                        return task
                if not ready:
                    return None
                self._changed.wait()
            return None
