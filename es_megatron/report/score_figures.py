"""Figures of the scores in a run's newest checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from es_megatron.algorithm.evolution import usable_scores
from es_megatron.report.drawing import Form, Picture
from es_megatron.report.words import amount
from es_megatron.score_files.files import AGES, Float32, ScoreFiles, UInt8, count_by_age, middles_of

AGE_COLOURS = ("#d3e1ee", "#a9c5df", "#7fa8cd", "#4878a8", "#2f5579", "#1b3350")
UNSEEN = "#eceff2"
POSITIVE = (0x0080, 0x7F80)
"""Bins of the scores above 0: those of normal, finite, positive floats."""
SHOWN = 40
"""Bins of a histogram as drawn."""
MOST_COMPONENTS = 8
COLUMNS = 2


def draw_scores(files: ScoreFiles) -> list[Picture]:
    """Histograms of the scores of each component and age, and the ages; reads all scores once."""
    sizes = files.manifest.sizes
    numbers = sorted(np.argsort(-sizes, kind="stable")[:MOST_COMPONENTS].tolist())
    names = [files.manifest.components[number].name for number in numbers]
    decay = decay_of(files)

    def debiased(score: Float32, visits: UInt8) -> Float32:
        return usable_scores(score, visits, decay, 1.0 / files.manifest.total, "debiased", 0.0)

    use = None if np.isnan(decay) else debiased
    counts = [count_by_age(files, number, use) for number in numbers]
    fewer = "" if len(numbers) == len(sizes) else f" The {len(numbers)} largest of {len(sizes)} components."
    when = "that a run would begin with" if files.iteration is None else f"after {files.iteration} iterations"
    how = (
        "as stored, with the share of the start value that few visits leave in it"
        if use is None
        else f"debiased: without the start value, (s - beta2^k / n) / (1 - beta2^k) after k visits, beta2 = {decay:g}"
    )
    found = (
        [histograms(names, counts, "stored" if use is None else "debiased", f"{how}; {when}.{fewer}")]
        if any(each[:, slice(*POSITIVE)].any() for each in counts)
        else []
    )
    return [*found, ages(names, counts, [int(sizes[number]) for number in numbers], f"{when}.{fewer}")]


def decay_of(files: ScoreFiles) -> float:
    """beta2 of the run that made the scores; nan where they do not tell, as imported ones."""
    terms: dict[str, Any] = files.state.get("engine", {}).get("terms", {})
    return float(terms.get("decay", np.nan))


def histograms(names: list[str], counts: list[np.ndarray], kind: str, when: str) -> Picture:
    """Scores of each component, coloured by visits."""
    values = middles_of(np.arange(*POSITIVE)).astype(np.float64)
    counts = [each[:, slice(*POSITIVE)] for each in counts]
    upto = np.cumsum(sum(each.sum(axis=0) for each in counts))
    low, high = (float(values[int(np.searchsorted(upto, share * upto[-1]))]) for share in (0.002, 0.998))
    edges = np.geomspace(low / 1.05, high * 1.05, SHOWN + 1)
    present = [any(each[age].any() for each in counts) for age in range(len(AGES))]
    heights = [[np.histogram(values, edges, weights=each[age])[0] for age in range(len(AGES))] for each in counts]

    def draw(form: Form) -> Figure:
        columns = min(1 if form.stacked else COLUMNS, len(names))
        rows = -(-len(names) // columns)
        size = (form.width, 1.2 + 1.7 * rows if form.stacked else 0.7 + 2.1 * rows)
        figure = Figure(figsize=size, dpi=form.dots, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name, height in zip(panels, names, heights, strict=False):
            _stack(axes, height, edges, present)
            axes.set_title(name, fontsize=10, loc="left")
            ticks = _ticks(low, high)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        figure.supxlabel(f"{kind} score (logarithmic)", fontsize=9)
        figure.supylabel("samples", fontsize=9)
        _legend(figure, panels[0], form)
        return figure

    caption = f"Scores of the samples that have one, by the visits they have had, {when}"
    return Picture("scores", "Scores by component and age", caption, draw)


def _stack(axes: Axes, heights: list[np.ndarray], edges: np.ndarray, present: list[bool]) -> None:
    floor = np.zeros(SHOWN)
    for age, name in enumerate(labels()):
        if present[age]:
            height = floor + heights[age]
            axes.stairs(height, edges, baseline=floor, fill=True, color=AGE_COLOURS[age], label=name)
            floor = height
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _legend(figure: Figure, axes: Axes, form: Form) -> None:
    handles, told = axes.get_legend_handles_labels()
    place: dict[str, Any] = (
        {"loc": "outside upper left", "ncols": 4} if form.stacked else {"loc": "outside right upper"}
    )
    figure.legend(handles, told, title="visits", fontsize=8, title_fontsize=8, frameon=False, **place)


def ages(names: list[str], counts: list[np.ndarray], sizes: list[int], when: str) -> Picture:
    """Share of samples by visits."""
    seen = np.asarray([each.sum(axis=1) for each in counts]) / np.asarray(sizes)[:, None]
    parts = [("0", UNSEEN, 1 - seen.sum(axis=1))]
    parts += [(name, AGE_COLOURS[age], seen[:, age]) for age, name in enumerate(labels())]

    def draw(form: Form) -> Figure:
        height = (1.9 if form.stacked else 1.3) + 0.42 * len(names)
        figure = Figure(figsize=(form.width, height), dpi=form.dots, layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(names))
        for name, colour, share in parts:
            if not share.any():
                continue
            axes.barh(names, share, 0.62, left=left, color=colour, label=name, edgecolor="white", linewidth=0.6)
            left = left + share
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        _legend(figure, axes, form)
        return figure

    caption = f"Share of each component's samples by how often a loss has updated their score (0: never), {when}"
    return Picture("ages", "Age of the scores", caption, draw)


def labels() -> list[str]:
    """The ranges of visits, as told."""
    return [
        f"{first}" if first == last and last < 255 else f"{first}-{last}" if last < 255 else "255 or more"
        for first, last in AGES
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Round values in a range, few enough to be read."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        found = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
        if len(found) <= 6:
            return found
    return found[:: -(-len(found) // 6)]
