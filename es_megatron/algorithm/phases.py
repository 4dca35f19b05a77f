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

    @property
    def start(self) -> int:
        """First evolving iteration."""
        return min(self.iterations, math.ceil(round(self.anneal * self.iterations, 9)))

    @property
    def stop(self) -> int:
        """First iteration of the closing annealing."""
        return max(self.start, self.iterations - self.start)

    def evolving(self, iteration: int) -> bool:
        """Whether this iteration selects, and an epoch that begins in it is pruned."""
        return self.start <= iteration < self.stop
