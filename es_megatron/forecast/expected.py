"""What to expect of the loss, from runs that were measured (docs/results.md), or that nothing was."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.plan import Plan

COSTS = (0.55, 0.70)
"""Nominal costs, as shares of plain, for which what was measured at 0.625 is told."""
_LINK = "reference, `es-megatron reference` (docs/references.md)"
CLEAN, DAMAGED, COPIES = "clean text", "40% damaged", "half near copies"


class Regime(NamedTuple):
    """Passes over the blend for which cases were measured."""

    least: float
    most: float
    cases: Mapping[str, str]
    """By what the text is like."""


REGIMES = (
    Regime(0.8, 1.3, {DAMAGED: "once-damaged"}),
    Regime(2.5, 6.0, {CLEAN: "clean", DAMAGED: "damaged", COPIES: "copies"}),
    Regime(8.0, 14.0, {CLEAN: "ten"}),
)


@functools.cache
def measured() -> dict[str, Any]:
    """The proving blends' differences, by case, arm and what they are against: low, mean, high in nats a token."""
    return json.loads((files("es_megatron.forecast") / "expected.json").read_text(encoding="utf-8"))


def expected_loss(plan: Plan) -> list[str]:
    """Lines that say what was measured of such a run, against uniform at equal cost and against plain."""
    if not plan.evolving_iterations:
        return ["as of plain training: nothing is selected"]
    arm, regime = arm_of_tables(plan.config), regime_of(max(plan.passes))
    share = plan.cost / plan.plain_cost
    lines = _lines(arm, regime) if arm and regime and COSTS[0] <= share <= COSTS[1] else []
    if lines and regime:
        return [*lines, *_advice(arm, regime)]
    what = f"such a run (cost {share:.1%} of plain, {max(plan.passes):.1f} passes)"
    lines = [f"not measured for {what}: compare arms first, `es-megatron compare` (docs/results.md has what was)"]
    if plan.arm.scores and plan.config.reference.folder is None and max(plan.passes) > REGIMES[0].most:
        lines.append(f"text that is damaged, over several passes: try a {_LINK}")
    return lines


def way_of(config: EvolvedSamplingConfig) -> dict[str, Any]:
    """What decides how a run chooses, JSON-able: runs with equal ways are told by the same row of the tables."""
    names = ("arm", "policy", "policy_options", "correction", "decay", "pruning_ratio")
    told = {name: config.terms[name] for name in names}
    return {**told, "mixture": config.mixture, "scorer": config.scorer.kind, "floor": config.selection.weight_floor}


def arm_of_tables(config: EvolvedSamplingConfig) -> str | None:
    """What the tables call a run's way to choose; None where they do not have it."""
    way = way_of(config)
    return next((arm for arm, known in measured()["arms"].items() if known == way), None)


def regime_of(passes: float) -> Regime | None:
    """The cases whose number of passes is near."""
    return next((regime for regime in REGIMES if regime.least <= passes <= regime.most), None)


def _lines(arm: str, regime: Regime) -> list[str]:
    """What the cases of a regime have of an arm; empty where none has anything."""
    cases: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]] = measured()["cases"]
    lines: list[str] = []
    for text, case in regime.cases.items():
        found = cases.get(case, {}).get(arm, {})
        told = [f"{_interval(each)} against {name}" for name, each in found.items()]
        lines.append(f"{text}: {', '.join(told) if told else 'not measured'}")
    if not any(arm in cases.get(case, {}) for case in regime.cases.values()):
        return []
    how = (
        "nats a token, 95% intervals, at 62.5% of the cost, of tiny models on a CPU; your model and text: not measured"
    )
    return [*lines, how]


def _advice(arm: str | None, regime: Regime) -> list[str]:
    """What was best on the tuning blends, and what came of it on the proving ones, where that is another arm."""
    told: list[str] = []
    for text, case in regime.cases.items():
        best = measured()["best"].get(case)
        if best is None or best["arm"] == arm:
            continue
        if best["arm"] is None:
            told.append(f"{text}: nothing was better than `arm: uniform` on the tuning blends")
            continue
        there = (
            f"{_interval(best['proving'])} against uniform on the proving blend" if best["proving"] else "not proved"
        )
        with_it = f" with a {_LINK}" if measured()["arms"][best["arm"]]["policy"] == "reducible" else ""
        told.append(f"{text}: best on the tuning blends was `{best['arm']}`{with_it}, {there}")
    return told


def _interval(found: Sequence[float]) -> str:
    low, mean, high = found
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
