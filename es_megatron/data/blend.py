"""Which component each draw of a blend goes to, in O(log components) per position with nothing stored.

A binary tree over the components. A node that has had n draws has sent floor(n * a) of them to the left, where a is the
left side's share of the node's weight, so draw n goes left exactly if floor((n+1) * a) > floor(n * a). Totals are exact
and never negative. All arithmetic is on integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from es_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]

WEIGHT_UNIT = 1 << 28
MAX_DRAWS = 1 << 34


class Blend:
    """Draws of weighted components, as pure functions of the position."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Build the tree.

        Args:
            weights: share of draws of each component, in any unit, not all 0. They are rounded to 2^-28 of their sum;
                a component with a positive weight keeps at least that much.
        """
        self.components = len(weights)
        self.depth = max(0, (self.components - 1).bit_length())
        whole = np.zeros(1 << self.depth, dtype=np.int64)
        whole[: self.components] = round_weights(weights)
        levels = [whole]
        while len(levels[0]) > 1:
            levels.insert(0, levels[0].reshape(-1, 2).sum(axis=1))
        self._left = [level[::2].copy() for level in levels[1:]]
        self._both = [np.maximum(level, 1) for level in levels[:-1]]

    def locate(self, positions: Int64) -> tuple[Int64, Int64]:
        """Component of each draw and how many draws that component had before.

        Args:
            positions: int64[...], in [0, 2^34).

        Returns:
            Component index and draw number, int64 like `positions`.
        """
        node = np.zeros_like(positions)
        draw = positions.copy()
        for left, both in zip(self._left, self._both, strict=True):
            share, whole = left.take(node), both.take(node)
            scaled = draw * share
            sent = scaled // whole
            scaled += share
            scaled -= sent * whole
            goes_right = scaled < whole  # floor((draw + 1) * a) is no more than floor(draw * a)
            draw = np.where(goes_right, draw - sent, sent)
            node <<= 1
            node += goes_right
        return node, draw

    def counts(self, draws: int) -> Int64:
        """Draws of each component among the first `draws`, int64[C], summing to `draws`."""
        level = np.asarray([draws], dtype=np.int64)
        for left, both in zip(self._left, self._both, strict=True):
            sent = level * left // both
            level = np.stack([sent, level - sent], axis=1).reshape(-1)
        return level[: self.components]

    def position(self, component: int, draw: int) -> int:
        """Position of a component's draw: the inverse of `locate`.

        Raises:
            DataError: the component has weight 0, so it is never drawn.
        """
        position, node = draw, component
        for left, both in zip(reversed(self._left), reversed(self._both), strict=True):
            is_right, node = node % 2, node // 2
            share, whole = int(left[node]), int(both[node])
            side = whole - share if is_right else share
            if side == 0:
                raise DataError(f"Component {component} has weight 0 and is never drawn.")
            position = position * whole // side if is_right else -(-(position + 1) * whole // side) - 1
        return position


def round_weights(weights: Sequence[float]) -> Int64:
    """Weights as integers of unit 2^-28 of their sum, at least 1 where the weight is positive."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    return np.asarray([max(1, round(w * WEIGHT_UNIT / total)) if w > 0 else 0 for w in exact], dtype=np.int64)
