"""Figures of the scores in a run's newest checkpoint."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from es_megatron.report.figures import DOTS, WIDTH, Picture
from es_megatron.score_files.files import AGES, ScoreFiles, count_by_age, middles_of

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
    counts = [count_by_age(files, number) for number in numbers]
    fewer = "" if len(numbers) == len(sizes) else f" The {len(numbers)} largest of {len(sizes)} components."
    when = "that a run would begin with" if files.iteration is None else f"after {files.iteration} iterations"
    found = (
        [histograms(names, counts, f"{when}.{fewer}")]
        if any(each[:, slice(*POSITIVE)].any() for each in counts)
        else []
    )
    return [*found, ages(names, counts, [int(sizes[number]) for number in numbers], f"{when}.{fewer}")]


def histograms(names: list[str], counts: list[np.ndarray], when: str) -> Picture:
    """Scores of each component, coloured by visits."""
    values = middles_of(np.arange(*POSITIVE)).astype(np.float64)
    counts = [each[:, slice(*POSITIVE)] for each in counts]
    upto = np.cumsum(sum(each.sum(axis=0) for each in counts))
    low, high = (float(values[int(np.searchsorted(upto, share * upto[-1]))]) for share in (0.002, 0.998))
    edges = np.geomspace(low / 1.05, high * 1.05, SHOWN + 1)
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.1 * rows), dpi=DOTS, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    present = [any(each[age].any() for each in counts) for age in range(len(AGES))]
    for axes, name, each in zip(panels, names, counts, strict=False):
        floor = np.zeros(SHOWN)
        for age, label in enumerate(labels()):
            if not present[age]:
                continue
            height, _ = np.histogram(values, edges, weights=each[age])
            axes.stairs(floor + height, edges, baseline=floor, fill=True, color=AGE_COLOURS[age], label=label)
            floor = floor + height
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xscale("log")
        axes.set_xlim(edges[0], edges[-1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        ticks = _ticks(low, high)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("score, as stored (logarithmic)", fontsize=9)
    figure.supylabel("samples", fontsize=9)
    handles, told = panels[0].get_legend_handles_labels()
    figure.legend(handles, told, title="visits", fontsize=8, title_fontsize=8, frameon=False, loc="outside right upper")
    caption = f"Scores of the samples that have one, by the visits they have had, {when}"
    return Picture("scores", "Scores by component and age", caption, figure)


def ages(names: list[str], counts: list[np.ndarray], sizes: list[int], when: str) -> Picture:
    """Share of samples by visits."""
    figure = Figure(figsize=(WIDTH, 1.3 + 0.42 * len(names)), dpi=DOTS, layout="constrained")
    axes = figure.subplots()
    seen = np.asarray([each.sum(axis=1) for each in counts]) / np.asarray(sizes)[:, None]
    left = np.zeros(len(names))
    parts = [("0", UNSEEN, 1 - seen.sum(axis=1))]
    parts += [(label, AGE_COLOURS[age], seen[:, age]) for age, label in enumerate(labels())]
    for label, colour, share in parts:
        if not share.any():
            continue
        axes.barh(names, share, 0.62, left=left, color=colour, label=label, edgecolor="white", linewidth=0.6)
        left = left + share
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(title="visits", fontsize=8, title_fontsize=8, frameon=False, loc="outside right upper")
    caption = f"Share of each component's samples by how often a loss has updated their score (0: never), {when}"
    return Picture("ages", "Age of the scores", caption, figure)


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
