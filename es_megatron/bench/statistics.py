"""Paired differences over seeds and their intervals, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Verdict = Literal["wins", "ties", "loses", "open"]

QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
"""97.5% quantiles of Student's t for 1 .. 30 degrees of freedom."""

NORMAL = 1.959964
FEWEST = 3
"""Paired seeds below which nothing is said."""


class PairedDifference(NamedTuple):
    """An arm minus a reference over the seeds both have, nats per token; below 0 the arm is better."""

    mean: float
    low: float
    """Lower end of the 95% interval; -inf with one seed, and where a loss is not finite."""
    high: float
    """Upper end."""
    seeds: int
    complete: bool = True
    """Whether these are all seeds there are to be: none has failed, none is still to come."""

    @property
    def verdict(self) -> Verdict:
        """`wins` or `loses` where the interval leaves 0 out, else `ties`.

        `open` below three seeds, where some are missing (they may be the hard ones), and where a loss is not finite.
        """
        if self.seeds < FEWEST or not self.complete or not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "open"
        if self.high < 0:
            return "wins"
        return "loses" if self.low > 0 else "ties"


def quantile(freedom: int) -> float:
    """97.5% quantile of Student's t; above 30 degrees of freedom by its expansion around the normal one."""
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    cubed = NORMAL**3
    first = (cubed + NORMAL) / (4 * freedom)
    second = (5 * NORMAL**5 + 16 * cubed + 3 * NORMAL) / (96 * freedom**2)
    return NORMAL + first + second


def paired(arm: Sequence[float], reference: Sequence[float]) -> PairedDifference:
    """Mean difference with its 95% interval.

    Args:
        arm: a loss for each seed.
        reference: losses of the same seeds in the same order.
    """
    difference = np.asarray(arm, np.float64) - np.asarray(reference, np.float64)
    mean, count = float(difference.mean()) if len(difference) else math.nan, len(difference)
    if count < 2:
        return PairedDifference(mean, -math.inf, math.inf, count)
    if not np.isfinite(difference).all():
        return PairedDifference(mean, -math.inf, math.inf, count)
    half = quantile(count - 1) * float(difference.std(ddof=1)) / math.sqrt(count)
    return PairedDifference(mean, mean - half, mean + half, count)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; nan with one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
