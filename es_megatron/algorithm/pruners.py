"""Set-level pruners: which samples of a component an epoch keeps, behind one registry.

A pruner gives every sample a key >= 0, and the m = ceil((1 - r) n) smallest keys are kept, ties by row. Keys are made
block by block from what a rank knows of its own samples, so no score is ever gathered. That count is fixed before the
run, as the length of the run and the learning-rate schedule hang on it: where a published method lets it vary, the
class says what it does instead. Shapes: N samples of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from es_megatron.algorithm.registry import Registry
from es_megatron.algorithm.selection import race_keys
from es_megatron.errors import ConfigError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]

LARGEST_EXPONENT = 500.0
"""Exponents of weights are held within this, so that keys are neither 0 nor infinite."""


class Block(NamedTuple):
    """What is known of some samples of a component."""

    score_N: Float32
    """Scores as they are used, above 0; what was never seen counts as its component's mean."""
    visits_N: UInt8
    uniform_N: Float64
    """Random numbers in (0, 1) of these samples in this epoch."""
    mean: float
    """Mean used score of the component's seen samples; 0 where the pruner does not need it."""
    epoch: int
    margin_N: Float64 | None = None
    """What is left to learn against a reference, in nats, where the run has one."""


class Pruner(ABC):
    """A set-level pruner; instances are made of options, and never change."""

    needs_mean = False
    """Whether `Block.mean` has to be known, which takes a small collective."""
    rescales = False
    """Whether kept samples with a score below the mean stand for those that were left out, by their loss's weight."""
    takes_margin = False
    """Whether it looks at `Block.margin_N`."""
    corrects_rate = False
    """Whether the learning rate is raised by n / m in its epochs."""

    @abstractmethod
    def keys(self, block: Block) -> Float64:
        """Keys of the samples, float64[N], >= 0."""


PRUNERS: Registry[Pruner] = Registry(Pruner, "pruner", "es_megatron.pruners")


@PRUNERS.register("eswp")
@dataclass(frozen=True)
class ScoreRacePruner(Pruner):
    """Draw what is kept proportionally to the scores (Evolved Sampling with pruning, Algorithm 1).

    With a reference, proportionally to exp(sharpness x), x what is left to learn.
    """

    sharpness: float = 1.0
    """Of the draw by what is left to learn, per nat, > 0; without a reference it is not read."""

    takes_margin = True

    def __post_init__(self) -> None:
        """Check the options."""
        if self.sharpness <= 0:
            raise ConfigError(f"Option `sharpness` of pruner `eswp` must be above 0, but is {self.sharpness} instead.")

    @override
    def keys(self, block: Block) -> Float64:
        if block.margin_N is None:
            return race_keys(block.score_N, block.uniform_N)
        exponent_N = np.clip(self.sharpness * block.margin_N, -LARGEST_EXPONENT, LARGEST_EXPONENT)
        return race_keys(np.exp(exponent_N), block.uniform_N)


@PRUNERS.register("random")
@dataclass(frozen=True)
class RandomPruner(Pruner):
    """Draw what is kept uniformly."""

    @override
    def keys(self, block: Block) -> Float64:
        return race_keys(np.ones(len(block.uniform_N), np.float32), block.uniform_N)


@PRUNERS.register("infobatch")
@dataclass(frozen=True)
class InfoBatchPruner(Pruner):
    """Leave out samples below the mean, at random, and weigh up those of them that are kept (Qin et al. 2024).

    Published, each sample below the mean is left out with probability r; here exactly r n of them are, and the weight
    1 / (1 - r) becomes (how many there are) / (how many are kept). If fewer than r n lie below the mean, all of them
    are left out, and the rest at random.
    """

    needs_mean = True
    rescales = True

    @override
    def keys(self, block: Block) -> Float64:
        return block.uniform_N + (block.score_N < block.mean)


@PRUNERS.register("ucb")
@dataclass(frozen=True)
class UpperBoundPruner(Pruner):
    """Keep the highest upper confidence bounds, s + c sqrt(log(t) / visits) at epoch t (Raju et al. 2021)."""

    c: float = 1.0
    """Weight of the bonus of samples that were seldom seen, >= 0."""

    def __post_init__(self) -> None:
        """Check the options."""
        if self.c < 0:
            raise ConfigError(f"Option `c` of pruner `ucb` must be >= 0, but is {self.c} instead.")

    def keys(self, block: Block) -> Float64:
        """Ranks that fall with score plus exploration bonus; what was never seen comes first."""
        bonus_N = self.c * np.sqrt(np.log(block.epoch + 1) / np.maximum(block.visits_N, 1))
        key_N = 1 / (1 + block.score_N.astype(np.float64) + bonus_N)
        return np.where(block.visits_N == 0, 0.0, key_N)


@PRUNERS.register("kakurenbo")
@dataclass(frozen=True)
class HidingPruner(Pruner):
    """Hide the lowest scores, move uncertain ones back, and raise the learning rate by n / m (Nguyen et al. 2023).

    A sample may be hidden for its score only if the model is sure of it: if the geometric mean of its tokens'
    probabilities, exp(-score), is at least `confidence`. Published, fewer are hidden where too few are sure; here the
    others are hidden at random, as the count is fixed.
    """

    confidence: float = 0.05
    """In (0, 1]; published 0.7 for image classes, which a language model far from saturation never reaches."""

    corrects_rate = True

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 < self.confidence <= 1:
            raise ConfigError(
                f"Option `confidence` of pruner `kakurenbo` must be in (0, 1], but is {self.confidence} instead."
            )

    @override
    def keys(self, block: Block) -> Float64:
        sure_N = block.score_N <= -np.log(self.confidence)
        return np.where(sure_N, 1 + 1 / (1 + block.score_N.astype(np.float64)), block.uniform_N)


def kept_count(samples: int, ratio: float) -> int:
    """m = ceil((1 - r) * n), exactly: r is read as the decimal that was written, so 0.2 of 10 keeps 8 and not 9."""
    return -((Fraction(str(ratio)) - 1) * samples // 1)
