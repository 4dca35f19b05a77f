"""What the metrics of a run come to: series over iterations, time, work and what was saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.report.saving import Saving, saving_of, work_of
from es_megatron.trainer.metrics_file import LOSSES, Metrics, Stretch

Float64 = npt.NDArray[np.float64]

MOST_POINTS = 300
MOST_COMPONENTS = 8
PARTS = ("score", "train", "exchange", "order", "optimizer")


@dataclass(frozen=True)
class Course:
    """Time and work by iteration, float64[S + 1], from 0 at iteration 0."""

    iteration: Float64
    seconds: Float64
    """Without evaluations and saves."""
    work: Float64
    """In sequences, forward = 1 and backward = 2."""
    whole: bool
    """Whether there is a line for every iteration; without one time and work are not known."""

    def seconds_at(self, iteration: Sequence[float]) -> Float64:
        """Seconds up to iterations."""
        return np.interp(iteration, self.iteration, self.seconds)

    def work_at(self, iteration: Sequence[float]) -> Float64:
        """Work up to iterations."""
        return np.interp(iteration, self.iteration, self.work)


@dataclass(frozen=True)
class Analysis:
    """A run as its metrics tell it."""

    plan: Mapping[str, Any]
    stretches: tuple[Stretch, ...]
    """At most about `MOST_POINTS`, with at most `MOST_COMPONENTS` components each."""
    components: tuple[str, ...]
    validation: Mapping[int, Mapping[str, float]]
    saving: Saving
    course: Course
    notes: tuple[str, ...]

    @property
    def iteration(self) -> int:
        """Finished iterations."""
        return self.stretches[-1].iteration if self.stretches else 0

    def total(self, name: str) -> float:
        """Sum of a number over all stretches."""
        return sum(getattr(stretch, name) for stretch in self.stretches)


def analyse(metrics: Metrics) -> Analysis:
    """Work the metrics of a run out.

    Raises:
        DataError: the plan in them is not of a known form.
    """
    notes: list[str] = []
    names = [component["name"] for component in metrics.plan["components"]]
    stretches = merge_components(metrics.stretches, names)
    shown = tuple(stretches[0].drawn) if stretches else tuple(names[:MOST_COMPONENTS])
    if len(shown) < len(names):
        notes.append(f"The {len(names) - len(shown) + 1} components with the fewest draws are shown as one.")
    first = metrics.stretches[0] if metrics.stretches else None
    if first is not None and first.iteration > first.iterations:
        begin = first.iteration - first.iterations
        notes.append(f"The metrics begin after iteration {begin}; what was before is in no figure.")
    if first is None:
        notes.append("No iteration is finished yet.")
    saving = saving_of(metrics, notes)
    resumed = sorted({stretch.start for stretch in metrics.stretches} - {0})
    if resumed:
        notes.append(
            f"The run was resumed at iteration {', '.join(map(str, resumed))}. Times are those of all its processes: "
            "if the machine or the number of ranks changed in between, they mix them. The work counted is exact."
        )
    points = thin(stretches, MOST_POINTS)
    return Analysis(metrics.plan, points, shown, metrics.validation, saving, course_of(metrics), tuple(notes))


def course_of(metrics: Metrics) -> Course:
    """How far the run had come in time and work, at the end of each stretch."""
    stretches, price = metrics.stretches, float(metrics.plan["scored_share"])
    ends = [0, *(s.iteration for s in stretches)]
    return Course(
        iteration=np.asarray(ends, np.float64),
        seconds=np.cumsum([0.0, *(s.elapsed for s in stretches)]),
        work=np.cumsum([0.0, *(work_of(s, price) for s in stretches)]),
        whole=all(s.iteration - s.iterations == end for s, end in zip(stretches, ends, strict=False)),
    )


def merge_components(stretches: Sequence[Stretch], names: Sequence[str]) -> list[Stretch]:
    """Leave the components with most draws, and put the others together; one that a blend had before is told too."""
    drawn = dict.fromkeys(names, 0)
    for stretch in stretches:
        for name, count in stretch.drawn.items():
            drawn[name] = drawn.get(name, 0) + count
    ranked = sorted(drawn, key=lambda name: -drawn[name])
    kept = ranked if len(ranked) <= MOST_COMPONENTS else ranked[: MOST_COMPONENTS - 1]
    kept = [name for name in drawn if name in kept]
    others = [name for name in drawn if name not in kept]

    def merged(counts: Mapping[str, int]) -> dict[str, int]:
        rest = {f"{len(others)} others": sum(counts.get(name, 0) for name in others)} if others else {}
        return {name: counts.get(name, 0) for name in kept} | rest

    return [dataclasses.replace(s, drawn=merged(s.drawn), chosen=merged(s.chosen)) for s in stretches]


def thin(stretches: Sequence[Stretch], most: int) -> tuple[Stretch, ...]:
    """Join neighbours of the same kind until no more than about `most` are left; none across a gap."""
    each = -(-len(stretches) // most)
    groups: list[list[Stretch]] = []
    for stretch in stretches:
        if groups and len(groups[-1]) < each and _goes_on(groups[-1][-1], stretch):
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
    return tuple(group[0] if len(group) == 1 else join(group) for group in groups)


def _goes_on(before: Stretch, stretch: Stretch) -> bool:
    return before.selecting == stretch.selecting and stretch.iteration - stretch.iterations == before.iteration


def join(group: Sequence[Stretch]) -> Stretch:
    """Several stretches as one."""
    last = group[-1]
    sums = {
        name: sum(getattr(s, name) for s in group)
        for name in ("iterations", "elapsed", "scored", "trained", "bad", "skipped")
    }
    parts = {name: _added(getattr(s, name) for s in group) for name in ("seconds", "drawn", "chosen")}
    losses = {
        name: _mean([(getattr(s, name), s.iterations) for s in group]) for name in (*LOSSES, "lm_loss", "grad_norm")
    }
    return dataclasses.replace(last, **sums, **parts, **losses)


def _added(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in counts:
        for name, value in each.items():
            total[name] = total.get(name, 0) + value
    return total


def _mean(values: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in values if value is not None]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None
