"""The meta-batch of an iteration: a pure function of (manifest, seed, kept masks, position)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.randomness import component_key
from es_megatron.data.mask import KeptMask
from es_megatron.data.permutation import Permutation, permutation
from es_megatron.data.schedule import Schedule
from es_megatron.errors import ConfigError

Int64 = npt.NDArray[np.int64]

CACHED_PERMUTATIONS = 4096


class MetaBatch(NamedTuple):
    """The samples of one iteration, by position; arrays are int64[B]."""

    iteration: int
    component: Int64
    epoch: Int64
    row: Int64
    id: Int64


class Sampler:
    """Serves any meta-batch by its iteration; its only state is the kept masks of the epochs that are open."""

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
        self._keys = [component_key(component.name) for component in self.manifest.components]
        self._permutation = lru_cache(CACHED_PERMUTATIONS)(self._make_permutation)

    def batch(self, iteration: int) -> MetaBatch:
        """The meta-batch of an iteration.

        Raises:
            ConfigError: it needs the mask of an epoch that is not decided yet.
        """
        size = self.schedule.meta_batch
        positions = np.arange(iteration * size, (iteration + 1) * size, dtype=np.int64)
        component, epoch, row = self.rows(positions)
        return MetaBatch(iteration, component, epoch, row, self.manifest.sample_ids(component, row))

    def rows(self, positions: Int64) -> tuple[Int64, Int64, Int64]:
        """Component, epoch and row at each position, three int64 arrays like `positions`."""
        component, draw = self.schedule.blend.locate(positions)
        place = self.schedule.epochs.place(component, draw)
        row = np.empty_like(draw)
        order = np.lexsort((place.epoch, component))
        key = np.stack([component[order], place.epoch[order]])
        starts = np.flatnonzero(np.concatenate([[True], (key[:, 1:] != key[:, :-1]).any(axis=0)]))
        for part in np.split(order, starts[1:]) if len(order) else []:
            at = part[0]
            row[part] = self._rows_of_epoch(
                int(component[at]), int(place.epoch[at]), place.index[part], bool(place.pruned[at])
            )
        return component, place.epoch, row

    def forget(self, iteration: int) -> None:
        """Drop the masks of epochs that end before this iteration."""
        draws = self.schedule.blend.counts(iteration * self.schedule.meta_batch)
        for component, epoch in list(self.masks):
            if self.schedule.epochs.start(component, epoch + 1) <= draws[component]:
                del self.masks[component, epoch]

    def _rows_of_epoch(self, component: int, epoch: int, index: Int64, pruned: bool) -> Int64:
        if not pruned:
            return self._permutation(component, epoch, int(self.manifest.sizes[component]))(index)
        mask = self.masks.get((component, epoch))
        if mask is None:
            raise ConfigError(
                f"Epoch {epoch} of component `{self.manifest.components[component].name}` is drawn before its "
                "kept mask is decided. Set `mask_lag` to at least the iterations that the data loader prefetches, "
                "plus 1."
            )
        return mask.select(self._permutation(component, epoch, mask.count)(index))

    def _make_permutation(self, component: int, epoch: int, size: int) -> Permutation:
        return permutation(size, self.seed, self._keys[component], epoch)
