"""What a run has saved: work, which is counted, and time, which is told only where the load was the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from es_megatron.core.plan import FORWARD_COST, TRAIN_COST, Layout
from es_megatron.errors import DataError
from es_megatron.report.words import duration, share
from es_megatron.trainer.metrics_file import Metrics, Stretch

Float64 = npt.NDArray[np.float64]

STEADY = 1.25
"""Ratio of slow to fast iterations of one kind (90th to 10th percentile) up to which the load counts as the same."""
FEWEST_PLAIN = 3
"""Plain iterations, without the first of a process, below which their time tells nothing."""
ABOVE_LIMIT = 0.02
"""By how much a measured saving may be above what the cost model allows at most."""


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
    """Of a selecting iteration's time, against a plain one; nan where `doubt` says why, like the next one."""
    plain_step: float
    """Seconds of a plain iteration, of this run's own ones."""
    doubt: str
    """Why no time is told as saved; empty where it is."""
    iteration: Float64
    """float64[S], like what follows."""
    time: Float64
    """Saved so far, against plain steps over the draws that the run has stood for; empty where there is a doubt."""
    work: Float64
    """The same in sequences, forward = 1 and backward = 2."""

    @property
    def measured(self) -> float:
        """Share of the time so far; nan where there is a doubt."""
        return float(self.time[-1]) if len(self.time) else math.nan

    @property
    def counted(self) -> float:
        """Share of the work so far."""
        return float(self.work[-1]) if len(self.work) else math.nan


def saving_of(metrics: Metrics, notes: list[str]) -> Saving:
    """Predicted, counted and measured saving; says in `notes` what is left out.

    Raises:
        DataError: the plan in the metrics is not of a known form.
    """
    plan, stretches = metrics.plan, metrics.stretches
    try:
        Layout(**plan["layout"])
        price = float(plan["scored_share"])
    except (TypeError, KeyError) as error:
        raise DataError(
            f"The plan of the run is not of a known form ({error}). Use the version of es_megatron that wrote it."
        ) from error
    limits = float(plan["nominal_saving_selecting"]), float(plan["layout_saving_selecting"])
    doubt = doubt_of(stretches, max(limits))
    plain, selecting = (math.nan if doubt else step_of(stretches, selecting=which) for which in (False, True))
    counted, stood = connected(stretches)
    stood_for = np.cumsum(stood).astype(np.float64)
    late = bool(stretches) and stretches[0].iteration > stretches[0].iterations
    if len(counted) < len(stretches) - late:
        notes.append("Lines of the metrics are missing; what follows a gap is left out of the saving.")
    elapsed = np.cumsum([stretch.elapsed for stretch in counted])
    work = np.cumsum([work_of(stretch, price) for stretch in counted])
    return Saving(
        nominal=float(plan["nominal_saving"]),
        calibrated=float(plan["layout_saving"]),
        nominal_selecting=limits[0],
        calibrated_selecting=limits[1],
        measured_selecting=1.0 - selecting / plain,
        plain_step=plain,
        doubt=doubt,
        iteration=np.asarray([stretch.iteration for stretch in counted], np.float64),
        time=np.zeros(0) if doubt else 1.0 - elapsed * int(plan["meta_batch"]) / (plain * stood_for),
        work=1.0 - work / (TRAIN_COST * stood_for),
    )


def work_of(stretch: Stretch, scored_share: float) -> float:
    """Sequences, forward = 1 and backward = 2."""
    return FORWARD_COST * scored_share * stretch.scored + TRAIN_COST * stretch.trained


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


def doubt_of(stretches: Sequence[Stretch], limit: float) -> str:
    """Why the time of plain steps and that of the others may not have been measured at the same load; empty if it was.

    Args:
        stretches: of the run.
        limit: the highest saving of a selecting iteration that the cost model allows.
    """
    plain, selecting = (settled(stretches, selecting=which) for which in (False, True))
    count = sum(s.iterations for s in plain)
    if count < FEWEST_PLAIN:
        return (
            f"{count or 'no'} iteration{'s' if count != 1 else ''} of the run trained on a whole meta-batch "
            "(`selection.anneal`), so there is no plain step measured at the same load"
        )
    for found, kind in ((plain, "unselecting"), (selecting, "selecting")):
        low, high = (quantile(found, q) for q in (0.1, 0.9)) if found else (1.0, 1.0)
        if high > STEADY * low:
            spread = f"{duration(low)} and {duration(high)} (10th and 90th percentile)"
            return f"the load was not the same: {kind} iterations took between {spread}"
    if selecting and not _neighbours(plain, selecting):
        return "no process of the run has made both plain and selecting iterations, so their loads may differ"
    saved = 1.0 - quantile(selecting, 0.5) / quantile(plain, 0.5) if selecting else 0.0
    if saved > limit + ABOVE_LIMIT:
        return (
            f"the load was not the same: a selecting iteration would have saved {share(saved)}, "
            f"where {share(limit)} is possible"
        )
    return ""


def _neighbours(plain: Sequence[Stretch], selecting: Sequence[Stretch]) -> bool:
    return bool({s.start for s in plain} & {s.start for s in selecting})


def settled(stretches: Sequence[Stretch], *, selecting: bool) -> list[Stretch]:
    """Those of one kind, without the first of each process, which pays for what is made once."""
    return [s for s in stretches if s.selecting == selecting and s.iteration - s.iterations > s.start]


def step_of(stretches: Sequence[Stretch], *, selecting: bool) -> float:
    """Median seconds of an iteration, over those that select or those that do not; nan where there are none.

    The first iteration of a process counts only where there is no other.
    """
    found = settled(stretches, selecting=selecting) or [s for s in stretches if s.selecting == selecting]
    return quantile(found, 0.5) if found else math.nan


def quantile(stretches: Sequence[Stretch], q: float) -> float:
    """Of the seconds of an iteration; the iterations of a stretch count as equally long."""
    each = np.asarray([s.elapsed / s.iterations for s in stretches])
    order = np.argsort(each)
    upto = np.cumsum(np.asarray([s.iterations for s in stretches])[order])
    return float(each[order][np.searchsorted(upto, upto[-1] * q)])
