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
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.evolution import MAX_VISITS, evolve, usable_scores
from es_megatron.algorithm.margin import Against
from es_megatron.algorithm.ownership import owned_range
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.data.manifest import Manifest
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.means import ComponentSums
from es_megatron.scores.reference import ReferenceLosses

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

T = TypeVar("T", np.float32, np.uint8)

BLOCK = 1 << 16


class Lookup(NamedTuple):
    """Scores of some samples before their update; arrays of one length."""

    score: Float32
    visits: UInt8
    used: Float32
    """Scores as they are used for choosing (`usable_scores`); unseen samples count as that says."""
    against: Against | None = None
    """Reference losses, where the run has any."""

    def at(self, positions: Int64) -> Lookup:
        """Scores of some of the samples."""
        return Lookup(self.score[positions], self.visits[positions], self.used[positions])


class Staged(NamedTuple):
    """An update of this rank's samples that waits for its optimizer step."""

    iteration: int
    ids: Int64
    score: Float32


class ScoreStore:
    """Scores and visits of this rank's range, and the collectives that make the ranges one store."""

    def __init__(self, manifest: Manifest, config: EvolvedSamplingConfig, grid: RankGrid) -> None:
        """Allocate this rank's range; untouched pages cost nothing until their first visit.

        Args:
            manifest: the blend.
            config: beta1, beta2, correction, folder.
            grid: this rank's place.
        """
        self.manifest, self.config, self.grid = manifest, config, grid
        self.low, self.high = owned_range(manifest.total, grid.dp_rank, grid.dp_size)
        self.score: Float32 = allocate(self.high - self.low, np.float32, config.scores.folder)
        self.visits: UInt8 = allocate(self.high - self.low, np.uint8, config.scores.folder)
        self.start = 1.0 / manifest.total
        self.sums = ComponentSums(len(manifest.components), self.start)
        self.reference: ReferenceLosses | None = None
        """Losses of a reference model; set before scores are loaded."""
        self._staged: Staged | None = None

    def stored(self, ids: Int64) -> tuple[Float32, UInt8]:
        """Scores and visits of the ids this rank owns, 0 for the others: summed over ranks they are those of all."""
        mine = np.flatnonzero((ids >= self.low) & (ids < self.high))
        slot = ids.take(mine) - self.low
        score, visits = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.uint8)
        score[mine], visits[mine] = self.score.take(slot), self.visits.take(slot)
        return score, visits

    def stored_reference(self, ids: Int64) -> Float32:
        """Reference losses of the ids this rank owns, nan where there is none, 0 for the others' ids."""
        assert self.reference is not None
        mine = np.flatnonzero((ids >= self.low) & (ids < self.high))
        found = np.zeros(len(ids), np.float32)
        found[mine] = self.reference.stored(ids.take(mine) - self.low)
        return found

    def lookup(self, ids: Int64) -> Lookup:
        """Scores of some samples, the same on every rank; one collective over the data-parallel ranks.

        Args:
            ids: int64[B], the meta-batch.
        """
        found, _ = self._gather(ids, None)
        return found

    def exchange(self, ids: Int64, loss: Float32) -> tuple[Lookup, Float32]:
        """`lookup`, and losses shared in the same collective.

        Args:
            ids: int64[B], the meta-batch.
            loss: float32[B], this rank's losses at its own positions, 0 elsewhere.

        Returns:
            Scores before the update and all losses, the same on every rank.
        """
        found, rest = self._gather(ids, loss)
        return found, rest[0]

    def _gather(self, ids: Int64, loss: Float32 | None) -> tuple[Lookup, Float32]:
        score, visits = self.stored(ids)
        rows = [score, visits.astype(np.float32), *([] if loss is None else [loss])]
        if self.reference is not None:
            rows.append(self.stored_reference(ids))
        packed = np.stack(rows)
        against, unseen = None, 0.0
        if self.config.correction == "paper":
            packed = self.grid.sum_over_dp(packed)
        else:
            component, _ = self.manifest.locate(ids)
            # The sums that means are made of come along: float64 holds whole numbers exactly up to 2^53.
            sums, moments = self.sums.total, self._moment_sums()
            wide = [each.reshape(-1) for each in (packed, sums, moments)]
            wide = self.grid.sum_over_dp(np.concatenate(wide, dtype=np.float64))
            packed = wide[: packed.size].reshape(packed.shape).astype(np.float32)
            unseen = self.sums.means(wide[packed.size : packed.size + sums.size].reshape(sums.shape))[component]
            if self.reference is not None:
                moments = self.reference.moments(wide[packed.size + sums.size :].reshape(moments.shape))
                against = self.reference.against(packed[-1], component, moments)
        score, visits = packed[0], packed[1].astype(np.uint8)
        return Lookup(score, visits, self.usable(score, visits, unseen), against), packed[2:]

    def _moment_sums(self) -> Int64:
        return np.zeros((0, 0), np.int64) if self.reference is None else self.reference.total

    def usable(self, score: Float32, visits: UInt8, unseen: float | Float32) -> Float32:
        """Scores as they are used for choosing; with `debiased` correction unseen ones count as `unseen`."""
        return usable_scores(score, visits, self.config.decay, self.start, self.config.correction, unseen)

    def evolve(self, iteration: int, ids: Int64, found: Lookup, loss: Float32) -> Float32:
        """Stage new scores of samples and return their sampling weights (eq. 2.5).

        A sample that stands twice evolves once, at its lowest position. Staging again replaces what was staged.

        Args:
            iteration: the iteration this belongs to.
            ids: int64[N].
            found: their scores before.
            loss: float32[N]; a non-finite one changes nothing.

        Returns:
            float32[N], 0 where the loss is not finite.
        """
        old = np.where(found.visits == 0, np.float32(self.start), found.score)
        evolved = evolve(loss, old, found.used, self.config.scores.beta1, self.config.decay)
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
        now = np.minimum(visits, MAX_VISITS - 1) + 1
        before = self.usable(self.score[slot], visits, 0.0)
        used = self.usable(staged.score, now, 0.0)
        self.sums.replace(component, before, used, visits > 0)
        if self.reference is not None:
            self.reference.add(component, slot, np.where(visits > 0, before, np.float32(np.nan)), used)
        self.score[slot], self.visits[slot] = staged.score, now

    def discard(self) -> None:
        """Forget what was staged: the step was skipped."""
        self._staged = None

    def component_means(self) -> Float32:
        """Mean used score of each component, float32[C], the same on every rank; collective (`ComponentSums.means`)."""
        return self.sums.means(self.grid.sum_over_dp(self.sums.total))

    def seen(self) -> Int64:
        """Samples of each component that have a score, int64[C], the same on every rank; collective."""
        return self.grid.sum_over_dp(self.sums.total)[:, 1]

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
        if self.config.scores.folder is None:
            self.score = np.require(score, np.float32, ["C", "W"])
            self.visits = np.require(visits, np.uint8, ["C", "W"])
        else:
            self.score[:], self.visits[:] = score, visits
        self._staged = None
        self.sums = ComponentSums(len(self.manifest.components), self.start)
        if self.reference is not None:
            self.reference.forget()
        for component in range(len(self.manifest.components)):
            for row_score, row_visits, row in self.blocks(component):
                seen = row_visits > 0
                used = self.usable(row_score[seen], row_visits[seen], 0.0)
                self.sums.count(component, used)
                if self.reference is not None:
                    slot = int(self.manifest.offsets[component]) - self.low + row + np.flatnonzero(seen)
                    self.reference.add(component, slot, None, used)

    def rows(self, component: int) -> tuple[int, int]:
        """Rows of a component that this rank owns, half-open."""
        first, end = int(self.manifest.offsets[component]), int(self.manifest.offsets[component + 1])
        low, high = max(self.low, first) - first, min(self.high, end) - first
        return (low, high) if low < high else (0, 0)

    def blocks(self, component: int) -> Iterator[tuple[Float32, UInt8, int]]:
        """Scores, visits and first row of this rank's part of a component, block by block."""
        low, high = self.rows(component)
        shift = int(self.manifest.offsets[component]) - self.low
        for row in range(low, high, BLOCK):
            part = slice(row + shift, min(row + BLOCK, high) + shift)
            yield self.score[part], self.visits[part], row


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
            f"`scores.folder` must be a folder with room for {count * np.dtype(dtype).itemsize} bytes of each rank, "
            f"but `{folder}` is not: {error.strerror}. Choose another one, or leave it out to keep scores in memory."
        ) from error
