"""A checkpoint that is written while training goes on.

Two stretches of work need no other rank and run in a thread: writing the scores, and reading everything back for its
checksum. Between them and after them stands a step of all ranks, in the main thread. The marker moves in the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.es_state import EsStateWriter, SaveReport
from es_megatron.checkpoint.rotation import CheckpointDirectory, Checksums

if TYPE_CHECKING:
    from es_megatron.rank_grid import RankGrid


class BackgroundSave:
    """The rest of a checkpoint, begun with `CheckpointDirectory.begin`, whose other files are written."""

    def __init__(self, checkpoints: CheckpointDirectory, iteration: int, writer: EsStateWriter, grid: RankGrid) -> None:
        """Start to write; collective.

        Args:
            checkpoints: where it stands.
            iteration: its iteration.
            writer: of its scores, which nobody changes meanwhile.
            grid: the ranks.
        """
        self._checkpoints, self.iteration, self._writer, self._grid = checkpoints, iteration, writer, grid
        self.report: SaveReport | None = None
        """What the scores took, once they are written."""
        self._checksums: Checksums = {}
        writer.prepare()
        self._in_thread = start_in_thread(writer.write)

    def advance(self, *, wait: bool = False) -> Path | None:
        """Take the next step if every rank has come so far; collective, at the same iteration everywhere.

        Args:
            wait: take all steps that are left.

        Returns:
            The checkpoint, once it counts.

        Raises:
            CheckpointError: on every rank, if writing failed on any; older checkpoints are untouched.
        """
        while wait or all(self._grid.gather_objects(self._in_thread.done())):
            with agreed(self._grid, f"save iteration {self.iteration}", self._drop):
                self._in_thread.result()
            if self.report is not None:
                return self._checkpoints.finish(self.iteration, self._checksums)
            self.report = self._writer.finish()
            self._in_thread = start_in_thread(self._checksum)
        return None

    def _checksum(self) -> None:
        self._checksums = self._checkpoints.checksum(self.iteration)

    def _drop(self) -> None:
        self._checkpoints.drop(self.iteration)


def start_in_thread(function: Callable[[], None]) -> Future[None]:
    """Run a function in a thread of its own, which ends with it; the interpreter does not exit before."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="es-checkpoint")
    future = executor.submit(function)
    executor.shutdown(wait=False)  # takes no more; what it has taken is still run
    return future
