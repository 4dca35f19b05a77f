"""The figures of a report, drawn without a display; what there is nothing to draw for is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from es_megatron.report.analysis import PARTS, Analysis, thin
from es_megatron.trainer.metrics_file import Stretch

COLOURS = ("#4878a8", "#e08a3c", "#5a9e6f", "#c0606e", "#8a79b8", "#a0845b", "#d58bb5", "#7f8c8d")
LOWEST = -0.6
"""Saving that the axis goes down to."""
GREY, SHADE = "#8a8f98", "#eef0f3"
FEW_POINTS = 30
"""Of shares, which vary from one meta-batch to the next."""
WIDTH, HEIGHT, DOTS = 8.4, 3.5, 120


class Picture(NamedTuple):
    """A figure and what it shows."""

    name: str
    """Of its file, without the suffix."""
    title: str
    caption: str
    figure: Figure


def draw_run(analysis: Analysis) -> list[Picture]:
    """The figures that metrics alone give."""
    if not analysis.stretches:
        return []
    found = [shares_over_time(analysis), shares(analysis), losses(analysis), times(analysis)]
    found += [savings(analysis), throughput(analysis), validation(analysis)]
    return [each for each in found if each is not None]


def shares_over_time(analysis: Analysis) -> Picture | None:
    """Chosen sequences by component: as a share of the chosen, and of what was drawn."""
    selecting = thin([s for s in analysis.stretches if s.selecting], FEW_POINTS)
    if not selecting:
        return None
    figure, (left, right) = _panels(2)
    x = [s.iteration for s in selecting]
    for number, name in enumerate(analysis.components):
        colour = COLOURS[number % len(COLOURS)]
        share = [s.chosen[name] / max(1, s.trained) for s in selecting]
        rate = [s.chosen[name] / s.drawn[name] if s.drawn[name] else np.nan for s in selecting]
        left.plot(x, share, color=colour, label=name, **_marks(x))
        right.plot(x, rate, color=colour, label=name, **_marks(x))
    right.axhline(analysis.plan["kept"] / analysis.plan["meta_batch"], color=GREY, linestyle="--", linewidth=1)
    _label(left, "share of the chosen sequences", percent=True)
    _label(right, "chosen of those drawn", percent=True)
    _legend(figure, left)
    caption = (
        "Left: of the sequences that got a backward pass, the share of each domain. Right: of the sequences drawn from "
        "a domain, the share that was chosen; dashed: b/B, what a uniform choice takes. Selecting iterations only."
    )
    return Picture("selection", "What was selected, by domain", caption, figure)


def shares(analysis: Analysis) -> Picture:
    """Share of draws and of trained sequences by component, over the whole run so far."""
    names = analysis.components
    drawn = np.asarray([sum(s.drawn[name] for s in analysis.stretches) for name in names], float)
    chosen = np.asarray([sum(s.chosen[name] for s in analysis.stretches) for name in names], float)
    figure, (axes,) = _panels(1, height=1.2 + 0.5 * len(names))
    y = np.arange(len(names))
    for offset, values, label, colour in (
        (-0.19, drawn, "of the draws", "#c4cbd6"),
        (0.19, chosen, "of the trained", COLOURS[0]),
    ):
        bars = axes.barh(y + offset, values / max(1.0, values.sum()), 0.36, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.1%}" for value in values / max(1.0, values.sum())], fontsize=8, padding=3)
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, axes)
    _plain(axes)
    caption = "Share of each domain in everything that was drawn, and in everything that got a backward pass, so far."
    return Picture("shares", "Chosen share of each domain", caption, figure)


def losses(analysis: Analysis) -> Picture | None:
    """Mean losses of chosen and skipped sequences."""
    figure, (axes,) = _panels(1)
    known = 0
    for name, label, colour in (
        ("chosen_loss", "chosen", COLOURS[3]),
        ("skipped_loss", "skipped", COLOURS[0]),
        ("meta_loss", "whole meta-batch", GREY),
    ):
        points = [(s.iteration, getattr(s, name)) for s in analysis.stretches if _shows(s, name)]
        known += len(points)
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, label=label, **_marks(x))
    if not known:
        return None
    _shade(axes, analysis.stretches)
    _label(axes, "mean loss, nats per token")
    _legend(figure, axes)
    caption = (
        "Mean loss of the sequences chosen for a backward pass and of those skipped, as scored before the update. "
        "Shaded: iterations that train on everything."
    )
    return Picture("losses", "Losses of chosen and skipped sequences", caption, figure)


def times(analysis: Analysis) -> Picture:
    """Milliseconds of an iteration by part."""
    figure, (axes,) = _panels(1)
    parts = [name for name in PARTS if any(s.seconds.get(name, 0.0) > 0 for s in analysis.stretches)]
    edges = [s.iteration - s.iterations for s in analysis.stretches] + [analysis.stretches[-1].iteration]
    floor = np.zeros(len(analysis.stretches))
    each = np.asarray([s.iterations for s in analysis.stretches])
    spent = {name: 1e3 * np.asarray([s.seconds.get(name, 0.0) for s in analysis.stretches]) / each for name in parts}
    whole = 1e3 * np.asarray([s.elapsed for s in analysis.stretches]) / each
    spent["other"] = np.maximum(whole - sum(spent.values(), np.zeros(len(whole))), 0.0)
    for (name, value), colour in zip(spent.items(), (*COLOURS[: len(parts)], "#d4d7dc"), strict=True):
        axes.stairs(floor + value, edges, baseline=floor, fill=True, color=colour, label=name)
        floor = floor + value
    settled = np.sort(whole)[int(0.95 * (len(whole) - 1))]
    axes.set_ylim(0, 1.25 * max(settled, float(np.median(whole))))
    _label(axes, "ms per iteration")
    _legend(figure, axes)
    caption = (
        "Where the time of an iteration goes, on rank 0: scoring pass, forward and backward, exchange of losses and "
        "scores, data order, optimizer. Slow iterations, such as the first, may reach beyond the axis."
    )
    return Picture("time", "Time split", caption, figure)


def savings(analysis: Analysis) -> Picture | None:
    """Measured saving so far beside the predicted one."""
    saving = analysis.saving
    if not len(saving.iteration):
        return None
    figure, (axes,) = _panels(1)
    x = saving.iteration
    axes.plot(x, saving.time, color=COLOURS[3], label="time, measured so far", **_marks(x))
    axes.plot(x, saving.work, color=COLOURS[0], label="work, counted so far (backward = 2 forward)", **_marks(x))
    for value, style, label in ((saving.nominal, "--", "nominal"), (saving.calibrated, ":", "calibrated")):
        axes.axhline(
            value, color=GREY, linestyle=style, linewidth=1.3, label=f"predicted at the end, {label}: {value:.1%}"
        )
    shown = np.concatenate([saving.time, saving.work, [0.0, saving.nominal, saving.calibrated]])
    axes.set_ylim(max(float(np.min(shown)), LOWEST) - 0.05, float(np.max(shown)) + 0.07)
    _shade(axes, analysis.stretches)
    _label(axes, "saved of the plain run", percent=True)
    _legend(figure, axes, columns=2)
    source = "of this run's own unselecting iterations" if saving.plain_step_measured else "of the calibration"
    caption = (
        f"Saved so far against a plain run over the same draws, with the plain step {source} "
        f"({1e3 * saving.plain_step:.4g} ms). The opening annealing saves nothing, so the curves rise from 0."
    )
    return Picture("saving", "Predicted and measured saving", caption, figure)


def throughput(analysis: Analysis) -> Picture:
    """Tokens a second: forwarded, trained, and stood for."""
    figure, (axes,) = _panels(1)
    length, stretches = int(analysis.plan["seq_length"]), analysis.stretches
    x = [s.iteration for s in stretches]
    elapsed = np.maximum([s.elapsed for s in stretches], 1e-12)
    stood_for = np.diff([s.stood_for for s in stretches], prepend=np.nan)
    if stretches[0].iteration == stretches[0].iterations:
        stood_for[0] = stretches[0].stood_for
    for values, label, colour in (
        (
            [analysis.plan["scored_share"] * s.scored + s.trained for s in stretches],
            "forwarded (scored or trained)",
            COLOURS[0],
        ),
        ([s.trained for s in stretches], "trained", COLOURS[3]),
        (stood_for, "of the plain run that this stands for", COLOURS[2]),
    ):
        axes.plot(x, np.asarray(values, float) * length / elapsed, color=colour, label=label, **_marks(x))
    _shade(axes, stretches)
    _label(axes, "tokens per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _legend(figure, axes)
    caption = "Tokens a second of all ranks, without evaluations and saves. A plain run has one curve for all three."
    return Picture("throughput", "Throughput", caption, figure)


def validation(analysis: Analysis) -> Picture | None:
    """Validation losses by domain."""
    if not analysis.validation:
        return None
    figure, (axes,) = _panels(1)
    x = sorted(analysis.validation)
    names = dict.fromkeys(name for losses in analysis.validation.values() for name in losses)
    shown = [name for name in names if name in analysis.components or name == "mean"] or list(names)
    for number, name in enumerate(shown[: len(COLOURS)]):
        colour, thick = ("#30343b", 2.4) if name == "mean" else (COLOURS[number % len(COLOURS)], 1.6)
        y = [analysis.validation[iteration].get(name, np.nan) for iteration in x]
        axes.plot(x, y, label=name, color=colour, linewidth=thick, marker="o", markersize=3.5)
    _shade(axes, analysis.stretches)
    _label(axes, "validation loss, nats per token")
    _legend(figure, axes)
    caption = "Loss on held-out sequences of each domain, and the mean over domains."
    return Picture("validation", "Validation losses", caption, figure)


def _panels(count: int, height: float = HEIGHT) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _marks(x: Sequence[Any] | np.ndarray[Any, Any]) -> dict[str, Any]:
    """Dots where there are few points, so that one alone can be seen."""
    return {"linewidth": 1.6, "marker": "o" if len(x) <= 40 else None, "markersize": 3}


def _shows(stretch: Stretch, name: str) -> bool:
    """Whether a stretch tells a loss; where all are chosen, the whole meta-batch's is enough."""
    return getattr(stretch, name) is not None and (stretch.selecting or name == "meta_loss")


def _legend(figure: Figure, axes: Axes, columns: int = 8) -> None:
    """Above the panels, where no curve is."""
    handles, told = axes.get_legend_handles_labels()
    figure.legend(handles, told, loc="outside upper left", ncols=min(columns, len(told)), fontsize=8.5, frameon=False)


def _shade(axes: Axes, stretches: Sequence[Stretch]) -> None:
    for stretch in stretches:
        if not stretch.selecting:
            axes.axvspan(stretch.iteration - stretch.iterations, stretch.iteration, color=SHADE, zorder=0, linewidth=0)


def _label(axes: Axes, text: str, *, percent: bool = False) -> None:
    axes.set_xlabel("iteration")
    axes.set_ylabel(text)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
