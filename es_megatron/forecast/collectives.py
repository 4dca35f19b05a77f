"""Collectives of Evolved Sampling in one selecting iteration, and what they take by an alpha-beta model.

A message of n bytes between two ranks takes alpha + beta n. Sums of at most 1 MiB are made by doubling (log2 D
exchanges, two more where D is no power of two), larger ones by gloo's ring (2 (D - 1) messages of n / D), broadcasts by
gloo's binomial tree. The constants are assumptions, for TCP over 10 Gbit/s between nodes, and are printed with the
numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from es_megatron.core.plan import Plan
from es_megatron.rank_grid import SMALL_BYTES

ALPHA = 50e-6
"""Seconds until a message of gloo over TCP arrives."""
BETA = 8 / 10e9
"""Seconds of a byte at 10 Gbit/s."""


@dataclass(frozen=True)
class Collective:
    """One of them."""

    name: str
    kind: str
    """`sum` or `broadcast`."""
    group: str
    """Ranks that take part: `data-parallel`, `model-parallel` or `world`."""
    ranks: int
    bytes: int
    """On each rank."""
    waits: str
    """What cannot begin before it is done."""

    @property
    def seconds(self) -> float:
        """By the alpha-beta model."""
        if self.ranks == 1:
            return 0.0
        if self.kind == "broadcast":
            return math.ceil(math.log2(self.ranks)) * (ALPHA + BETA * self.bytes)
        if self.bytes > SMALL_BYTES:
            return 2 * (self.ranks - 1) * (ALPHA + BETA * self.bytes / self.ranks)
        doublings = int(math.log2(self.ranks))
        return (doublings + 2 * (self.ranks != 1 << doublings)) * (ALPHA + BETA * self.bytes)


def collectives_of(plan: Plan, exchange_bytes: int, data_parallel: int, model_parallel: int) -> tuple[Collective, ...]:
    """What a selecting iteration sends; one with a scoring pass where some have none.

    Args:
        plan: of the run.
        exchange_bytes: of the sum over data-parallel ranks that looks scores up.
        data_parallel: ranks (D).
        model_parallel: ranks that hold one copy of the model together.
    """
    if not plan.evolving_iterations:
        return ()
    found: list[Collective] = []

    def add(name: str, kind: str, group: str, size: int, waits: str) -> None:
        sizes = {"data-parallel": data_parallel, "model-parallel": model_parallel}
        ranks = sizes.get(group, data_parallel * model_parallel)
        found.append(Collective(name, kind, group, ranks, size, waits))

    own, scorer = plan.meta_batch // data_parallel, plan.scorer
    if scorer.merges:
        add("losses, scored early", "broadcast", "model-parallel", 4 * own, "the optimizer step")
    elif plan.scored_iterations:
        add("losses", "broadcast", "model-parallel", 4 * own, "the choice")
    if plan.arm.scores:
        add("scores looked up", "sum", "data-parallel", exchange_bytes, "the choice")
    if plan.arm.scores and plan.config.guard.fallback != "off":
        add("worth of the scores", "broadcast", "world", 8, "the choice")
    add("choice", "broadcast", "world", 8 * plan.kept, "the training pass")
    if scorer.learns and not plan.scored_iterations:
        add(
            "losses of what is trained",
            "broadcast",
            "model-parallel",
            4 * plan.kept // data_parallel,
            "the optimizer step",
        )
        add("the same, of all", "sum", "data-parallel", 8 * plan.meta_batch, "the optimizer step")
    return tuple(found)
