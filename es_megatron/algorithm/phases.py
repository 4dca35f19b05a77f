"""Iteration to phase: annealing at both ends, evolving between."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """When a run selects."""

    iterations: int
    anneal: float
    """Share of iterations at each end that train on the whole meta-batch (E_a / E of Algorithm 1)."""
    earliest: int = 0
    """Iteration before which none selects, whatever the share: that of the first full meta-batch."""

    @property
    def annealed(self) -> int:
        """Iterations at each end."""
        return math.ceil(round(self.anneal * self.iterations, 9))

    @property
    def start(self) -> int:
        """First evolving iteration."""
        return min(self.iterations, max(self.earliest, self.annealed))

    @property
    def stop(self) -> int:
        """First iteration of the closing annealing."""
        return max(self.start, self.iterations - self.annealed)

    def evolving(self, iteration: int) -> bool:
        """Whether this iteration selects, and an epoch that begins in it is pruned."""
        return self.start <= iteration < self.stop
