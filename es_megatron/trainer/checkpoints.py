"""What a run saves and goes on from: model, scores, masks, totals; at once, or the scores while training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.background import BackgroundSave
from es_megatron.checkpoint.es_state import SaveReport
from es_megatron.checkpoint.rotation import CheckpointDirectory
from es_megatron.checkpoint.warm_start import Resumption, WarmStart, read_resumption, start_with_scores
from es_megatron.core.metrics import RunTotals
from es_megatron.errors import CheckpointError, PeerError
from es_megatron.frameworks.appended import appended_check
from es_megatron.frameworks.megatron_data import LoadedBlend
from es_megatron.rank_grid import RankGrid
from es_megatron.trainer.backend import Backend, check_backend
from es_megatron.trainer.changes import changes, comparable
from es_megatron.trainer.settings import PretrainSettings

LOGGER = logging.getLogger(__name__)

ES_STATE = "es_state"
MODEL = "model"


class RunCheckpoints:
    """The checkpoints of one run; methods are collective over the world."""

    def __init__(
        self, settings: PretrainSettings, blend: LoadedBlend, world: RankGrid, tell: Callable[[Exception], None]
    ) -> None:
        """Look for the newest checkpoint, and whether it is of this blend.

        Args:
            settings: of the run.
            blend: of the run.
            world: all ranks.
            tell: called at once with what goes wrong on this rank while others may wait for it in a framework's save.

        Raises:
            CheckpointError: no checkpoint can be used, or the newest is of another blend or backend.
        """
        run = settings.run
        self._in_background = run.background_save
        self._manifest, self._world, self._tell = blend.manifest, world, tell
        self._directory = CheckpointDirectory(run.directory / "checkpoints", run.keep_checkpoints, world)
        self._found = self._directory.find() if run.resume else None
        self._resumption: Resumption | None = None
        if self._found is not None:
            with agreed(world, f"resume from {self._found}"):
                check_backend(self._found / MODEL, settings.backend)
            self._resumption = read_resumption(
                self._found / ES_STATE,
                blend.manifest,
                world,
                keep_scores=run.on_blend_change == "keep_scores",
                appended=appended_check(settings.model.seq_length),
            )
        self.changes: list[str] = []
        """Settings that have changed since the checkpoint and take effect, once it is restored."""
        self._settings = settings
        self._pending: BackgroundSave | None = None
        self._began = 0.0

    @property
    def warm_start(self) -> WarmStart:
        """What the engine begins with."""
        return start_with_scores if self._resumption is None else self._resumption.start

    def restore(self, backend: Backend, totals: RunTotals) -> list[dict[str, Any]] | None:
        """Take the newest checkpoint over into a run that has begun with `warm_start`.

        Returns:
            The evaluations so far; None if there is no checkpoint.
        """
        if self._found is None or self._resumption is None:
            return None
        engine = backend.engine
        if self._resumption.transfer is None:
            state = engine.load(self._found / ES_STATE)
        else:
            state = self._resumption.state
            engine.follow(state["engine"])
        self.changes = changes(state.get("settings", {}), self._settings)
        totals.load_state_dict(state["totals"])
        totals.chosen, totals.drawn = self._renumber(totals.chosen), self._renumber(totals.drawn)
        backend.load(self._found / MODEL)
        LOGGER.info("resumed from %s at iteration %d", self._found, engine.iteration)
        return list(state["evaluations"])

    def save(
        self, backend: Backend, totals: RunTotals, evaluations: list[dict[str, Any]], *, hold: bool = False
    ) -> str | None:
        """Write model and ES state of this iteration; the marker that makes them count comes last.

        Args:
            backend: that trains.
            totals: so far.
            evaluations: so far.
            hold: whether to remove no older checkpoint after it.

        Returns:
            What to say of it; None if it goes on in the background.
        """
        self.advance(wait=True)
        self._began = time.perf_counter()
        self._directory.holds = hold
        engine = backend.engine
        engine.check_copies()
        partial = self._directory.begin(engine.iteration)
        with self._dropped_on_failure(engine.iteration):
            with agreed(self._world, f"save iteration {engine.iteration}", lambda: None, tell=self._tell):
                backend.save(partial / MODEL)
            own = {
                "totals": totals.state_dict(),
                "evaluations": list(evaluations),
                "settings": comparable(self._settings),
            }
            copied = self._in_background and engine.grid.mp_rank == 0
            writer = engine.writer(partial / ES_STATE, own, copied=copied)
            if self._in_background:
                self._pending = BackgroundSave(self._directory, engine.iteration, writer, self._world)
                return None
            report = writer.save()
            return self._told(self._directory.commit(engine.iteration), report)

    def advance(self, *, wait: bool = False) -> str | None:
        """Take the next step of a save in the background; returns what to say once it is complete."""
        if self._pending is None:
            return None
        with self._dropped_on_failure(self._pending.iteration):
            where = self._pending.advance(wait=wait)
        if where is None or self._pending.report is None:
            return None
        report, self._pending = self._pending.report, None
        return f"{self._told(where, report)}, in the background"

    @contextmanager
    def _dropped_on_failure(self, iteration: int) -> Generator[None]:
        """Leave nothing half-written behind a save that failed, which every rank has heard of when this sees it."""
        try:
            yield
        except (CheckpointError, PeerError):
            if self._world.world_rank == 0:
                with suppress(OSError):  # the failure itself is what to tell
                    self._directory.drop(iteration)
            raise

    def _told(self, where: Path, report: SaveReport) -> str:
        seconds = time.perf_counter() - self._began
        scores = f"scores and masks: {report.bytes} bytes in {report.seconds:.2f} s"
        return f"saved {where} in {seconds:.1f} s, of which {scores}"

    def _renumber(self, count: np.ndarray) -> np.ndarray:
        """Counts by component of the blend that saved, as counts by component of this one."""
        if self._resumption is None:
            return count
        counts = dict(zip([c.name for c in self._resumption.saved.components], count.tolist(), strict=True))
        return np.asarray([counts.get(c.name, 0) for c in self._manifest.components], dtype=np.int64)
