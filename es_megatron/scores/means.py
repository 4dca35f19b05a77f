"""Mean score of each component, in integers, so that the order of ranks cannot matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

UNIT = 1 << 20
"""Scores are summed as integers of this many parts of a nat."""
LARGEST = float(1 << 20)
"""Scores above this many nats, which only somebody else's can be, count as this: sums of them would overflow."""


class ComponentSums:
    """Sums of this rank's used scores by component, kept up to date; C components."""

    def __init__(self, components: int, start: float) -> None:
        """Start with nothing seen.

        Args:
            components: how many, C.
            start: the mean where no sample of any component is seen, 1/n.
        """
        self.start = start
        self.total: Int64 = np.zeros((components, 2), dtype=np.int64)
        """int64[C, 2]: used scores of the seen samples in units of `UNIT`, and how many they are."""

    def count(self, component: int, used: Float32) -> None:
        """Add seen samples of one component."""
        self.total[component] += [int(units(used).sum()), len(used)]

    def replace(self, component: Int64, before: Float32, now: Float32, seen: Bool) -> None:
        """Replace used scores of samples, each standing once.

        Args:
            component: int64[N], of each sample.
            before: float32[N], used scores so far; ignored where not seen.
            now: float32[N], used scores from now on.
            seen: bool[N], whether a sample had been seen before.
        """
        change = units(now) - np.where(seen, units(before), 0)
        self.total[:, 0] += self._by_component(component, change)
        self.total[:, 1] += self._by_component(component, ~seen)

    def means(self, total: npt.NDArray[Any]) -> Float32:
        """Means of sums over all ranks; the mean of all components where nothing of one is seen.

        Args:
            total: `total` of all ranks together, [C, 2]; float64 will do, which is exact below 2^53.

        Returns:
            float32[C].
        """
        score, seen = total.sum(axis=0)
        usual = score / (seen * UNIT) if seen > 0 else self.start
        mean = total[:, 0] / (np.maximum(total[:, 1], 1) * UNIT)
        return np.where(total[:, 1] > 0, mean, usual).astype(np.float32)

    def _by_component(self, component: Int64, amount: npt.NDArray[Any]) -> Int64:
        # bincount adds in float64: whole numbers below 2^53 stay exact
        return np.bincount(component, amount, len(self.total)).astype(np.int64)


def units(used: Float32) -> Int64:
    """Used scores in integer units; what no loss can be is held within `LARGEST`."""
    return np.rint(np.minimum(used.astype(np.float64), LARGEST) * UNIT).astype(np.int64)
