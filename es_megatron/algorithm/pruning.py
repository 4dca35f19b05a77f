"""How many samples an epoch keeps, and the race that keeps them (Algorithm 1, the pruning line)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.selection import race_keys

Bool = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]


def kept_count(samples: int, ratio: float) -> int:
    """m = ceil((1 - r) * n), exactly: r is read as the decimal that was written, so 0.2 of 10 keeps 8 and not 9."""
    return -((Fraction(str(ratio)) - 1) * samples // 1)


def prune(weight: npt.NDArray[np.floating], uniform: Float64, count: int) -> Bool:
    """Reference race over a whole component in memory; the sharded store finds the same set without gathering it.

    Args:
        weight: float[n], > 0.
        uniform: float64[n] in (0, 1).
        count: samples to keep.

    Returns:
        bool[n], `count` of them true; ties go to the lower row.
    """
    kept = np.zeros(len(weight), dtype=np.bool_)
    kept[np.argsort(race_keys(weight, uniform), kind="stable")[:count]] = True
    return kept
