"""Losses of a reference model, 4 bytes a sample (or 2), sharded by the same ranges as the scores.

They are static: nothing is staged, and a checkpoint holds their fingerprint alone. What belongs to them and moves is
sums over the visited rows, in integers, so that the order of ranks cannot matter. Shapes: C components.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.margin import ENOUGH, STEEPEST, Against, Moments
from es_megatron.data.manifest import Manifest
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.means import LARGEST, UNIT

Float = npt.NDArray[np.float32] | npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

PRODUCT_UNIT = 1 << 10
"""Products of two losses are summed as integers of this many parts of a square nat."""
LARGEST_FACTOR = 1 << 10
"""Losses above this many nats count as this in products: sums of them would overflow."""
BINS = 1 << 16
BLOCK = 1 << 20
"""Rows that are looked at at a time, so that temporary arrays stay small."""


class ReferenceLosses:
    """Reference losses of this rank's range, and sums that rules of policy `reducible` need."""

    def __init__(self, manifest: Manifest, low: int, value: Float, fingerprint: str) -> None:
        """Take losses over.

        Args:
            manifest: the blend.
            low: first id of the range.
            value: float32[S] or float16[S], nan where there is none.
            fingerprint: of the whole reference, the same on every rank.
        """
        self.manifest, self.low, self.value, self.fingerprint = manifest, low, value, fingerprint
        self.total: Int64 = np.zeros((len(manifest.components), 5), np.int64)
        """int64[C, 5]: visited rows with a reference loss, and the sums of l, h, l h and h h over them."""
        self.known = np.zeros((len(manifest.components), 2), np.int64)
        """int64[C, 2]: rows of all ranks with a reference loss, and the sum of those losses; set by `count_known`."""
        self.ceiling_C: Float64 = np.full(len(manifest.components), np.inf)
        """What `find_ceilings` found."""

    def stored(self, slot: npt.NDArray[np.integer[Any]]) -> Float32:
        """Losses of slots of this rank's range, float32[N]."""
        return self.value.take(slot).astype(np.float32)

    def count_known(self, grid: RankGrid) -> None:
        """Count the losses of all ranks; collective."""
        for component in range(len(self.manifest.components)):
            for held in self._held(component):
                self.known[component] += [len(held), int(units(held, UNIT, LARGEST).sum())]
        self.known = grid.sum_over_dp(self.known)

    def find_ceilings(self, share: float, grid: RankGrid) -> None:
        """Find the loss that `share` of each component's rows lie above, to 1 part in 128; collective."""
        for component in range(len(self.ceiling_C)):
            bins = np.zeros(BINS, np.int64)
            for held in self._held(component):
                # Losses sort like their bits, so that a histogram over the upper half of them gives the quantile.
                bins += np.bincount(held.view(np.uint32) >> np.uint32(16), minlength=BINS)
            upto = np.cumsum(grid.sum_over_dp(bins))
            if upto[-1]:
                place = int(np.searchsorted(upto, np.ceil((1 - share) * upto[-1])))
                # The upper edge of the bin: what lies in it is not above it.
                self.ceiling_C[component] = np.asarray([place << 16 | 0xFFFF], np.uint32).view(np.float32)[0]

    def against(self, reference: Float32, component: Int64, moments: Moments) -> Against:
        """What some samples are held against.

        Args:
            reference: float32[N], their reference losses.
            component: int64[N].
            moments: of all ranks.
        """
        return Against(reference, component, moments, self.ceiling_C, self.missing)

    def add(self, component: Int64 | int, slot: Int64, before: Float32 | None, now: Float32) -> None:
        """Put visited rows into the sums, or move them there.

        Args:
            component: of each row, or of all.
            slot: int64[N], their places in this rank's range, each standing once.
            before: float32[N], used scores so far, nan where not visited before; None: nothing was.
            now: float32[N], used scores from now on.
        """
        reference = self.stored(slot)
        held = np.flatnonzero(np.isfinite(reference))
        if len(held) == 0:
            return
        rows = _terms(now[held], reference[held])
        if before is not None:
            rows -= np.where(np.isfinite(before[held])[:, None], _terms(before[held], reference[held]), 0)
        which = np.broadcast_to(np.asarray(component), reference.shape)[held]
        np.add.at(self.total, which, rows)

    def forget(self) -> None:
        """Start the sums anew."""
        self.total[:] = 0

    def moments(self, total: npt.NDArray[Any]) -> Moments:
        """Means of sums over all ranks.

        Args:
            total: `total` of all ranks together, [C, 5]; float64 will do, which is exact below 2^53.
        """
        wide = total.astype(np.float64)
        scale = np.asarray([1, UNIT, UNIT, PRODUCT_UNIT, PRODUCT_UNIT], np.float64)
        count_C, loss_C, own_C, product_C, square_C = (wide / scale).T
        safe_C = np.maximum(count_C, 1)
        mean_loss_C, mean_C = loss_C / safe_C, own_C / safe_C
        spread_C = square_C - count_C * mean_C**2
        joint_C = product_C - count_C * mean_loss_C * mean_C
        fitted = (count_C >= ENOUGH) & (spread_C > 1e-6 * count_C)
        slope_C = np.where(fitted, np.clip(joint_C / np.where(fitted, spread_C, 1), 0, STEEPEST), 1.0)
        usual_loss = loss_C.sum() / max(1.0, count_C.sum())
        known_C = self.known[:, 0]
        usual_C = self.known[:, 1] / (np.maximum(known_C, 1) * UNIT)
        usual_C = np.where(known_C > 0, usual_C, self.known[:, 1].sum() / (max(1, known_C.sum()) * UNIT))
        seen = count_C > 0
        return Moments(count_C, np.where(seen, mean_loss_C, usual_loss), np.where(seen, mean_C, usual_C), slope_C)

    @property
    def missing(self) -> Bool:
        """Components of which no row has a reference loss, bool[C]."""
        return self.known[:, 0] == 0

    def _held(self, component: int) -> Iterator[Float32]:
        """Losses of this rank's rows of a component that have one, block by block."""
        first, end = self.manifest.offsets[component : component + 2].tolist()
        low, high = (min(max(each - self.low, 0), len(self.value)) for each in (first, end))
        for start in range(low, high, BLOCK):
            value = self.value[start : min(start + BLOCK, high)].astype(np.float32, copy=False)
            yield value[np.isfinite(value)]


def units(loss: Float32, unit: int, largest: float) -> Int64:
    """Losses in integer units; what no loss can be is held within `largest`."""
    return np.rint(np.minimum(loss.astype(np.float64), largest) * unit).astype(np.int64)


def _terms(loss: Float32, reference: Float32) -> Int64:
    """What one row adds to the sums, int64[N, 5]; 0 where it was not visited (nan)."""
    loss = np.nan_to_num(loss, nan=0.0)
    wide = [np.minimum(each.astype(np.float64), LARGEST_FACTOR) for each in (loss, reference)]
    products = [np.rint(wide[0] * wide[1] * PRODUCT_UNIT), np.rint(wide[1] ** 2 * PRODUCT_UNIT)]
    one = np.ones(len(loss), np.int64)
    sums = [units(loss, UNIT, LARGEST), units(reference, UNIT, LARGEST)]
    return np.stack([one, *sums, *(each.astype(np.int64) for each in products)], axis=1)
