"""Where every epoch of every component begins, and how long the run is: a pure function of manifest and settings.

An epoch of component c has n_c draws, or m_c = ceil((1-r) n_c) if it is pruned, and it is pruned exactly if its first
draw stands in an evolving iteration (epoch 0 only with imported scores). So the epochs of a component come in three
runs, unpruned - pruned - unpruned, and every question about them has a closed form; nothing is stored per epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.phases import Phases
from es_megatron.algorithm.pruners import kept_count
from es_megatron.data.blend import MAX_DRAWS, Blend
from es_megatron.data.manifest import Manifest
from es_megatron.data.ramp import Ramp
from es_megatron.errors import ConfigError

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]

MAX_REFINEMENTS = 64


class DrawPlaces(NamedTuple):
    """Where draws stand in the epochs of their component."""

    epoch: Int64
    index: Int64  # pyright: ignore[reportIncompatibleMethodOverride]
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

    def place(self, component: Int64 | int, draw: Int64) -> DrawPlaces:
        """Epoch and index of draws of components."""
        full, kept = self.full[component], self.kept[component]
        first, after = self.first_pruned[component], self.after_pruned[component]
        edge_1 = first * full
        edge_2 = edge_1 + (after - first) * kept
        pruned = (draw >= edge_1) & (draw < edge_2)
        late = draw >= edge_2
        base = np.where(late, edge_2, np.where(pruned, edge_1, 0))
        turn, index = np.divmod(draw - base, np.where(pruned, kept, full))
        return DrawPlaces(np.where(late, after, np.where(pruned, first, 0)) + turn, index, pruned)

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


@dataclass(frozen=True)
class Origin:
    """Where a data order begins: at iteration 0, or where a run goes on over another blend."""

    iteration: int = 0
    """First iteration of this order."""
    stood_for: int = 0
    """Draws of the plain run that the iterations before it stood for."""
    scored: tuple[str, ...] = ()
    """Components that have scores at its beginning, whose epoch 0 may be pruned."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; `Origin.from_json` reads it back."""
        return {"iteration": self.iteration, "stood_for": self.stood_for, "scored": list(self.scored)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Origin:
        """Read what `to_json` wrote."""
        return Origin(int(data["iteration"]), int(data["stood_for"]), tuple(data["scored"]))


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
        origin: Origin | None = None,
        ramp: Ramp | None = None,
    ) -> None:
        """Find the shortest run whose draws stand for `train_samples` of the plain one.

        Args:
            manifest: the blend.
            meta_batch: sequences drawn per iteration (B).
            train_samples: draws of the plain run, >= 1.
            anneal: share of iterations at each end that neither selects nor begins a pruned epoch.
            pruning_ratio: r.
            scores_imported: whether epoch 0 of every component may be pruned.
            origin: where the order begins; iterations count on from there, epochs begin anew.
            ramp: sizes of meta-batches, where they are not all of `meta_batch`; those below it are trained whole.

        Raises:
            ConfigError: the run is longer than positions reach.
        """
        self.origin = origin or Origin()
        if train_samples + meta_batch >= MAX_DRAWS:
            raise ConfigError(
                f"`train_samples` must be below {MAX_DRAWS - meta_batch} (2^34), but is {train_samples} instead. "
                "Split the run in two, the second starting from the first's scores."
            )
        self.manifest = manifest
        self.meta_batch = meta_batch
        self.ramp = ramp or Ramp(meta_batch)
        self.train_samples = train_samples
        self.blend = Blend([component.weight for component in manifest.components])
        self._kept = np.asarray([kept_count(int(n), pruning_ratio) for n in manifest.sizes], dtype=np.int64)
        self._prunes = pruning_ratio > 0
        scored = [scores_imported or component.name in self.origin.scored for component in manifest.components]
        self._first = np.where(scored, 0, 1)
        self._remaining = max(0, train_samples - self.origin.stood_for)
        self.phases, self.iterations = self._fit(anneal)
        self.epochs = self._epochs(self.phases)

    def passes(self, iterations: int | None = None) -> Float64:
        """Passes of the plain run over each component that iterations from the origin on stand for, float64[C]."""
        return self.epochs.stood_for(self.draws(iterations)) / self.manifest.sizes

    def stood_for(self, iteration: int) -> int:
        """Draws of the plain run that everything before this iteration stands for."""
        return self.origin.stood_for + self.epochs.stood_for_in_all(self.draws(iteration))

    def position(self, iteration: int) -> int:
        """First position of an iteration in this order."""
        return self.ramp.position(iteration) - self.ramp.position(self.origin.iteration)

    def iteration_at(self, position: int) -> int:
        """Iteration that makes the draw at a position of this order."""
        return self.ramp.iteration_at(self.ramp.position(self.origin.iteration) + position)

    def draws(self, iteration: int | None = None) -> Int64:
        """Draws of each component in this order before an iteration (before the end), int64[C]."""
        return self.blend.counts(self.position(self.iterations if iteration is None else iteration))

    def due(self, iteration: int, lag: int) -> list[DueEpoch]:
        """Pruned epochs whose mask is decided at the start of this iteration, `lag` iterations before their first draw.

        The first iteration also decides those that begin sooner than that.
        """
        if not self._prunes:
            return []
        low = 0 if iteration == self.origin.iteration else self.position(iteration + lag)
        high = self.position(min(iteration + lag + 1, self.iterations))
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
                first_draw = self.blend.position(component, number)
                found.append(DueEpoch(component, epoch, self.iteration_at(first_draw)))
        return found

    def _fit(self, anneal: float) -> tuple[Phases, int]:
        """Phases and length, which depend on each other: refine until they agree.

        Where an epoch begins just at the edge of the closing annealing they may never agree, but go round in a cycle.
        Then the phases are those of a length of the cycle that ask for the longest run: it ends exactly where it stands
        for `train_samples`, and its closing annealing is no shorter than the share of the length it was made for.
        """
        length = self._fewest(self._remaining)
        needed: dict[int, int] = {}
        while length not in needed and len(needed) < MAX_REFINEMENTS:
            needed[length] = self._length(self._phases(length, anneal))
            length = needed[length]
        tried = list(needed)
        cycle = tried[tried.index(length) :] if length in needed else tried[-1:]
        planned = max(cycle, key=needed.__getitem__)
        return self._phases(planned, anneal), needed[planned]

    def _phases(self, iterations: int, anneal: float) -> Phases:
        return Phases(iterations, anneal, self.ramp.iterations)

    def _fewest(self, draws: int) -> int:
        """Iteration before which an order has made so many draws."""
        return self.origin.iteration if draws == 0 else self.iteration_at(draws - 1) + 1

    def _length(self, phases: Phases) -> int:
        """Fewest iterations that stand for the run's draws, with pruning as these phases have it."""
        epochs = self._epochs(phases)
        low, high = self.origin.iteration, self._fewest(self._remaining)
        while low < high:
            middle = (low + high) // 2
            stood_for = epochs.stood_for_in_all(self.draws(middle))
            low, high = (low, middle) if stood_for >= self._remaining else (middle + 1, high)
        return low

    def _epochs(self, phases: Phases) -> Epochs:
        full, kept = self.manifest.sizes, self._kept
        if not self._prunes:
            never = np.full(len(full), np.iinfo(np.int64).max // (4 * int(full.max())), dtype=np.int64)
            return Epochs(full, kept, never, never)
        begin = self.blend.counts(max(0, self.position(phases.start)))
        end = self.blend.counts(max(0, self.position(phases.stop)))
        first = np.maximum(-(-begin // full), self._first)
        pruned = np.maximum(-(-(end - first * full) // kept), 0)
        return Epochs(full, kept, first, first + pruned)
