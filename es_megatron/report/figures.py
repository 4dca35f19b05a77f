"""The figures of a run's selection, time and saving; what there is nothing to draw for is left out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from es_megatron.report.analysis import PARTS, Analysis, thin
from es_megatron.report.control import Side
from es_megatron.report.drawing import (
    COLOURS,
    GREY,
    Form,
    Picture,
    broken,
    curve,
    label,
    plain,
    shade,
    time_axis,
)
from es_megatron.report.loss_figures import loss_and_cost, training, validation
from es_megatron.report.words import amount, duration, share
from es_megatron.trainer.metrics_file import Stretch

LOWEST = -0.6
"""Saving that the axis goes down to."""
FEW_POINTS = 30
"""Of shares, which vary from one meta-batch to the next."""


def draw_run(run: Side, control: Side | None = None) -> list[Picture]:
    """The figures that metrics alone give."""
    analysis = run.analysis
    if not analysis.stretches:
        return []
    found = [loss_and_cost(run, control), validation(run, control), shares(analysis, control)]
    found += [shares_over_time(analysis), losses(analysis), training(run, control)]
    found += [savings(analysis), times(analysis), throughput(analysis)]
    return [each for each in found if each is not None]


def shares_over_time(analysis: Analysis) -> Picture | None:
    """Trained sequences by component: as a share of the trained, and of what was drawn."""
    selecting = thin([s for s in analysis.stretches if s.selecting], FEW_POINTS)
    if not selecting:
        return None

    def draw(form: Form) -> Figure:
        figure, (left, right) = form.panels(2)
        for number, name in enumerate(analysis.components):
            colour = COLOURS[number % len(COLOURS)]
            trained = [s.chosen[name] / max(1, s.trained) for s in selecting]
            drawn = [s.drawn[name] / max(1, sum(s.drawn.values())) for s in selecting]
            rate = [s.chosen[name] / s.drawn[name] if s.drawn[name] else None for s in selecting]
            curve(left, *broken(selecting, trained), color=colour, label=name)
            curve(left, *broken(selecting, drawn), color=colour, linestyle=":", linewidth=1.1, markersize=0)
            curve(right, *broken(selecting, rate), color=colour)
        right.axhline(analysis.plan["kept"] / analysis.plan["meta_batch"], color=GREY, linestyle="--", linewidth=1)
        label(left, "share of the trained", percent=True)
        label(right, "trained of those drawn", percent=True)
        form.legend(figure, left)
        return figure

    caption = (
        "First: of the sequences that got a backward pass, the share of each component; dotted: its share of the "
        "draws. Second: of the sequences drawn from a component, the share that was trained; dashed: b/B, what a "
        "uniform choice takes. Selecting iterations only."
    )
    return Picture("selection", "What was selected, by component", caption, draw)


def shares(analysis: Analysis, control: Side | None) -> Picture:
    """Share of draws and of trained sequences by component, over the whole run so far."""
    names = analysis.components
    kinds = [("drawn", _parts(analysis, "drawn"), "#c4cbd6"), ("trained", _parts(analysis, "chosen"), COLOURS[0])]
    if control is not None and set(control.analysis.components) == set(names):
        kinds.append(("trained by the control", _parts(control.analysis, "chosen", names), COLOURS[1]))
    tall = 0.8 / len(kinds)

    def draw(form: Form) -> Figure:
        figure, (axes,) = form.panels(1, 1.2 + 0.25 * len(kinds) * len(names) * (1.25 if form.stacked else 1))
        y = np.arange(len(names))
        for number, (name, values, colour) in enumerate(kinds):
            bars = axes.barh(y + (number - (len(kinds) - 1) / 2) * tall, values, tall, color=colour, label=name)
            axes.bar_label(bars, [f"{value:.1%}" for value in values], fontsize=8, padding=3)
        axes.set_yticks(y, [name if len(name) <= 14 or not form.stacked else f"{name[:13]}…" for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        form.legend(figure, axes)
        plain(axes)
        return figure

    caption = (
        "Share of each component in everything that was drawn, and in everything that got a backward pass, so far. "
        "Where they differ the run has trained on another mixture than the blend asks for."
    )
    return Picture("shares", "Trained against drawn share of each component", caption, draw)


def _parts(analysis: Analysis, what: str, names: tuple[str, ...] = ()) -> np.ndarray:
    counts = [sum(getattr(s, what).get(name, 0) for s in analysis.stretches) for name in names or analysis.components]
    return np.asarray(counts, float) / max(1, sum(counts))


def losses(analysis: Analysis) -> Picture | None:
    """Mean losses of chosen and skipped sequences."""
    shown = [
        (name, [getattr(s, name) if _shows(s, name) else None for s in analysis.stretches], colour, text)
        for name, text, colour in (
            ("chosen_loss", "chosen", COLOURS[3]),
            ("skipped_loss", "skipped", COLOURS[0]),
            ("meta_loss", "whole meta-batch", GREY),
        )
    ]
    if not any(value is not None for _, values, *_ in shown for value in values):
        return None

    def draw(form: Form) -> Figure:
        figure, (axes,) = form.panels(1)
        for _, values, colour, text in shown:
            curve(axes, *broken(analysis.stretches, values), color=colour, label=text)
        shade(axes, analysis.stretches)
        label(axes, "mean loss, nats per token")
        time_axis(axes, analysis)
        form.legend(figure, axes)
        return figure

    caption = (
        "Mean loss of the sequences chosen for a backward pass and of those skipped, before the update, of the "
        "iterations in which each was measured; no line where it was not. Shaded: iterations that train on everything."
    )
    return Picture("losses", "Losses of chosen and skipped sequences", caption, draw)


def times(analysis: Analysis) -> Picture:
    """Milliseconds of an iteration by part."""
    stretches = analysis.stretches
    parts = [name for name in PARTS if any(s.seconds.get(name, 0.0) > 0 for s in stretches)]
    each = np.asarray([s.iterations for s in stretches])
    spent = {name: 1e3 * np.asarray([s.seconds.get(name, 0.0) for s in stretches]) / each for name in parts}
    whole = 1e3 * np.asarray([s.elapsed for s in stretches]) / each
    spent["other"] = np.maximum(whole - sum(spent.values(), np.zeros(len(whole))), 0.0)
    settled = max(float(np.sort(whole)[int(0.95 * (len(whole) - 1))]), float(np.median(whole)))

    def draw(form: Form) -> Figure:
        figure, (axes,) = form.panels(1)
        floor = np.zeros(len(stretches))
        for (name, value), colour in zip(spent.items(), (*COLOURS[: len(parts)], "#d4d7dc"), strict=True):
            _blocks(axes, stretches, floor, value, color=colour, label=name)
            floor = floor + value
        axes.set_ylim(0, 1.25 * settled)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value / 1e3) if value else "0"))
        label(axes, "time of an iteration")
        form.legend(figure, axes)
        return figure

    caption = (
        "Where the time of an iteration goes, on rank 0: scoring pass, forward and backward, exchange of losses and "
        "scores, data order, optimizer. Slow iterations, such as the first, may reach beyond the axis."
    )
    return Picture("time", "Time split", caption, draw)


def _blocks(axes: Axes, stretches: tuple[Stretch, ...], floor: np.ndarray, value: np.ndarray, **style: Any) -> None:
    """Blocks over the iterations of each stretch; nothing where lines are missing."""
    begin = np.asarray([s.iteration - s.iterations for s in stretches], float)
    end = np.asarray([s.iteration for s in stretches], float)
    x = np.column_stack([begin, end]).ravel()
    low, high = np.repeat(floor, 2), np.repeat(floor + value, 2)
    gaps = 2 * np.flatnonzero(begin[1:] != end[:-1]) + 2
    x, low, high = (np.insert(each, gaps, np.nan) for each in (x, low, high))
    axes.fill_between(x, low, high, linewidth=0, **style)


def savings(analysis: Analysis) -> Picture | None:
    """What was saved so far beside what was predicted."""
    saving = analysis.saving
    if not len(saving.iteration):
        return None
    x = saving.iteration
    shown = np.concatenate([saving.time, saving.work, [0.0, saving.nominal, saving.calibrated]])

    def draw(form: Form) -> Figure:
        figure, (axes,) = form.panels(1)
        if len(saving.time):
            curve(axes, x, saving.time, color=COLOURS[3], label="time, measured so far")
        curve(axes, x, saving.work, color=COLOURS[0], label="work, counted so far")
        for value, style, name in ((saving.nominal, "--", "nominal"), (saving.calibrated, ":", "calibrated")):
            told = f"predicted, {name}: {value:.1%}"
            axes.axhline(value, color=GREY, linestyle=style, linewidth=1.3, label=told)
        axes.set_ylim(max(float(np.min(shown)), LOWEST) - 0.05, float(np.max(shown)) + 0.07)
        shade(axes, analysis.stretches)
        label(axes, "saved of the plain run", percent=True)
        time_axis(axes, analysis)
        form.legend(figure, axes, columns=2)
        return figure

    time = (
        f"Time is not shown: {saving.doubt}."
        if saving.doubt
        else f"Time is against the run's own plain steps at the same load ({duration(saving.plain_step)})."
    )
    caption = (
        "Saved so far against a plain run over the same draws, and what was predicted for the end. Work is counted in "
        f"sequences, backward = 2 forward. {time} The opening annealing saves nothing, so curves rise from 0."
    )
    return Picture("saving", f"What was saved: {share(saving.counted)} of the work so far", caption, draw)


def throughput(analysis: Analysis) -> Picture:
    """Tokens a second: forwarded, trained, and stood for."""
    length, stretches = int(analysis.plan["seq_length"]), analysis.stretches
    elapsed = np.maximum([s.elapsed for s in stretches], 1e-12)
    stood_for = np.diff([s.stood_for for s in stretches], prepend=np.nan)
    gaps = [s.iteration - s.iterations != last.iteration for last, s in pairwise(stretches)]
    stood_for[1:][gaps] = np.nan
    if stretches[0].iteration == stretches[0].iterations:
        stood_for[0] = stretches[0].stood_for
    price = analysis.plan["scored_share"]

    def draw(form: Form) -> Figure:
        figure, (axes,) = form.panels(1)
        for values, text, colour in (
            ([price * s.scored + s.trained for s in stretches], "scored or trained", COLOURS[0]),
            ([s.trained for s in stretches], "trained", COLOURS[3]),
            (stood_for, "of the plain run, stood for", COLOURS[2]),
        ):
            rate = (np.asarray(values, float) * length / elapsed).tolist()
            curve(axes, *broken(stretches, rate), color=colour, label=text)
        shade(axes, stretches)
        label(axes, "tokens per second")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        time_axis(axes, analysis)
        form.legend(figure, axes)
        return figure

    caption = (
        "Tokens a second of all ranks, without evaluations and saves: forwarded (scored or trained), trained, and of "
        "the plain run that they stand for. A plain run has one curve for all three."
    )
    return Picture("throughput", "Throughput", caption, draw)


def _shows(stretch: Stretch, name: str) -> bool:
    """Whether a stretch tells a loss; where all are chosen, the whole meta-batch's is enough."""
    return stretch.selecting or name == "meta_loss"
