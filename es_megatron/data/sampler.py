"""The meta-batch of an iteration: a pure function of (manifest, seed, kept masks, skipped rows, position).

The place of a skipped row is taken by the row half an epoch away from it in the order of that epoch, which so comes
twice: every epoch keeps its length, and with it the plan of the run and the mixture.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.randomness import component_key
from es_megatron.data.mask import KeptMask, select_of_many
from es_megatron.data.permutation import EpochOrder, Orders
from es_megatron.data.schedule import DrawPlaces, Schedule
from es_megatron.errors import ConfigError

Int64 = npt.NDArray[np.int64]

PIECE = 1 << 15
"""Positions worked on at a time, so that what they need in between stays in the cache."""
EPOCH_BITS = 35
"""Positions are below 2^34, and so are numbers of epochs."""


class MetaBatch(NamedTuple):
    """The samples of one iteration, by position; arrays are int64[B]."""

    iteration: int
    component: Int64
    epoch: Int64
    row: Int64
    id: Int64

    @property
    def positions(self) -> Int64:
        """All of them, int64[B]."""
        return np.arange(len(self.id))


class Sampler:
    """Serves any meta-batch by its iteration; its state is the kept masks of open epochs, and the skipped rows."""

    def __init__(self, schedule: Schedule, seed: int) -> None:
        """Start with no mask.

        Args:
            schedule: where epochs begin.
            seed: of the order.
        """
        self.schedule = schedule
        self.manifest = schedule.manifest
        self.seed = seed
        self.masks: dict[tuple[int, int], KeptMask] = {}
        self.skipped: Int64 = np.zeros(0, np.int64)
        """Ids that are never drawn, fewer of each component than an epoch has draws."""
        self._sizes: list[int] = self.manifest.sizes.tolist()
        self._orders = Orders(seed, [component_key(component.name) for component in self.manifest.components])

    def batch(self, iteration: int) -> MetaBatch:
        """The meta-batch of an iteration.

        Raises:
            ConfigError: it needs the mask of an epoch that is not decided yet.
        """
        size = self.schedule.ramp.size(iteration)
        first = self.schedule.position(iteration)
        positions = np.arange(first, first + size, dtype=np.int64)
        component, epoch, row = self.rows(positions)
        return MetaBatch(iteration, component, epoch, row, self.manifest.sample_ids(component, row))

    def rows(self, positions: Int64) -> tuple[Int64, Int64, Int64]:
        """Component, epoch and row at each position, three int64 arrays like `positions`."""
        flat = positions.reshape(-1)
        found = [np.empty_like(flat) for _ in range(3)]
        for start in range(0, len(flat), PIECE):
            for whole, part in zip(found, self._rows(flat[start : start + PIECE]), strict=True):
                whole[start : start + PIECE] = part
        self._orders.forget()
        component, epoch, row = (part.reshape(positions.shape) for part in found)
        return component, epoch, row

    def forget(self, iteration: int) -> None:
        """Drop the masks of epochs that end before this iteration."""
        draws = self.schedule.draws(iteration)
        for component, epoch in list(self.masks):
            if self.schedule.epochs.start(component, epoch + 1) <= draws[component]:
                del self.masks[component, epoch]

    def _rows(self, positions: Int64) -> tuple[Int64, Int64, Int64]:
        """The same for so many positions as fit the cache."""
        component, draw = self.schedule.blend.locate(positions)
        epoch, index, pruned = place = self.schedule.epochs.place(component, draw)
        row = self._rows_of(component, place)
        if not len(self.skipped):
            return component, epoch, row
        epochs, away = self.schedule.epochs, 0
        at = np.arange(len(row))
        while len(at := at[np.isin(self.manifest.sample_ids(component[at], row[at]), self.skipped)]):
            length = np.where(pruned[at], epochs.kept[component[at]], epochs.full[component[at]])
            other = (index[at] + length // 2 + away) % length
            row[at] = self._rows_of(component[at], DrawPlaces(epoch[at], other, pruned[at]))
            away += 1
        return component, epoch, row

    def _rows_of(self, component: Int64, place: DrawPlaces) -> Int64:
        """Rows at places of epochs of components, epoch by epoch."""
        epoch, index, pruned = place
        code = component << EPOCH_BITS | epoch
        order = np.argsort(code, kind="stable")
        code = code.take(order)
        starts = np.flatnonzero(np.concatenate([[True], code[1:] != code[:-1]]))
        first = order.take(starts)
        lengths = np.diff(starts, append=len(code))
        groups = zip(component.take(first).tolist(), epoch.take(first).tolist(), pruned.take(first), strict=True)
        masks = [(c, e, self._mask_of(c, e) if p else None) for c, e, p in groups]
        wanted = [EpochOrder(c, e, self._sizes[c] if mask is None else mask.count) for c, e, mask in masks]
        found = self._orders(wanted, lengths, index.take(order))
        select_of_many([mask for _, _, mask in masks], lengths, found)
        row = np.empty_like(found)
        row[order] = found
        return row

    def _mask_of(self, component: int, epoch: int) -> KeptMask:
        mask = self.masks.get((component, epoch))
        if mask is None:
            raise ConfigError(
                f"Epoch {epoch} of component `{self.manifest.components[component].name}` is drawn before its "
                "kept mask is decided. Set `mask_lag` to at least the iterations that the data loader prefetches, "
                "plus 1."
            )
        return mask
