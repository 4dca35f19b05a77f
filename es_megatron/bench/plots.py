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
            files.append(folder / f"{case.case}-differences.png")
            _forest(plt, results, case, arms, files[-1])
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


def _forest(pyplot: Any, results: Results, case: CaseResult, arms: list[ArmResult], file: Path) -> None:
    """Paired differences to every reference, a panel each: the mean over the domains, and each domain beside it."""
    references = results.spec.references
    domains = list(dict.fromkeys(name for arm in arms for name in arm.domains))
    height = 1.6 + len(arms) * (0.25 + 0.1 * len(domains))
    figure, axes = pyplot.subplots(1, len(references), figsize=(4.2 * len(references) + 1.5, height), squeeze=False)
    for axis, reference in zip(axes[0], references, strict=True):
        for place, arm in enumerate(arms):
            if reference not in arm.against:
                continue
            found = [arm.against[reference], *(arm.domains_against[reference].get(name) for name in domains)]
            for number, one in enumerate(found):
                if one is None or not one.seeds:
                    continue
                half = one.high - one.mean if math.isfinite(one.high) else 0.0
                mean = number == 0
                at = place + 0.7 * number / max(1, len(found))
                axis.errorbar(
                    one.mean, at, xerr=half, fmt="s" if mean else "o", capsize=3 if mean else 2,
                    color="black" if mean else f"C{number - 1}", markersize=5 if mean else 3,
                )  # fmt: skip
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(arms)), [arm.arm for arm in arms])
        axis.invert_yaxis()
        axis.set_xlabel(f"loss - loss of {reference}, nats per token")
        axis.grid(alpha=0.3, axis="x")
    handles = [pyplot.Line2D([], [], color="black", marker="s", linestyle="", label="mean over the domains")]
    handles += [
        pyplot.Line2D([], [], color=f"C{number}", marker="o", markersize=4, linestyle="", label=name)
        for number, name in enumerate(domains)
    ]
    axes[0][-1].legend(handles=handles, fontsize=7, loc="best")
    figure.suptitle(f"{results.spec.path.stem}, {case.case}: paired differences over seeds, 95%", fontsize=10)
    _save(pyplot, figure, file)


def _save(pyplot: Any, figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
