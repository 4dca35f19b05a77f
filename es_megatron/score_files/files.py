"""Scores in the files of a checkpoint, read block by block: distributions by component, and what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.checkpoint.es_state import Reader, read_manifest, read_state
from es_megatron.checkpoint.transfer import find_scores
from es_megatron.data.manifest import Manifest

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

BLOCK = 1 << 20
BINS = 1 << 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
AGES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 254), (255, 255))
"""Ranges of visits, both ends included; 255 stands for all above."""


class RowBlock(NamedTuple):
    """Consecutive rows of a component."""

    row: int
    """First of them."""
    score: Float32
    visits: UInt8


class ScoreFiles:
    """The scores of one checkpoint."""

    def __init__(self, path: Path) -> None:
        """Open an `es_state` folder, a checkpoint, or a run's newest one.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        self.folder = find_scores(path)
        self._document = read_manifest(self.folder)
        self.manifest = Manifest.from_json(self._document["data_manifest"])
        self.state: dict[str, Any] = read_state(self.folder, self._document)

    @property
    def iteration(self) -> int | None:
        """Iterations whose losses are in the scores; None for imported ones."""
        found = self.state.get("engine", {}).get("iteration")
        return None if found is None else int(found)

    def blocks(self, component: int) -> Iterator[RowBlock]:
        """Scores of a component in order of its rows; damage raises `CheckpointError`."""
        begin, end = self.manifest.offsets[component : component + 2].tolist()
        reader = Reader(self.folder, self._document)
        try:
            for low in range(begin, end, BLOCK):
                size = min(BLOCK, end - low)
                score, visits = np.empty(size, np.float32), np.empty(size, np.uint8)
                reader.read_range("score", score, low)
                reader.read_range("visits", visits, low)
                yield RowBlock(low - begin, score, visits)
        finally:
            reader.close()


@dataclass(frozen=True)
class Distribution:
    """The scores of one component."""

    component: str
    samples: int
    seen: int
    """Samples with at least one visit."""
    mean: float
    """Of the seen ones, like what follows; nan where there are none."""
    deviation: float
    quantiles: tuple[float, ...]
    """At `QUANTILES`; exact to the float32's upper 16 bits, 1 part in 128."""
    lowest: float
    highest: float
    visits: float
    """Mean visits of all samples, counted up to 255."""
    ages: tuple[float, ...]
    """Share of samples with so many visits as `AGES` says."""

    @property
    def coverage(self) -> float:
        """Share of samples with a score."""
        return self.seen / self.samples


def describe(files: ScoreFiles, component: int) -> Distribution:
    """Count a component's scores in one pass.

    Non-negative floats sort like their bits, so a histogram over the upper half of the bits gives the quantiles.
    """
    bins, visits = np.zeros(BINS, np.int64), np.zeros(256, np.int64)
    total = squares = 0.0
    low, high = np.inf, -np.inf
    for block in files.blocks(component):
        visits += np.bincount(block.visits, minlength=256)
        score = block.score[block.visits > 0]
        if len(score):
            bins += np.bincount(bins_of(score), minlength=BINS)
            wide = score.astype(np.float64)
            total, squares = total + float(wide.sum()), squares + float(wide @ wide)
            low, high = min(low, float(score.min())), max(high, float(score.max()))
    samples, seen = int(visits.sum()), int(visits[1:].sum())
    mean = total / seen if seen else np.nan
    upto = np.cumsum(bins)
    places = [int(np.searchsorted(upto, np.ceil(q * (seen - 1)), side="right")) for q in QUANTILES]
    middles = middles_of(np.minimum(places, BINS - 1))
    return Distribution(
        component=files.manifest.components[component].name,
        samples=samples,
        seen=seen,
        mean=mean,
        deviation=float(np.sqrt(max(0.0, squares / seen - mean**2))) if seen else np.nan,
        quantiles=tuple(float(np.clip(m, low, high)) if seen else np.nan for m in middles),
        lowest=low if seen else np.nan,
        highest=high if seen else np.nan,
        visits=float(visits @ np.arange(256) / samples),
        ages=tuple(float(visits[first : last + 1].sum() / samples) for first, last in AGES),
    )


Use = Callable[[Float32, UInt8], Float32]
"""From stored scores and visits to scores as they are shown, at least 0."""


def count_by_age(files: ScoreFiles, component: int, use: Use | None = None) -> Int64:
    """Histograms of a component's seen scores by range of visits, int64[AGES, BINS]; `middles_of` tells the bins.

    Args:
        files: to read.
        component: of them.
        use: what is counted of a score; None counts it as stored.
    """
    counts = np.zeros((len(AGES), BINS), np.int64)
    for block in files.blocks(component):
        shown = block.score if use is None else use(block.score, block.visits)
        for age, (first, last) in enumerate(AGES):
            score = shown[(block.visits >= first) & (block.visits <= last)]
            counts[age] += np.bincount(bins_of(score), minlength=BINS)
    return counts


def bins_of(score: Float32) -> npt.NDArray[np.uint32]:
    """The upper half of the bits of each score, a bin in [0, BINS)."""
    return score.view(np.uint32) >> np.uint32(16)


def middles_of(bins: npt.ArrayLike) -> Float32:
    """A score in the middle of each bin."""
    return (np.asarray(bins, np.uint32) << np.uint32(16) | np.uint32(1 << 15)).view(np.float32)


@dataclass(frozen=True)
class ScoreDifference:
    """How the scores of one component differ between two checkpoints."""

    component: str
    samples: int
    """Rows that both have."""
    changed: int
    """Rows whose score or visits differ."""
    both_seen: int
    mean_change: float
    """Mean of (second - first) over rows seen in both; nan where there are none."""
    mean_distance: float
    """Mean of |second - first| over them."""
    correlation: float
    """Pearson's, over them; nan where one does not vary."""


def compare(first: ScoreFiles, second: ScoreFiles, name: str) -> ScoreDifference:
    """Compare a component that both have, row by row, over the rows that both have."""
    numbers = [[c.name for c in files.manifest.components].index(name) for files in (first, second)]
    rows = changed = 0
    sums, distance = np.zeros(6), 0.0  # count, x, y, xx, yy, xy
    for one, other in zip(first.blocks(numbers[0]), second.blocks(numbers[1]), strict=False):
        size = min(len(one.score), len(other.score))
        x, y = one.score[:size], other.score[:size]
        kept = (one.visits[:size] > 0) & (other.visits[:size] > 0)
        rows += size
        changed += int(np.count_nonzero((x != y) | (one.visits[:size] != other.visits[:size])))
        x, y = x[kept].astype(np.float64), y[kept].astype(np.float64)
        sums += np.asarray([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y], dtype=np.float64)
        distance += float(np.abs(y - x).sum())
    count = sums[0]
    if not count:
        return ScoreDifference(name, rows, changed, 0, np.nan, np.nan, np.nan)
    mean_x, mean_y, xx, yy, xy = sums[1:] / count
    spread = np.sqrt(max(0.0, xx - mean_x**2) * max(0.0, yy - mean_y**2))
    correlation = (xy - mean_x * mean_y) / spread if spread > 1e-12 * max(xx, yy) else np.nan
    return ScoreDifference(name, rows, changed, int(count), mean_y - mean_x, distance / count, float(correlation))
