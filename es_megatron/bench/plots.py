"""Plots of a comparison: loss against cost and trained tokens, and differences by domain."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from es_megatron.bench.results import ArmResult, CaseResult, Results

MEGA = 1e-6


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what the finished runs say as PNG files, two for each case; nothing where matplotlib is not installed.

    Args:
        results: of the comparison.
        folder: made if it is not there.

    Returns:
        The files.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for case in results.cases:
        arms = [arm for arm in case.arms.values() if arm.losses]
        if not arms:
            continue
        files.append(folder / f"{case.case}-loss.png")
        _losses(plt, results, case, arms, files[-1])
        if results.spec.references:
            files.append(folder / f"{case.case}-domains.png")
            _domains(plt, results, case, arms, files[-1])
    return files


def _losses(pyplot: Any, results: Results, case: CaseResult, arms: list[ArmResult], file: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    title = f"cost, share of plain (backward = {results.units.backward:.2f} forward)"
    axes: list[tuple[Any, str, Callable[[ArmResult], float]]] = [
        (left, title, lambda arm: arm.cost),
        (right, "tokens trained, millions", lambda arm: MEGA * arm.trained),
    ]
    for axis, label, place in axes:
        for number, arm in enumerate(arms):
            spread = arm.spread if math.isfinite(arm.spread) else 0.0
            axis.errorbar(place(arm), arm.loss, spread, fmt="o", capsize=3, color=f"C{number % 10}")
            axis.annotate(arm.arm, (place(arm), arm.loss), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    left.set_ylabel("validation loss, nats per token")
    figure.suptitle(f"{results.spec.path.stem}, {case.case}: mean and standard deviation over seeds")
    _save(pyplot, figure, file)


def _domains(pyplot: Any, results: Results, case: CaseResult, arms: list[ArmResult], file: Path) -> None:
    """Difference of every arm to the first reference, by domain, with 95% intervals."""
    reference = results.spec.references[0]
    others = [arm for arm in arms if reference in arm.domains_against]
    names = list(dict.fromkeys(name for arm in others for name in arm.domains_against[reference]))
    figure, axis = pyplot.subplots(figsize=(max(6.0, 0.9 * len(others) + 2), 4.5))
    for number, name in enumerate(names):
        found = [arm.domains_against[reference].get(name) for arm in others]
        places = [at + 0.8 * (number + 0.5) / len(names) - 0.4 for at in range(len(others))]
        shown = [(place, one) for place, one in zip(places, found, strict=True) if one is not None and one.seeds]
        halves = [one.high - one.mean if math.isfinite(one.high) else 0.0 for _, one in shown]
        means = [one.mean for _, one in shown]
        axis.errorbar([place for place, _ in shown], means, halves, fmt="o", capsize=3, markersize=4, label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(others)), [arm.arm for arm in others], rotation=30, ha="right")
    axis.set_ylabel(f"loss - loss of {reference}, nats per token")
    axis.set_title(f"{results.spec.path.stem}, {case.case}: paired difference by domain, 95%", fontsize=10)
    axis.grid(alpha=0.3, axis="y")
    if names:
        axis.legend(fontsize=8)
    _save(pyplot, figure, file)


def _save(pyplot: Any, figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
