"""The sharded score store: 5 bytes a sample, each sample on one data-parallel rank.

A rank holds the scores of one contiguous range of ids, and its tensor- and pipeline-parallel peers hold equal copies.
`evolve` stages what a meta-batch changes and `commit` writes it, so a step that is skipped, or run twice, leaves no
trace.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.evolution import MAX_VISITS, evolve, raise_to_floor, usable_scores
from es_megatron.algorithm.ownership import owned_range
from es_megatron.algorithm.pruners import PRUNERS, Block
from es_megatron.algorithm.pruning import kept_count
from es_megatron.algorithm.randomness import Purpose, component_key, uniforms
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.data.manifest import Manifest
from es_megatron.data.mask import KeptMask
from es_megatron.data.permutation import permutation
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.mask_memory import MaskMemory
from es_megatron.scores.threshold import mark_kept, sample_count

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

T = TypeVar("T", np.float32, np.uint8)

BLOCK = 1 << 16
GATHERED_BYTES = 1 << 24
"""Bytes of a mask that the ranks join at a time."""
SUM_UNIT = 1 << 20
"""Scores are summed as integers of this many parts of a nat, so that the order of ranks cannot matter."""
LARGEST_SUMMED = float(1 << 20)
"""Scores above this many nats, which only somebody else's can be, count as this in sums, which would overflow."""


class Lookup(NamedTuple):
    """Scores of a meta-batch before its update; arrays of length B."""

    score: Float32
    visits: UInt8
    means: Float32 | None = None
    """`component_means` at that moment, where they came along."""


class Staged(NamedTuple):
    """An update of this rank's samples that waits for its optimizer step."""

    iteration: int
    ids: Int64
    score: Float32


class StandIn(NamedTuple):
    """Weight of kept samples that stand for those that were left out."""

    threshold: float
    """Of those whose used score is below this."""
    factor: float
    """What their losses are multiplied by."""


class ScoreStore:
    """Scores and visits of this rank's range, and the collectives that make the ranges one store."""

    def __init__(self, manifest: Manifest, config: EvolvedSamplingConfig, grid: RankGrid) -> None:
        """Allocate this rank's range; untouched pages cost nothing until their first visit.

        Args:
            manifest: the blend.
            config: beta1, beta2, correction, floor, seed.
            grid: this rank's place.
        """
        self.manifest, self.config, self.grid = manifest, config, grid
        self.low, self.high = owned_range(manifest.total, grid.dp_rank, grid.dp_size)
        self.score: Float32 = allocate(self.high - self.low, np.float32, config.score_folder)
        self.visits: UInt8 = allocate(self.high - self.low, np.uint8, config.score_folder)
        self.masks = MaskMemory(config.mask_folder, grid)
        random = config.arm == "uniform-prune"
        self.pruner = PRUNERS.make("random" if random else config.pruner, () if random else config.pruner_options)
        self.start = 1.0 / manifest.total
        self._sums: Int64 = np.zeros((len(manifest.components), 2), dtype=np.int64)
        self._staged: Staged | None = None

    def lookup_local(self, ids: Int64) -> Lookup:
        """Stored scores of the ids this rank owns, 0 for the others: summed over ranks that is the whole lookup."""
        mine = np.flatnonzero((ids >= self.low) & (ids < self.high))
        slot = ids.take(mine) - self.low
        score, visits = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.uint8)
        score[mine], visits[mine] = self.score.take(slot), self.visits.take(slot)
        return Lookup(score, visits)

    def exchange(self, ids: Int64, loss: Float32) -> tuple[Lookup, Float32]:
        """Share losses and look scores up, in one collective over the data-parallel ranks.

        Args:
            ids: int64[B], the meta-batch.
            loss: float32[B], this rank's losses at its own positions, 0 elsewhere.

        Returns:
            Scores before the update and all losses, the same on every rank.
        """
        local = self.lookup_local(ids)
        packed = np.stack([local.score, local.visits.astype(np.float32), loss])
        if self.config.correction == "paper":
            score, visits, losses = self.grid.sum_over_dp(packed)
            return Lookup(score, visits.astype(np.uint8)), losses
        # The sums that means are made of come along: float64 holds whole numbers exactly up to 2^53.
        wide = np.concatenate([packed.reshape(-1), self._sums.reshape(-1)], dtype=np.float64)
        wide = self.grid.sum_over_dp(wide)
        score, visits, losses = wide[: packed.size].reshape(packed.shape).astype(np.float32)
        means = self._means_of(wide[packed.size :].reshape(self._sums.shape))
        return Lookup(score, visits.astype(np.uint8), means), losses

    def usable(self, component: Int64, found: Lookup) -> Float32:
        """Scores as they are used for choosing, float32[B]; unseen ones count as `usable_scores` says."""
        if self.config.correction == "paper":
            return self._usable(found.score, found.visits, 0.0)
        means = self.component_means() if found.means is None else found.means
        return self._usable(found.score, found.visits, means[component])

    def evolve(self, iteration: int, ids: Int64, found: Lookup, used: Float32, loss: Float32) -> Float32:
        """Stage new scores of a meta-batch and return its sampling weights (eq. 2.5).

        A sample that stands twice evolves once, at its lowest position. Staging again replaces what was staged.

        Args:
            iteration: the iteration this belongs to.
            ids: int64[B].
            found: `exchange`'s lookup.
            used: `usable`'s scores.
            loss: float32[B]; a non-finite one changes nothing.

        Returns:
            float32[B], 0 where the loss is not finite.
        """
        old = np.where(found.visits == 0, np.float32(self.start), found.score)
        evolved = evolve(loss, old, used, self.config.beta1, self.config.decay)
        own = np.flatnonzero(np.isfinite(loss) & (ids >= self.low) & (ids < self.high))
        unique, first = np.unique(ids[own], return_index=True)
        self._staged = Staged(iteration, unique, evolved.score_B[own[first]])
        return evolved.weight_B

    def commit(self, iteration: int) -> None:
        """Write what was staged for this iteration, once its optimizer step has succeeded."""
        staged, self._staged = self._staged, None
        if staged is None or staged.iteration != iteration:
            return
        slot = staged.ids - self.low
        component, _ = self.manifest.locate(staged.ids)
        visits = self.visits[slot]
        before = np.where(visits > 0, self._units(self.score[slot], visits), 0)
        now = np.minimum(visits, MAX_VISITS - 1) + 1
        self._sums[:, 0] += self._by_component(component, self._units(staged.score, now) - before)
        self._sums[:, 1] += self._by_component(component, visits == 0)
        self.score[slot], self.visits[slot] = staged.score, now

    def discard(self) -> None:
        """Forget what was staged: the step was skipped."""
        self._staged = None

    def component_means(self) -> Float32:
        """Mean used score of the seen samples of each component, float32[C]; of all components where none is seen."""
        return self._means_of(self.grid.sum_over_dp(self._sums))

    def _means_of(self, total: npt.NDArray[Any]) -> Float32:
        score, seen = total.sum(axis=0)
        usual = score / (seen * SUM_UNIT) if seen > 0 else self.start
        mean = total[:, 0] / (np.maximum(total[:, 1], 1) * SUM_UNIT)
        return np.where(total[:, 1] > 0, mean, usual).astype(np.float32)

    def seen(self) -> Int64:
        """Samples of each component that have a score, int64[C], the same on every rank; collective."""
        return self.grid.sum_over_dp(self._sums)[:, 1]

    def prune(self, component: int, epoch: int) -> KeptMask:
        """Keep m_c of a component's samples, drawn without replacement by their scores (Algorithm 1).

        The same mask whatever the number of ranks: keys depend on the seed, component, epoch and row alone, and the
        smallest m_c of all ranks are found exactly.
        """
        samples = int(self.manifest.sizes[component])
        count = kept_count(samples, self.config.pruning_ratio)
        low, high = self._range(component)
        unseen, mean = self._prune_scale(component)
        kept = mark_kept(
            lambda: self._keys(component, epoch, unseen, mean),
            high - low,
            samples,
            count,
            self._sample_keys(component, epoch, unseen, mean),
            self.grid,
            low % 8,
        )
        pieces = self._gather(kept, low // 8, samples)
        if self.config.arm == "shuffled":
            pieces = self._shuffled(MaskMemory(None, self.grid).build(pieces, samples), component, epoch)
        return self.masks.build(pieces, samples)

    def stand_in(self, component: int) -> StandIn | None:
        """What kept samples below the mean weigh if the component is pruned now, where the pruner rescales; collective.

        Those below are as many times more as are kept of them (Qin et al. 2024: 1 / (1 - r)).
        """
        if not self.pruner.rescales:
            return None
        unseen, mean = self._prune_scale(component)
        own = sum(
            int(np.count_nonzero(self._weight(score, visits, unseen, mean) < np.float32(mean)))
            for score, visits, _ in self._blocks(component)
        )
        below = int(self.grid.sum_over_dp(np.asarray([own], dtype=np.int64))[0])
        samples = int(self.manifest.sizes[component])
        kept_below = below - (samples - kept_count(samples, self.config.pruning_ratio))
        return StandIn(float(np.float32(mean)), below / kept_below if kept_below > 0 else 1.0)

    def checksum(self) -> int:
        """CRC-32 of this rank's scores and visits; copies across tensor and pipeline ranks agree."""
        return zlib.crc32(self.visits.data, zlib.crc32(self.score.data))

    def load(self, score: Float32, visits: UInt8) -> None:
        """Take over this rank's range from a checkpoint: the arrays become the store's own, without a copy.

        Raises:
            CheckpointError: the arrays are not of this rank's range.
        """
        if len(score) != len(self.score) or len(visits) != len(self.visits):
            raise CheckpointError(
                f"The scores must cover {len(self.score)} samples of rank {self.grid.dp_rank}, but cover "
                f"{len(score)} instead. Load them for this run's data and data-parallel size."
            )
        if self.config.score_folder is None:
            self.score = np.require(score, np.float32, ["C", "W"])
            self.visits = np.require(visits, np.uint8, ["C", "W"])
        else:
            self.score[:], self.visits[:] = score, visits
        self._staged = None
        self._sums[:] = 0
        for component in range(len(self._sums)):
            for row_score, row_visits, _ in self._blocks(component):
                self._sums[component] += self._sum(row_score, row_visits)

    def _sum(self, score: Float32, visits: UInt8) -> Int64:
        """Used scores of the seen samples in integer units, and how many they are: int64[2]."""
        seen = visits > 0
        return np.asarray([self._units(score[seen], visits[seen]).sum(), np.count_nonzero(seen)], dtype=np.int64)

    def _units(self, score: Float32, visits: UInt8) -> Int64:
        """Used scores of seen samples in integer units; what no loss can be is held within them."""
        used = np.minimum(self._usable(score, visits, 0.0).astype(np.float64), LARGEST_SUMMED)
        return np.rint(used * SUM_UNIT).astype(np.int64)

    def _by_component(self, component: Int64, amount: npt.NDArray[Any]) -> Int64:
        """Sums of whole numbers by component, int64[C]; below 2^53 they are exact."""
        return np.bincount(component, amount, len(self._sums)).astype(np.int64)

    def _usable(self, score: Float32, visits: UInt8, unseen: float | Float32) -> Float32:
        return usable_scores(score, visits, self.config.decay, self.start, self.config.correction, unseen)

    def _range(self, component: int) -> tuple[int, int]:
        """Rows of a component that this rank owns, half-open."""
        begin, end = int(self.manifest.offsets[component]), int(self.manifest.offsets[component + 1])
        low, high = max(self.low, begin) - begin, min(self.high, end) - begin
        return (low, high) if low < high else (0, 0)

    def _blocks(self, component: int) -> Iterator[tuple[Float32, UInt8, int]]:
        """Scores, visits and first row of this rank's part of a component, block by block."""
        low, high = self._range(component)
        shift = int(self.manifest.offsets[component]) - self.low
        for row in range(low, high, BLOCK):
            part = slice(row + shift, min(row + BLOCK, high) + shift)
            yield self.score[part], self.visits[part], row

    def _prune_scale(self, component: int) -> tuple[float, float]:
        """What an unseen sample counts as, and the mean that the floor refers to."""
        if self.config.correction == "paper" and self.config.weight_floor == 0 and not self.pruner.needs_mean:
            return 0.0, 0.0
        mean = float(self.component_means()[component])
        return mean, mean

    def _weight(self, score: Float32, visits: UInt8, unseen: float, mean: float) -> Float32:
        """Scores as pruning uses them."""
        weight = np.maximum(self._usable(score, visits, unseen), np.finfo(np.float32).tiny)
        return raise_to_floor(weight, self.config.weight_floor, mean)

    def _key(self, found: Lookup, uniform: Float64, epoch: int, unseen: float, mean: float) -> Float64:
        weight = self._weight(found.score, found.visits, unseen, mean)
        return self.pruner.keys(Block(weight, found.visits, uniform, mean, epoch))

    def _keys(self, component: int, epoch: int, unseen: float, mean: float) -> Iterator[Float64]:
        name = component_key(self.manifest.components[component].name)
        for score, visits, row in self._blocks(component):
            uniform = uniforms(self.config.seed, Purpose.PRUNE, name, epoch, row, len(score))
            yield self._key(Lookup(score, visits), uniform, epoch, unseen, mean)

    def _sample_keys(self, component: int, epoch: int, unseen: float, mean: float) -> Float64:
        """Keys of the same evenly spread rows on every rank; they only narrow the search."""
        samples = int(self.manifest.sizes[component])
        rows = np.unique(np.linspace(0, samples - 1, sample_count(samples)).astype(np.int64))
        found = self.lookup_local(self.manifest.sample_ids(component, rows))
        packed = self.grid.sum_over_dp(np.stack([found.score, found.visits.astype(np.float32)]))
        uniform = uniforms(self.config.seed, Purpose.PRUNE, component + 1, epoch, samples, len(rows))
        return self._key(Lookup(packed[0], packed[1].astype(np.uint8)), uniform, epoch, unseen, mean)

    def _gather(self, kept: UInt8, first: int, samples: int) -> Iterator[UInt8]:
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

    def _shuffled(self, mask: KeptMask, component: int, epoch: int) -> Iterator[UInt8]:
        """The placebo: the same mask for other rows, as if scores had been permuted within the component."""
        name = component_key(self.manifest.components[component].name)
        order = permutation(mask.samples, self.config.seed, name, epoch, Purpose.SHUFFLE_MASK)
        for row in range(0, mask.samples, BLOCK):
            rows = np.arange(row, min(row + BLOCK, mask.samples), dtype=np.int64)
            yield np.packbits(mask.contains(order(rows)), bitorder="little")


def allocate(count: int, dtype: type[T], folder: str | None) -> npt.NDArray[T]:
    """Zeros whose untouched pages cost nothing, in memory or in an unnamed file of a folder.

    Raises:
        ConfigError: the folder cannot hold them.
    """
    if folder is None or count == 0:
        return np.zeros(count, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, count * np.dtype(dtype).itemsize)
            return np.memmap(file, dtype, "r+", shape=(count,))
    except OSError as error:
        raise ConfigError(
            f"`score_folder` must be a folder with room for {count * np.dtype(dtype).itemsize} bytes of each rank, but "
            f"`{folder}` is not: {error.strerror}. Choose another one, or leave it out to keep scores in memory."
        ) from error
