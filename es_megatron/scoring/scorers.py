"""Where the losses come from that a meta-batch is chosen by; each scorer reports what that needs and costs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.scoring.arms import arm_of

PREFIX_MULTIPLE = 8
"""What the tokens that the `prefix` scorer reads are a multiple of."""


class Scorer(ABC):
    """A source of losses; instances are made of settings, and never change."""

    makes_passes = True
    """Whether it ever makes a forward-only pass of its own."""
    learns = True
    """Whether losses change the scores."""
    bounds_norms = False
    """Whether every choice follows a pass of its own, which can bound gradient norms."""
    shortens = False
    """Whether its passes read fewer tokens than training does."""
    merges = False
    """Whether the next meta-batch is scored in the pass that trains this one."""

    @abstractmethod
    def scores_at(self, iteration: int) -> bool:
        """Whether it makes a pass over the meta-batch of a selecting iteration."""

    @abstractmethod
    def passes(self, start: int, stop: int) -> int:
        """Iterations with a pass in [start, stop), all of which select."""

    def tokens(self, seq_length: int) -> int:
        """First tokens of a sequence that its losses are about."""
        return seq_length


class FreshScorer(Scorer):
    """A forward pass over every meta-batch, as published (Algorithm 1)."""

    def __init__(self, *, merges: bool = False) -> None:
        """Score by passes of its own, or in the passes that train, one step early."""
        self.merges, self.bounds_norms = merges, not merges

    def scores_at(self, iteration: int) -> bool:
        """Always."""
        return True

    def passes(self, start: int, stop: int) -> int:
        """All of them."""
        return stop - start


class PrefixScorer(FreshScorer):
    """A forward pass over the first tokens of each sequence."""

    shortens = True

    def __init__(self, share: float, *, merges: bool = False) -> None:
        """Read this share of the tokens, in (0, 1], rounded up to a multiple of 8."""
        super().__init__(merges=merges)
        self._share = share

    def tokens(self, seq_length: int) -> int:
        """The share of the sequence's tokens, at most all."""
        return min(seq_length, math.ceil(self._share * seq_length / PREFIX_MULTIPLE) * PREFIX_MULTIPLE)


class HistoryScorer(Scorer):
    """No pass: the stored scores choose, and the training forward updates those of what it trains on."""

    makes_passes = False

    def scores_at(self, iteration: int) -> bool:
        """Never."""
        return False

    def passes(self, start: int, stop: int) -> int:
        """None."""
        return 0


class PeriodicScorer(Scorer):
    """A fresh pass on every k-th iteration, history between."""

    def __init__(self, period: int) -> None:
        """Score on iterations that are a multiple of this, >= 1."""
        self._period = period

    def scores_at(self, iteration: int) -> bool:
        """On multiples of the period."""
        return iteration % self._period == 0

    def passes(self, start: int, stop: int) -> int:
        """Multiples of the period."""
        return -(-stop // self._period) - -(-start // self._period)


class ExternalScorer(HistoryScorer):
    """Scores that somebody else made choose, and never change."""

    learns = False


class NoScorer(HistoryScorer):
    """Of arms that choose at random or not at all."""

    learns = False


SCORERS: Mapping[str, Callable[[EvolvedSamplingConfig], Scorer]] = {
    "fresh": lambda config: FreshScorer(merges=config.scorer.overlap == "merged"),
    "history": lambda config: HistoryScorer(),
    "every-k": lambda config: PeriodicScorer(config.scorer.every),
    "prefix": lambda config: PrefixScorer(config.scorer.prefix_share, merges=config.scorer.overlap == "merged"),
    "external": lambda config: ExternalScorer(),
}


def scorer_of(config: EvolvedSamplingConfig) -> Scorer:
    """The scorer that the settings name, or none where the arm keeps no scores."""
    return SCORERS[config.scorer.kind](config) if arm_of(config).scores else NoScorer()


def settings_of_pass(config: EvolvedSamplingConfig) -> EvolvedSamplingConfig:
    """Settings for scoring alone: a pass as that of a run with `config` reads rows, over whole meta-batches."""
    scorer = config.scorer
    read = {"kind": "prefix" if scorer_of(config).shortens else "fresh", "prefix_share": scorer.prefix_share}
    size = {} if scorer.micro_batch_size is None else {"micro_batch_size": scorer.micro_batch_size}
    told = {"scorer": {**read, **size}, "selection": {"keep_ratio": 1.0}, "seed": config.seed}
    return EvolvedSamplingConfig.from_mapping(told)
