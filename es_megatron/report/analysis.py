"""What the metrics of a run come to: series over iterations, and the measured saving beside the predicted one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.core.plan import FORWARD_COST, TRAIN_COST, Layout
from es_megatron.errors import DataError
from es_megatron.trainer.metrics_file import LOSSES, Metrics, Stretch

Float64 = npt.NDArray[np.float64]

MOST_POINTS = 300
MOST_COMPONENTS = 8
STEADY = 1.5
"""Ratio of slow to fast iterations of one kind above which the measured saving is called uncertain."""
PARTS = ("score", "train", "exchange", "order", "optimizer")


@dataclass(frozen=True)
class Saving:
    """Shares of the plain run's time or work; nan where not known."""

    nominal: float
    """Of the whole run, predicted with backward = 2 forward."""
    calibrated: float
    """Predicted with the times measured before the first iteration."""
    nominal_selecting: float
    calibrated_selecting: float
    measured_selecting: float
    """Of a selecting iteration's time, against a plain one."""
    plain_step: float
    """Seconds of a plain iteration."""
    plain_step_measured: bool
    """Whether this run's own annealing told; otherwise the calibration did."""
    iteration: Float64
    """float64[S], like what follows."""
    time: Float64
    """Saved so far, against plain steps over the draws that the run has stood for."""
    work: Float64
    """The same in sequences, forward = 1 and backward = 2."""

    @property
    def measured(self) -> float:
        """Of the run so far."""
        return float(self.time[-1]) if len(self.time) else math.nan


@dataclass(frozen=True)
class Analysis:
    """A run as its metrics tell it."""

    plan: Mapping[str, Any]
    stretches: tuple[Stretch, ...]
    """At most about `MOST_POINTS`, with at most `MOST_COMPONENTS` components each."""
    components: tuple[str, ...]
    validation: Mapping[int, Mapping[str, float]]
    saving: Saving
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
            "if the machine or the number of ranks changed in between, the measured saving mixes them. The work "
            "counted is exact."
        )
    notes += unsteady(metrics.stretches)
    points = thin(stretches, MOST_POINTS)
    return Analysis(metrics.plan, points, shown, metrics.validation, saving, tuple(notes))


def saving_of(metrics: Metrics, notes: list[str]) -> Saving:
    """Predicted and measured saving; says in `notes` what the measured one rests on."""
    plan, stretches = metrics.plan, metrics.stretches
    try:
        layout = Layout(**plan["layout"])
        price = float(plan["scored_share"])
    except (TypeError, KeyError) as error:
        raise DataError(
            f"The plan of the run is not of a known form ({error}). Use the version of es_megatron that wrote it."
        ) from error
    plain, selecting = (step_of(stretches, selecting=which) for which in (False, True))
    measured = not math.isnan(plain)
    if not measured:
        plain = layout.whole()
        notes.append(
            "No iteration has trained on its whole meta-batch so far, so the time of a plain one is that of the "
            "calibration before the first iteration."
        )
    counted, stood = connected(stretches)
    stood_for = np.cumsum(stood).astype(np.float64)
    late = bool(stretches) and stretches[0].iteration > stretches[0].iterations
    if len(counted) < len(stretches) - late:
        notes.append("Lines of the metrics are missing; what follows a gap is left out of the saving.")
    elapsed = np.cumsum([stretch.elapsed for stretch in counted])
    work = np.cumsum([FORWARD_COST * price * s.scored + TRAIN_COST * s.trained for s in counted])
    return Saving(
        nominal=float(plan["nominal_saving"]),
        calibrated=float(plan["layout_saving"]),
        nominal_selecting=float(plan["nominal_saving_selecting"]),
        calibrated_selecting=float(plan["layout_saving_selecting"]),
        measured_selecting=1.0 - selecting / plain,
        plain_step=plain,
        plain_step_measured=measured,
        iteration=np.asarray([stretch.iteration for stretch in counted], np.float64),
        time=1.0 - elapsed * int(plan["meta_batch"]) / (plain * stood_for),
        work=1.0 - work / (TRAIN_COST * stood_for),
    )


def connected(stretches: Sequence[Stretch]) -> tuple[list[Stretch], list[int]]:
    """The stretches that begin where the one before ends, and the draws of the plain run that each stands for."""
    counted: list[Stretch] = []
    stood: list[int] = []
    done, upto = 0, 0
    for stretch in stretches:
        if stretch.iteration - stretch.iterations == done:
            counted.append(stretch)
            stood.append(stretch.stood_for - upto)
        done, upto = stretch.iteration, stretch.stood_for
    return counted, stood


def unsteady(stretches: Sequence[Stretch]) -> list[str]:
    """A note where iterations of one kind differ so much in time that a measured saving tells little."""
    each = [1e3 * s.elapsed / s.iterations for s in stretches if s.selecting]
    low, high = np.quantile(each, (0.1, 0.9)) if each else (1.0, 1.0)
    if high <= STEADY * low:
        return []
    spread = f"between {low:.3g} and {high:.3g} ms (10th to 90th percentile of the log windows)"
    why = "the machine was not steady or not the run's own, so the measured saving is uncertain"
    return [f"Selecting iterations took {spread}: {why}. The work counted is exact."]


def step_of(stretches: Sequence[Stretch], *, selecting: bool) -> float:
    """Median seconds of an iteration, over those that select or those that do not; nan where there are none.

    A stretch's iterations count as equally long. The very first iteration counts only where there is no other.
    """
    found = [s for s in stretches if s.selecting == selecting]
    found = [s for s in found if s.iteration > 1] or found
    if not found:
        return math.nan
    each = np.asarray([s.elapsed / s.iterations for s in found])
    order = np.argsort(each)
    upto = np.cumsum(np.asarray([s.iterations for s in found])[order])
    return float(each[order][np.searchsorted(upto, upto[-1] / 2)])


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
    """Join neighbours of the same kind until no more than about `most` are left."""
    each = -(-len(stretches) // most)
    groups: list[list[Stretch]] = []
    for stretch in stretches:
        if groups and len(groups[-1]) < each and groups[-1][0].selecting == stretch.selecting:
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
    return tuple(group[0] if len(group) == 1 else join(group) for group in groups)


def join(group: Sequence[Stretch]) -> Stretch:
    """Several stretches as one."""
    last = group[-1]
    sums = {
        name: sum(getattr(s, name) for s in group)
        for name in ("iterations", "elapsed", "scored", "trained", "bad", "skipped")
    }
    parts = {name: _added(getattr(s, name) for s in group) for name in ("seconds", "drawn", "chosen")}
    losses = {name: _mean([(getattr(s, name), s.iterations) for s in group]) for name in (*LOSSES, "lm_loss")}
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
