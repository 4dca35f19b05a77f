"""The figures of a run's losses, with a control's laid over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from es_megatron.report.analysis import Analysis
from es_megatron.report.control import Side, domains, mean_losses
from es_megatron.report.drawing import COLOURS, DARK, GREY, Form, Picture, broken, curve, label, shade, time_axis
from es_megatron.report.words import time_unit
from es_megatron.trainer.metrics_file import Stretch

DASHED = "--"
"""The control's lines."""


def loss_and_cost(run: Side, control: Side | None) -> Picture | None:
    """Mean validation loss against work and against time."""
    names = domains(run)
    sides = [(run, "this run", COLOURS[3], "-")]
    if control is not None:
        names = tuple(name for name in names if name in domains(control))
        sides.append((control, f"control, {control.analysis.plan['arm']}", GREY, DASHED))
    sides = [(side, *style) for side, *style in sides if side.analysis.course.whole and mean_losses(side, names)]
    if not names or not any(side is run for side, *_ in sides):
        return None
    size, unit = time_unit(max(float(side.analysis.course.seconds[-1]) for side, *_ in sides))

    def draw(form: Form) -> Figure:
        figure, (left, right) = form.panels(2)
        for side, text, colour, style in sides:
            found = mean_losses(side, names)
            at, course = list(found), side.analysis.course
            for axes, x in ((left, course.work_at(at) / run.plain_work), (right, course.seconds_at(at) / size)):
                curve(axes, x, list(found.values()), color=colour, label=text, linestyle=style, markersize=4)
        label(left, "mean validation loss", x="work, of the plain run's")
        left.xaxis.set_major_formatter(PercentFormatter(1.0))
        label(right, "nats per token", x=f"time in iterations, {unit}")
        form.legend(figure, left)
        return figure

    caption = (
        "Mean validation loss over the domains, in nats per token, against the work that it took (counted, backward = "
        "2 forward) and against the time. Times of two runs compare only where their machines had the same load. A "
        "loss before the end of a rate schedule is higher than that of a run which ends there."
    )
    return Picture("worth", "Loss against cost", caption, draw)


def validation(run: Side, control: Side | None) -> Picture | None:
    """Validation losses by domain."""
    analysis = run.analysis
    if not analysis.validation:
        return None
    names = dict.fromkeys(name for losses in analysis.validation.values() for name in losses)
    shown = [name for name in names if name in analysis.components or name == "mean"] or list(names)
    shown = [*[name for name in shown if name != "mean"][: len(COLOURS)], *(["mean"] if "mean" in shown else [])]

    def draw(form: Form) -> Figure:
        figure, (axes,) = form.panels(1, 4.0)
        for number, name in enumerate(shown):
            colour, thick = (DARK, 2.4) if name == "mean" else (COLOURS[number % len(COLOURS)], 1.6)
            curve(axes, *_validated(analysis, name), label=name, color=colour, linewidth=thick, markersize=3.5)
            if control is not None:
                style = {"color": colour, "linewidth": 0.7 * thick, "linestyle": DASHED, "markersize": 2}
                curve(axes, *_validated(control.analysis, name), **style)
        shade(axes, analysis.stretches)
        label(axes, "validation loss, nats per token")
        time_axis(axes, analysis)
        form.legend(figure, axes)
        return figure

    more = "" if control is None else f" Dashed: the control, {control.name}, by its own iterations."
    caption = f"Loss on held-out sequences of each domain, and the mean over domains.{more}"
    return Picture("validation", "Validation losses", caption, draw)


def _validated(analysis: Analysis, name: str) -> tuple[Sequence[float], Sequence[float]]:
    x = sorted(analysis.validation)
    return x, [analysis.validation[iteration].get(name, math.nan) for iteration in x]


def training(run: Side, control: Side | None) -> Picture:
    """Training loss, learning rate and norm of the gradients."""
    panels = (("lm_loss", "training loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm"))
    panels = tuple(each for each in panels if any(getattr(s, each[0]) is not None for s in run.analysis.stretches))
    panels = panels or (("lr", "learning rate"),)

    def draw(form: Form) -> Figure:
        figure, all_axes = form.panels(len(panels), 3.0)
        for axes, (name, text) in zip(all_axes, panels, strict=True):
            curve(axes, *_told(run.analysis.stretches, name), color=COLOURS[0], label="this run")
            if control is not None:
                style = {"color": GREY, "linestyle": DASHED, "label": "control", "linewidth": 1.2}
                curve(axes, *_told(control.analysis.stretches, name), **style)
            shade(axes, run.analysis.stretches)
            label(axes, f"{text}, nats per token" if name == "lm_loss" else text)
            if name == "lr":
                axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        if control is not None:
            form.legend(figure, all_axes[0])
        return figure

    caption = (
        "Mean loss of the sequences that were trained, between log lines: where a run trains on the hard ones it is "
        "higher than a plain run's, and says little beside it. Learning rate, and norm of the gradients before "
        "clipping, of the last optimizer step of each stretch."
    )
    return Picture("training", "Training loss, rate and gradient norm", caption, draw)


def _told(stretches: Sequence[Stretch], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A curve; a training loss is of all iterations since the log line before, so stretches without one are no gap."""
    x, y = broken(stretches, [getattr(s, name) for s in stretches])
    ends = {s.iteration for s in stretches if getattr(s, name) is None} if name == "lm_loss" else set()
    kept = np.asarray([not (math.isnan(value) and at in ends) for at, value in zip(x, y, strict=True)], bool)
    return x[kept], y[kept]
