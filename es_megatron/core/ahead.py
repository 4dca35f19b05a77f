"""Losses of the next meta-batch, scored one step early: "scores as of iteration t" for the choice at t + 1.

They are kept raw, by position; exchange and evolution run when their iteration comes, after the commit of the one
before. A skipped step keeps them, since its parameters did not move; a step that runs again overwrites what it scored.
"""

from __future__ import annotations

import base64
import logging
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.core.plan import Plan
from es_megatron.data.sampler import MetaBatch, Sampler
from es_megatron.rank_grid import RankGrid

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

LOGGER = logging.getLogger(__name__)


class EarlyLosses(NamedTuple):
    """What a pass has told of a meta-batch before its iteration."""

    iteration: int
    """Of the meta-batch."""
    ids: int
    """CRC-32 of its ids."""
    loss: Float32
    """float32[B]: this rank's at its own positions, 0 elsewhere."""


class ScoringAhead:
    """Says which meta-batch is to be scored early, and keeps its losses until its iteration."""

    def __init__(self, plan: Plan, sampler: Sampler, own: Int64) -> None:
        """Start with nothing scored.

        Args:
            plan: of the run.
            sampler: draws the next meta-batch.
            own: positions that this rank loads.
        """
        self._plan, self._sampler, self._own = plan, sampler, own
        self._now: EarlyLosses | None = None
        self._next: EarlyLosses | None = None

    def due(self, iteration: int) -> MetaBatch | None:
        """The meta-batch to score in the pass that trains this iteration: the next, where both of them select."""
        plan = self._plan
        wanted = plan.scorer.merges and plan.selects_at(iteration) and plan.selects_at(iteration + 1)
        return self._sampler.batch(iteration + 1) if wanted else None

    def of(self, batch: MetaBatch) -> Float32 | None:
        """Losses of a meta-batch, float32[B], this rank's at its own positions; None where it was not scored early."""
        now = self._now
        if now is None or now.iteration != batch.iteration:
            return None
        if now.ids != checksum(batch):
            LOGGER.warning("iteration %d is scored anew: what was scored early is of other samples", batch.iteration)
            return None
        return now.loss

    def stage(self, batch: MetaBatch, loss: Float32) -> None:
        """Keep losses of the next meta-batch; another call for the same iteration replaces them."""
        self._next = EarlyLosses(batch.iteration, checksum(batch), loss)

    def advance(self) -> None:
        """Go on to the next iteration."""
        self._now, self._next = self._next, None

    def to_json(self, grid: RankGrid) -> dict[str, Any]:
        """What a checkpoint keeps under `ahead`, nothing without a scorer that merges; collective with one."""
        if not self._plan.scorer.merges:
            return {}
        now = self._now
        if now is None:
            return {"ahead": None}
        loss = grid.sum_over_dp(now.loss)
        told = base64.b64encode(loss.astype("<f4").tobytes()).decode()
        return {"ahead": {"iteration": now.iteration, "ids": now.ids, "loss": told}}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take over what a checkpoint kept, under any number of ranks; nothing where the scorer does not merge."""
        self._now = self._next = None
        if state is None or not self._plan.scorer.merges:
            return
        loss = np.frombuffer(base64.b64decode(state["loss"]), "<f4").astype(np.float32)
        mine = np.zeros_like(loss)
        mine[self._own] = loss[self._own]
        self._now = EarlyLosses(int(state["iteration"]), int(state["ids"]), mine)


def checksum(batch: MetaBatch) -> int:
    """CRC-32 of a meta-batch's ids."""
    return zlib.crc32(np.ascontiguousarray(batch.id).data)
