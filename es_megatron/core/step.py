"""What passes between the engine and a framework: the work of an iteration, what came of it, and what it did."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from es_megatron.data.sampler import MetaBatch

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class Work(NamedTuple):
    """What one data-parallel rank trains on in one iteration."""

    positions: Int64
    """Positions of the meta-batch, int64[micro-batches * micro-batch size]."""
    weights: Float64 | None
    """What each of their losses is multiplied by; None for 1."""
    capture: bool
    """Whether the training forward has to report the loss of each sequence."""
    ahead: MetaBatch | None = None
    """The next meta-batch, where this rank's share of it is to be scored in the same pass."""


class Trained(NamedTuple):
    """What a framework gives back after forward and backward."""

    result: Any
    """What the framework's own call returned."""
    losses: Float32 | None
    """float32 like `Work.positions` where this rank computed them, None on other pipeline stages or without capture."""
    ahead: Float32 | None = None
    """The same of `Work.ahead`: losses of this rank's positions in it."""


class Framework(Protocol):
    """What a framework must be able to do with one meta-batch."""

    loss_source: int
    """Model-parallel rank that computes the losses."""

    def score(self, positions: Int64) -> Float32 | None:
        """Mean token loss of this rank's sequences, forward only, leaving no trace; None on ranks without losses.

        Returns:
            float32[n]; float32[2, n] where `EvolvedSampling.needs_norm`, the bounds of gradient norms under the losses.
        """
        ...

    def train(self, work: Work) -> Trained:
        """Forward and backward on these sequences, with the framework's own accumulation."""
        ...


class StepRecord(NamedTuple):
    """What one step did, for logs and metrics."""

    iteration: int
    evolving: bool
    scored: int
    """Sequences that got a scoring forward pass."""
    chosen: Int64
    """Ids that got a backward pass, by position."""
    components: Int64
    """Component of each of them."""
    meta_loss: float
    """Mean loss of the meta-batch where known, else nan."""
    chosen_loss: float
    bad: int
    """Sequences with a non-finite loss."""
    seconds: dict[str, float]
    """Wall-clock of `score` and `train` (until every stage has the losses), `exchange` (between data-parallel ranks)
    and `order`."""
    drawn: Int64 = np.zeros(0, dtype=np.int64)
    """Component of each sequence of the meta-batch, chosen or not."""
    skipped_loss: float = float("nan")
    """Mean loss of the sequences that were not chosen, where known, else nan."""
    masked: int = 0
    """Sequences known to have no loss, since all their tokens are masked."""
    losses: Float32 = np.zeros(0, dtype=np.float32)
    """Of each of `chosen`; nan where not known."""
