"""Evolved Sampling and its control arms: the same code path, other switches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from es_megatron.config import EvolvedSamplingConfig


@dataclass(frozen=True)
class Arm:
    """What a run does with its meta-batches and with its epochs."""

    selects: bool
    """Trains on b of B sequences outside annealing."""
    scores: bool
    """Chooses by scores, and keeps them."""
    prunes: bool
    """Leaves samples out of epochs, where a pruning ratio is given."""
    budgeted: bool = True
    """Is cut to the budget, where one is given."""
    shortened: bool = False
    """Is cut to the cost of the published run, where no budget is given."""
    placebo: bool = False
    """Permutes weights within the meta-batch, and kept masks within the component."""
    pruner: str | None = None
    """The pruner, whatever the settings say; None: theirs."""


PLAIN = "plain"
"""The arm that trains on everything, which the others are held against."""

ARMS: Mapping[str, Arm] = {
    "es": Arm(selects=True, scores=True, prunes=True),
    PLAIN: Arm(selects=False, scores=False, prunes=False, budgeted=False),
    "uniform": Arm(selects=True, scores=False, prunes=False),
    "uniform-prune": Arm(selects=True, scores=False, prunes=True, pruner="random"),
    "shortened": Arm(selects=False, scores=False, prunes=False, shortened=True),
    "shuffled": Arm(selects=True, scores=True, prunes=True, placebo=True),
}


def arm_of(config: EvolvedSamplingConfig) -> Arm:
    """The arm that the settings name."""
    return ARMS[config.arm]


def published(config: EvolvedSamplingConfig) -> EvolvedSamplingConfig:
    """The same settings as Algorithm 1 has them: Evolved Sampling with a fresh pass over every meta-batch."""
    return dataclasses.replace(config, arm="es", scorer=dataclasses.replace(config.scorer, kind="fresh"))


def prunes(config: EvolvedSamplingConfig) -> bool:
    """Whether a run leaves samples out of its epochs."""
    return arm_of(config).prunes and config.pruning.ratio > 0
