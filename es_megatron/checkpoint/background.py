"""A checkpoint that is written while training goes on.

Two stretches of work need no other rank and run in a thread: writing the scores, and reading everything back for its
checksum. Between them and after them stands a step of all ranks, in the main thread. The marker moves in the last one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
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
        self._work = Work(writer.write)

    def advance(self, *, wait: bool = False) -> Path | None:
        """Take the next step if every rank has come so far; collective, at the same iteration everywhere.

        Args:
            wait: take all steps that are left.

        Returns:
            The checkpoint, once it counts.

        Raises:
            CheckpointError: on every rank, if writing failed on any; older checkpoints are untouched.
        """
        while wait or not any(self._grid.gather_objects(self._work.running)):
            with agreed(self._grid, f"save iteration {self.iteration}", self._drop):
                self._work.join()
            if self.report is not None:
                return self._checkpoints.finish(self.iteration, self._checksums)
            self.report = self._writer.finish()
            self._work = Work(self._checksum)
        return None

    def _checksum(self) -> None:
        self._checksums = self._checkpoints.checksum(self.iteration)

    def _drop(self) -> None:
        self._checkpoints.drop(self.iteration)


class Work:
    """A function in a thread, whose exception is raised where it is waited for."""

    def __init__(self, function: Callable[[], None]) -> None:
        """Start it."""
        self._function = function
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="es-checkpoint")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it is still at work."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for it."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        try:
            self._function()
        except Exception as error:  # noqa: BLE001 - raised in `join`
            self._problem = error
