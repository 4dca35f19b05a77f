"""Ranks that are threads, a disk that crashes, and a small checkpoint to try them on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from es_megatron.algorithm.ownership import owned_range
from es_megatron.checkpoint import ScoreRange
from es_megatron.rank_grid import RankGrid

T = TypeVar("T")

MANIFEST = {
    "seq_length": 8,
    "components": [
        {"name": "books", "prefix": "a", "samples": 60, "weight": 0.5, "fingerprint": "f0"},
        {"name": "code", "prefix": "b", "samples": 43, "weight": 0.5, "fingerprint": "f1"},
    ],
}
SHORT_WRITES_FROM = 300
MASKS = {(0, 1): b"\x01\x80\xff", (1, 3): np.arange(7, dtype=np.uint8), (1, 4): bytearray(b"")}


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.objects: list[Any] = [None] * size


@dataclass
class ThreadReplica:
    """The part of a RankGrid that checkpoints use, between threads."""

    dp_rank: int
    dp_size: int
    mp_rank: int
    mp_size: int
    meeting: _Meeting

    @property
    def world_rank(self) -> int:
        return self.dp_rank * self.mp_size + self.mp_rank

    @property
    def world_size(self) -> int:
        return self.dp_size * self.mp_size

    def barrier(self) -> None:
        self.meeting.barrier.wait()

    def gather_objects(self, value: Any) -> list[Any]:
        self.meeting.objects[self.world_rank] = value
        self.barrier()
        gathered = list(self.meeting.objects)
        self.barrier()
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]


def on_threads(dp_size: int, body: Callable[[RankGrid], T], mp_size: int = 1) -> list[T | Exception]:
    """What `body` returned or raised on each rank, by world rank."""
    meeting = _Meeting(dp_size * mp_size)
    results: list[Any] = [None] * (dp_size * mp_size)

    def run(grid: ThreadReplica) -> None:
        try:
            results[grid.world_rank] = body(cast("RankGrid", grid))
        except Exception as error:  # noqa: BLE001 - handed to the test
            results[grid.world_rank] = error

    places = [ThreadReplica(d, dp_size, m, mp_size, meeting) for d in range(dp_size) for m in range(mp_size)]
    threads = [threading.Thread(target=run, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def make_scores(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Score and visits of all n samples."""
    generator = np.random.default_rng(seed)
    return generator.random(n, dtype=np.float32), generator.integers(0, 256, n, dtype=np.uint8)


def own_scores(n: int, grid: RankGrid, seed: int = 0) -> ScoreRange:
    """The range of this rank."""
    score, visits = make_scores(n, seed)
    low, high = owned_range(n, grid.dp_rank, grid.dp_size)
    return ScoreRange(n, low, score[low:high], visits[low:high])


class Crash(BaseException):
    """The process ends here: nothing after this happens, no clean-up either."""


@dataclass
class Disk:
    """Stands in for the name `os` of the disk module: counts the steps that change the disk, and stops at one of them.

    It knows what is not yet safe from a loss of power: contents of files not flushed since they were written, names in
    folders not flushed since they were made, and renames in such folders.
    """

    stop_at: int = -1
    error: Callable[[str], BaseException] | None = None
    """What is raised at the step, for what the step works on; without it the process ends there for good."""
    steps: int = 0
    dead: bool = False
    _names: dict[int, str] = field(default_factory=dict[int, str])
    _unflushed: set[str] = field(default_factory=set[str])
    _new: set[str] = field(default_factory=set[str])
    _renames: list[tuple[str, str, bytes | None]] = field(default_factory=list[tuple[str, str, bytes | None]])

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _step(self, what: Any) -> None:
        if self.dead:
            raise Crash
        self.steps += 1
        if self.steps == self.stop_at:
            if self.error is not None:
                raise self.error(str(what))
            self.dead = True
            raise Crash

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._step(path)
            self.wrote(Path(path))
        fd = os.open(path, flags, mode)
        self._names[fd] = str(path)
        return fd

    def write(self, fd: int, data: Any) -> int:
        self._step(self._names[fd])
        # Short writes are legal, and happen to large blocks.
        return os.write(fd, data[: 3 * len(data) // 4] if len(data) > SHORT_WRITES_FROM else data)

    def fsync(self, fd: int) -> None:
        name = self._names[fd]
        self._step(name)
        os.fsync(fd)
        self._unflushed.discard(name)
        self._new = {path for path in self._new if str(Path(path).parent) != name}
        self._renames = [rename for rename in self._renames if str(Path(rename[1]).parent) != name]

    def rename(self, old: Any, new: Any) -> None:
        self._step(old)
        before = Path(new).read_bytes() if Path(new).is_file() else None
        os.rename(old, new)
        self._renames.append((str(old), str(new), before))
        self._unflushed = {self._moved(path, str(old), str(new)) for path in self._unflushed}
        self._new = {self._moved(path, str(old), str(new)) for path in self._new} - {str(new)}

    def unlink(self, path: Any) -> None:
        self._step(path)
        os.unlink(path)

    def rmdir(self, path: Any) -> None:
        self._step(path)
        os.rmdir(path)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        self._step(path)
        self._new |= {str(folder) for folder in (path, *path.parents) if not folder.exists()}
        os.makedirs(path, exist_ok=exist_ok)

    def wrote(self, path: Path) -> None:
        """Somebody else, too, may tell what it wrote without a flush."""
        self._unflushed.add(str(path))
        self._new.add(str(path))

    def at_risk(self) -> list[str]:
        """What a loss of power could still take back."""
        renamed = {new for _, new, _ in self._renames}
        return sorted(path for path in self._unflushed | self._new | renamed if Path(path).exists())

    def losses(self) -> list[tuple[tuple[str, str, bytes | None], ...]]:
        """All sets of renames that a loss of power may undo now."""
        sizes = range(len(self._renames) + 1)
        return list(chain.from_iterable(combinations(self._renames, size) for size in sizes))

    def lose_power(self, undone: tuple[tuple[str, str, bytes | None], ...]) -> bool:
        """Forget what was not flushed, and undo renames; tells whether that state of a disk is possible."""
        for name in self._unflushed:
            if Path(name).is_file():
                os.truncate(name, Path(name).stat().st_size // 2)
        for name in self._new:
            if Path(name).is_file():
                Path(name).unlink()
        for old, new, before in reversed(undone):
            if Path(old).exists() or not Path(new).exists():
                return False
            os.rename(new, old)
            if before is not None:
                Path(new).write_bytes(before)
        return True

    @staticmethod
    def _moved(path: str, old: str, new: str) -> str:
        return new + path.removeprefix(old) if path == old or path.startswith(old + "/") else path
