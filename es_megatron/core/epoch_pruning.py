"""Kept masks of pruned epochs: what a pruner makes of the scores of a component, exactly, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.evolution import raise_to_floor
from es_megatron.algorithm.margin import Moments
from es_megatron.algorithm.policies import POLICIES
from es_megatron.algorithm.pruners import PRUNERS, Block, kept_count
from es_megatron.algorithm.randomness import Purpose, component_key, uniforms
from es_megatron.data.mask import KeptMask
from es_megatron.data.permutation import permutation
from es_megatron.scores.mask_memory import MaskMemory
from es_megatron.scores.store import BLOCK, ScoreStore
from es_megatron.scores.threshold import mark_kept, sample_count
from es_megatron.scoring import arm_of

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

GATHERED_BYTES = 1 << 24
"""Bytes of a mask that the ranks join at a time."""


class StandIn(NamedTuple):
    """Weight of kept samples that represent those that were left out."""

    threshold: float
    """Of those whose used score is below this."""
    factor: float
    """What their losses are multiplied by."""


class Scale(NamedTuple):
    """What scores of a component are measured against."""

    unseen: float
    """What an unseen sample counts as."""
    mean: float
    """Mean used score of the seen samples; 0 where neither floor nor pruner refers to it."""
    moments: Moments | None = None
    """Of all components, where the pruner looks at what is left to learn."""


class Rows(NamedTuple):
    """What is known of rows of a component."""

    score: Float32
    visits: UInt8
    uniform: Float64
    reference: Float32 | None
    """Reference losses, where the pruner looks at what is left to learn."""


class EpochPruning:
    """Decides which samples of a component an epoch keeps (Algorithm 1, the pruning line)."""

    def __init__(self, store: ScoreStore) -> None:
        """Make the pruner of the store's settings.

        Raises:
            ConfigError: no such pruner or option.
        """
        config = store.config
        self.store, self.config, self.grid = store, config, store.grid
        self.arm = arm_of(config)
        pruning = config.pruning
        named = (pruning.pruner, pruning.options) if self.arm.pruner is None else (self.arm.pruner, {})
        self.pruner = PRUNERS.make(*named)
        policy = POLICIES.make(config.selection.policy, config.policy_options)
        self._judge = policy if policy.needs_reference and self.pruner.takes_margin else None
        self.unvisited_as_mean = True
        """Whether a row that was never visited counts as its component's mean; False: as 1/n, as versions before did
        with raw scores, so that all of them were left out."""
        self.masks = MaskMemory(config.order.mask_folder, store.grid)

    def prune(self, component: int, epoch: int) -> KeptMask:
        """Keep m_c of a component's samples by the pruner's keys; collective.

        The same mask whatever the number of ranks: keys depend on the seed, component, epoch and row alone, and the
        smallest m_c of all ranks are found exactly.
        """
        samples = int(self.store.manifest.sizes[component])
        low, high = self.store.rows(component)
        scale = self._scale(component)
        kept = mark_kept(
            lambda: self._keys(component, epoch, scale),
            high - low,
            samples,
            kept_count(samples, self.config.pruning.ratio),
            self._sample_keys(component, epoch, scale),
            self.grid,
            low % 8,
        )
        pieces = self._joined(kept, low // 8, samples)
        if self.arm.placebo:
            pieces = self._permuted(MaskMemory(None, self.grid).build(pieces, samples), component, epoch)
        return self.masks.build(pieces, samples)

    def stand_in(self, component: int) -> StandIn | None:
        """What kept samples below the mean weigh if the component is pruned now, where the pruner rescales; collective.

        Those below are as many times more as are kept of them (Qin et al. 2024: 1 / (1 - r)).
        """
        if not self.pruner.rescales:
            return None
        scale = self._scale(component)
        own = sum(
            int(np.count_nonzero(self._weight(score, visits, scale) < np.float32(scale.mean)))
            for score, visits, _ in self.store.blocks(component)
        )
        below = int(self.grid.sum_over_dp(np.asarray([own], dtype=np.int64))[0])
        samples = int(self.store.manifest.sizes[component])
        kept_below = below - (samples - kept_count(samples, self.config.pruning.ratio))
        return StandIn(float(np.float32(scale.mean)), below / kept_below if kept_below > 0 else 1.0)

    def _scale(self, component: int) -> Scale:
        moments, reference = None, self.store.reference
        if self._judge is not None and reference is not None:
            moments = reference.moments(self.grid.sum_over_dp(reference.total))
        floor = self.config.selection.weight_floor
        raw = self.config.correction == "paper" and not self.unvisited_as_mean
        if raw and floor == 0 and not self.pruner.needs_mean:
            return Scale(0.0, 0.0, moments)  # no collective for what nobody refers to
        mean = float(self.store.component_means()[component])
        return Scale(mean, mean, moments)

    def _weight(self, score: Float32, visits: UInt8, scale: Scale) -> Float32:
        """Scores as pruning uses them, above 0."""
        used = self.store.usable(score, visits, scale.unseen)
        if self.unvisited_as_mean and self.config.correction == "paper":  # `usable` does so where scores are debiased
            used = np.where(visits == 0, np.float32(scale.unseen), used)
        weight = np.maximum(used, np.finfo(np.float32).tiny)
        return raise_to_floor(weight, self.config.selection.weight_floor, scale.mean)

    def _key(self, rows: Rows, component: int, epoch: int, scale: Scale) -> Float64:
        weight, margin = self._weight(rows.score, rows.visits, scale), None
        if self._judge is not None and rows.reference is not None and scale.moments is not None:
            assert self.store.reference is not None
            which = np.full(len(weight), component, dtype=np.int64)
            against = self.store.reference.against(rows.reference, which, scale.moments)
            margin = self._judge.margin(weight.astype(np.float64), against)
        return self.pruner.keys(Block(weight, rows.visits, rows.uniform, scale.mean, epoch, margin))

    def _keys(self, component: int, epoch: int, scale: Scale) -> Iterator[Float64]:
        """Keys of this rank's samples, block by block."""
        name = component_key(self.store.manifest.components[component].name)
        first, judged = int(self.store.manifest.offsets[component]), scale.moments is not None
        for score, visits, row in self.store.blocks(component):
            uniform = uniforms(self.config.seed, Purpose.PRUNE, name, epoch, row, len(score))
            ids = range(first + row, first + row + len(score))
            reference = self.store.stored_reference(np.asarray(ids, np.int64)) if judged else None
            yield self._key(Rows(score, visits, uniform, reference), component, epoch, scale)

    def _sample_keys(self, component: int, epoch: int, scale: Scale) -> Float64:
        """Keys of the same evenly spread rows on every rank; they only narrow the search."""
        manifest = self.store.manifest
        samples = int(manifest.sizes[component])
        rows = np.unique(np.linspace(0, samples - 1, sample_count(samples)).astype(np.int64))
        ids = manifest.sample_ids(component, rows)
        score, visits = self.store.stored(ids)
        known = [score, visits.astype(np.float32)]
        if scale.moments is not None:
            known.append(self.store.stored_reference(ids))
        score, visits, *rest = self.grid.sum_over_dp(np.stack(known))
        uniform = uniforms(self.config.seed, Purpose.PRUNE, component + 1, epoch, samples, len(rows))
        found = Rows(score, visits.astype(np.uint8), uniform, rest[0] if rest else None)
        return self._key(found, component, epoch, scale)

    def _joined(self, kept: UInt8, first: int, samples: int) -> Iterator[UInt8]:
        """Join the parts of all data-parallel ranks, piece by piece; model-parallel rank 0's word counts.

        Args:
            kept: this rank's packed bits.
            first: byte of the component's mask that they begin in; neighbours may share it.
            samples: rows of the component.
        """
        size = -(-samples // 8)
        for start in range(0, size, GATHERED_BYTES):
            piece = np.zeros(min(GATHERED_BYTES, size - start), dtype=np.uint8)
            low, high = max(start, first), min(start + len(piece), first + len(kept))
            if low < high:
                piece[low - start : high - start] = kept[low - first : high - first]
            yield self.grid.broadcast_over_mp(self.grid.sum_over_dp(piece), 0)

    def _permuted(self, mask: KeptMask, component: int, epoch: int) -> Iterator[UInt8]:
        """The placebo: the same mask for other rows, as if scores had been permuted within the component."""
        name = component_key(self.store.manifest.components[component].name)
        order = permutation(mask.samples, self.config.seed, name, epoch, Purpose.SHUFFLE_MASK)
        for row in range(0, mask.samples, BLOCK):
            rows = np.arange(row, min(row + BLOCK, mask.samples), dtype=np.int64)
            yield np.packbits(mask.contains(order(rows)), bitorder="little")
