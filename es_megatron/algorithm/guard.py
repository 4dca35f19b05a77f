"""What a weighted choice is worth, to tell when selection does not pay (Katharopoulos & Fleuret 2018, section 3.3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def equivalent_batch(weight: npt.NDArray[np.floating]) -> float:
    """How many times more uniform samples would lower the variance of the gradient as much as drawing by weight.

    With probabilities g = w / sum(w) this is tau = 1 / sqrt(1 - |g - 1/B|^2 / |g|^2) = sqrt(B |g|^2), where weights
    stand for gradient norms: 1 where they are all equal, 0 included.

    Args:
        weight: float[B], >= 0.
    """
    total = weight.sum(dtype=np.float64)
    if total <= 0:
        return 1.0
    share = weight.astype(np.float64) / total
    return float(np.sqrt(len(share) * (share**2).sum()))


def smooth(average: float, count: int, value: float, window: int) -> float:
    """Go on with an average: the mean of the first `window` values, then exponential with decay 1 - 1/window."""
    return average + (value - average) / min(count + 1, window)
