"""What all figures have in common: their form on a wide page and on a telephone, lines with gaps, axes, legends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from es_megatron.report.analysis import Analysis, Course
from es_megatron.report.words import amount, time_unit
from es_megatron.trainer.metrics_file import Stretch

Float64 = npt.NDArray[np.float64]

COLOURS = ("#4878a8", "#e08a3c", "#5a9e6f", "#c0606e", "#8a79b8", "#a0845b", "#d58bb5", "#7f8c8d")
GREY, DARK, SHADE = "#8a8f98", "#30343b", "#eef0f3"
HEIGHT = 3.5
LONG = 22
"""Letters of a label that take a line of a telephone's legend."""


class Form(NamedTuple):
    """Of a figure on one kind of page."""

    width: float
    """Inches; letters have the same size in every form."""
    dots: int
    """Per inch."""
    stacked: bool
    """Whether panels stand below one another, and not side by side."""

    def panels(self, count: int, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
        """A figure with panels of one height in inches."""
        rows, columns = (count, 1) if self.stacked else (1, count)
        size = (self.width, height * (0.8 * rows if self.stacked else 1))
        figure = Figure(figsize=size, dpi=self.dots, layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())

    def legend(self, figure: Figure, axes: Axes, columns: int = 8) -> None:
        """Above the panels, where no curve is."""
        handles, told = axes.get_legend_handles_labels()
        if not told:
            return
        if self.stacked:
            columns = 1 if max(map(len, told)) > LONG else 2
        columns = min(columns, len(told))
        figure.legend(handles, told, loc="outside upper left", ncols=columns, fontsize=8.5, frameon=False)


WIDE, NARROW = Form(8.4, 120, stacked=False), Form(3.5, 200, stacked=True)


class Picture(NamedTuple):
    """A figure and what it shows."""

    name: str
    """Of its file, without the suffix."""
    title: str
    caption: str
    draw: Callable[[Form], Figure]


def broken(stretches: Sequence[Stretch], values: Sequence[float | None]) -> tuple[Float64, Float64]:
    """A curve's points at the ends of stretches, with nan where a value is not known and where lines are missing."""
    x: list[float] = []
    y: list[float] = []
    for number, (stretch, value) in enumerate(zip(stretches, values, strict=True)):
        begin = stretch.iteration - stretch.iterations
        if number and begin != stretches[number - 1].iteration:
            x.append(begin)
            y.append(np.nan)
        x.append(stretch.iteration)
        y.append(np.nan if value is None else value)
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


def curve(axes: Axes, x: npt.ArrayLike, y: npt.ArrayLike, **style: Any) -> None:
    """A line that ends where a value is nan; points that have no neighbour get a dot, and all where they are few."""
    at, value = np.asarray(x, np.float64), np.asarray(y, np.float64)
    known = np.isfinite(value)
    if not known.any():
        return
    beside = np.concatenate([[False], known[:-1]]) | np.concatenate([known[1:], [False]])
    dots = np.flatnonzero(known if known.sum() <= 40 else known & ~beside)
    usual: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 3, "markevery": dots.tolist()}
    axes.plot(at, value, **(usual | style))


def shade(axes: Axes, stretches: Sequence[Stretch]) -> None:
    """Mark the iterations that train on everything."""
    for stretch in stretches:
        if not stretch.selecting:
            axes.axvspan(stretch.iteration - stretch.iterations, stretch.iteration, color=SHADE, zorder=0, linewidth=0)


def label(axes: Axes, text: str, *, x: str = "iteration", percent: bool = False) -> None:
    """Name the axes and set them up."""
    axes.set_xlabel(x)
    axes.set_ylabel(text)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if x == "iteration":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    plain(axes)


def plain(axes: Axes) -> None:
    """A grid below, no box around."""
    axes.grid(True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def time_axis(axes: Axes, analysis: Analysis) -> None:
    """Time in iterations above an axis of iterations, where it is known for all of them."""
    course = analysis.course
    if not course.whole or course.seconds[-1] <= 0:
        return
    size, unit = time_unit(float(course.seconds[-1]))
    x, y = _prolonged(course, size)

    def to_time(value: Any) -> Any:
        return np.interp(value, x, y)

    def to_iteration(value: Any) -> Any:
        return np.interp(value, y, x)

    above = axes.secondary_xaxis("top", functions=(to_time, to_iteration))
    above.xaxis.set_major_locator(MaxNLocator(6))
    above.set_xlabel(f"time in iterations, {unit}", fontsize=8.5)
    above.tick_params(labelsize=8)
    above.spines["top"].set_color("#c9ced6")


def _prolonged(course: Course, size: float) -> tuple[Float64, Float64]:
    """Iterations and times that go on beyond both ends: a secondary axis asks for more than there is."""
    last, total = course.iteration[-1], course.seconds[-1] / size
    steps = np.maximum(np.diff(course.seconds / size), 1e-9 * total)
    times = np.concatenate([[0.0], np.cumsum(steps)])
    return np.concatenate([[-last], course.iteration, [2 * last]]), np.concatenate([[-total], times, [2 * times[-1]]])
