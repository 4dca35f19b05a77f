"""Batch and parallel sizes of a run, and the layout that its passes have."""

from __future__ import annotations

from dataclasses import dataclass

from es_megatron.core.plan import Layout


@dataclass(frozen=True)
class Sizes:
    """Sizes that are all known and divide."""

    meta_batch: int
    micro_batch: int
    data_parallel: int
    pipeline: int
    virtual: int
    backward: float
    """Cost of a backward pass in forward passes: 2, and 1 more where all layers run forward again in it."""

    @property
    def own(self) -> int:
        """Sequences of the meta-batch on one data-parallel rank."""
        return self.meta_batch // self.data_parallel

    @property
    def multiple(self) -> int:
        """What the micro-batches of a rank must be a multiple of."""
        return self.pipeline if self.virtual > 1 else 1

    @property
    def quantum(self) -> int:
        """What b must be a multiple of."""
        return self.micro_batch * self.data_parallel * self.multiple

    @property
    def scoring_sizes(self) -> list[int]:
        """Scoring micro-batches that cut a rank's share of the meta-batch."""
        return [s for s in range(1, self.own + 1) if self.own % s == 0 and self.own // s % self.multiple == 0]

    def layout(self, scoring: int | None, forward: float = 1.0) -> Layout:
        """What a pass costs.

        Args:
            scoring: sequences in a scoring micro-batch; None: as in training.
            forward: time of a training micro-batch's forward on one stage, in any unit.
        """
        size = scoring or self.micro_batch
        return Layout(
            micro_batches=self.own // self.micro_batch,
            scoring_micro_batches=self.own // size,
            pipeline=self.pipeline,
            virtual=self.virtual,
            forward=forward,
            backward=self.backward * forward,
            scoring_forward=forward * size / self.micro_batch,
        )
