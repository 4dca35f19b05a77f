"""Where every epoch of every component begins, and how long the run is: a pure function of manifest and settings.

An epoch of component c has n_c draws, or m_c = ceil((1-r) n_c) if it is pruned, and it is pruned exactly if its first
draw stands in an evolving iteration (epoch 0 only with imported scores). So the epochs of a component come in three
runs, unpruned - pruned - unpruned, and every question about them has a closed form; nothing is stored per epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.phases import Phases
from es_megatron.algorithm.pruning import kept_count
from es_megatron.data.blend import MAX_DRAWS, Blend
from es_megatron.data.manifest import Manifest
from es_megatron.errors import ConfigError

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]

MAX_REFINEMENTS = 64


class Place(NamedTuple):
    """Where draws stand in the epochs of their component."""

    epoch: Int64
    index: Int64
    """Draw number within the epoch."""
    pruned: Bool


class DueEpoch(NamedTuple):
    """A pruned epoch whose kept mask has to be decided now."""

    component: int
    epoch: int
    first_iteration: int
    """Iteration that holds its first draw."""


@dataclass(frozen=True)
class Epochs:
    """The three runs of epochs of all components; arrays are int64[C]."""

    full: Int64
    """Draws of an unpruned epoch (n_c)."""
    kept: Int64
    """Draws of a pruned epoch (m_c)."""
    first_pruned: Int64
    """Number of the first pruned epoch."""
    after_pruned: Int64
    """Number of the first epoch of the closing, unpruned run."""

    def start(self, component: Int64 | int, epoch: Int64 | int) -> Int64:
        """Draw number at which an epoch of a component begins."""
        early = np.minimum(epoch, self.first_pruned[component])
        middle = (
            np.clip(epoch, self.first_pruned[component], self.after_pruned[component]) - self.first_pruned[component]
        )
        late = np.maximum(epoch - self.after_pruned[component], 0)
        return (early + late) * self.full[component] + middle * self.kept[component]

    def place(self, component: Int64 | int, draw: Int64) -> Place:
        """Epoch and index of draws of components."""
        full, kept = self.full[component], self.kept[component]
        first, after = self.first_pruned[component], self.after_pruned[component]
        edge_1 = first * full
        edge_2 = edge_1 + (after - first) * kept
        pruned = (draw >= edge_1) & (draw < edge_2)
        late = draw >= edge_2
        base = np.where(late, edge_2, np.where(pruned, edge_1, 0))
        turn, index = np.divmod(draw - base, np.where(pruned, kept, full))
        return Place(np.where(late, after, np.where(pruned, first, 0)) + turn, index, pruned)

    def stood_for(self, draws: Int64) -> Float64:
        """Draws of the plain run that the first `draws[c]` of each component stand for: n_c / m_c per pruned one."""
        place = self.place(np.arange(len(draws)), draws)
        return place.epoch * self.full + place.index * (self.full / np.where(place.pruned, self.kept, self.full))

    def stood_for_in_all(self, draws: Int64) -> int:
        """The same summed over components and rounded down once.

        Exact in the sense that a sum that is whole counts as reached: terms are rounded up to a multiple of 2^-64, in
        Python's integers, since index * n passes int64 at 3.04 G samples.
        """
        place = self.place(np.arange(len(draws)), draws)
        length = np.where(place.pruned, self.kept, self.full)
        terms = zip(place.index.tolist(), self.full.tolist(), length.tolist(), strict=True)
        partial = sum(-(-(index * full << 64) // draws_of_epoch) for index, full, draws_of_epoch in terms)
        return int((place.epoch * self.full).sum()) + (partial >> 64)


class Schedule:
    """Length, phases and epochs of a run."""

    def __init__(
        self,
        manifest: Manifest,
        meta_batch: int,
        train_samples: int,
        *,
        anneal: float = 0.0,
        pruning_ratio: float = 0.0,
        scores_imported: bool = False,
    ) -> None:
        """Find the shortest run whose draws stand for `train_samples` of the plain one.

        Args:
            manifest: the blend.
            meta_batch: sequences drawn per iteration (B).
            train_samples: draws of the plain run, >= 1.
            anneal: share of iterations at each end that neither selects nor begins a pruned epoch.
            pruning_ratio: r.
            scores_imported: whether epoch 0 may be pruned.

        Raises:
            ConfigError: the run is longer than positions reach.
        """
        if train_samples + meta_batch >= MAX_DRAWS:
            raise ConfigError(
                f"`train_samples` must be below {MAX_DRAWS - meta_batch} (2^34), but is {train_samples} instead. "
                "Split the run in two, the second starting from the first's scores."
            )
        self.manifest = manifest
        self.meta_batch = meta_batch
        self.train_samples = train_samples
        self.blend = Blend([component.weight for component in manifest.components])
        self._kept = np.asarray([kept_count(int(n), pruning_ratio) for n in manifest.sizes], dtype=np.int64)
        self._prunes = pruning_ratio > 0
        self._first = 0 if scores_imported else 1
        self.phases, self.iterations = self._fit(anneal)
        self.epochs = self._epochs(self.phases)

    def passes(self, iterations: int | None = None) -> Float64:
        """Passes of the plain run over each component that the first iterations stand for, float64[C]."""
        draws = self.blend.counts((self.iterations if iterations is None else iterations) * self.meta_batch)
        return self.epochs.stood_for(draws) / self.manifest.sizes

    def due(self, iteration: int, lag: int) -> list[DueEpoch]:
        """Pruned epochs whose mask is decided at the start of this iteration, `lag` iterations before their first draw.

        Iteration 0 also decides those that begin sooner than that.
        """
        if not self._prunes:
            return []
        low = 0 if iteration == 0 else (iteration + lag) * self.meta_batch
        high = min(iteration + lag + 1, self.iterations) * self.meta_batch
        if low >= high:
            return []
        begin, end = self.blend.counts(low), self.blend.counts(high)
        drawn = np.flatnonzero(end > begin)
        first, last = self.epochs.place(drawn, begin[drawn]), self.epochs.place(drawn, end[drawn] - 1)
        fresh = first.epoch + (first.index > 0)  # first epoch that begins here, if any does
        found: list[DueEpoch] = []
        for at in np.flatnonzero(fresh <= last.epoch):
            component = int(drawn[at])
            starting = np.arange(fresh[at], last.epoch[at] + 1)
            draw = self.epochs.start(component, starting)
            pruned = self.epochs.place(component, draw).pruned
            for epoch, number in zip(starting[pruned].tolist(), draw[pruned].tolist(), strict=True):
                found.append(DueEpoch(component, epoch, self.blend.position(component, number) // self.meta_batch))
        return found

    def _fit(self, anneal: float) -> tuple[Phases, int]:
        """Phases and length, which depend on each other: refine until they agree.

        Where an epoch begins just at the edge of the closing annealing they may never agree, but go round in a cycle.
        Then the phases are those of a length of the cycle that ask for the longest run: it ends exactly where it stands
        for `train_samples`, and its closing annealing is no shorter than the share of the length it was made for.
        """
        length = -(-self.train_samples // self.meta_batch)
        needed: dict[int, int] = {}
        while length not in needed and len(needed) < MAX_REFINEMENTS:
            needed[length] = self._length(Phases(length, anneal))
            length = needed[length]
        tried = list(needed)
        cycle = tried[tried.index(length) :] if length in needed else tried[-1:]
        planned = max(cycle, key=needed.__getitem__)
        return Phases(planned, anneal), needed[planned]

    def _length(self, phases: Phases) -> int:
        """Fewest iterations that stand for the run's draws, with pruning as these phases have it."""
        epochs = self._epochs(phases)
        low, high = 0, -(-self.train_samples // self.meta_batch)
        while low < high:
            middle = (low + high) // 2
            stood_for = epochs.stood_for_in_all(self.blend.counts(middle * self.meta_batch))
            low, high = (low, middle) if stood_for >= self.train_samples else (middle + 1, high)
        return low

    def _epochs(self, phases: Phases) -> Epochs:
        full, kept = self.manifest.sizes, self._kept
        if not self._prunes:
            never = np.full(len(full), np.iinfo(np.int64).max // (4 * int(full.max())), dtype=np.int64)
            return Epochs(full, kept, never, never)
        begin = self.blend.counts(phases.start * self.meta_batch)
        end = self.blend.counts(phases.stop * self.meta_batch)
        first = np.maximum(-(-begin // full), self._first)
        pruned = np.maximum(-(-(end - first * full) // kept), 0)
        return Epochs(full, kept, first, first + pruned)
