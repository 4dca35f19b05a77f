"""The results of a comparison as one HTML page, which needs nothing but a browser."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from es_megatron.bench.results import ArmResult, CaseResult, Results
from es_megatron.bench.statistics import PairedDifference
from es_megatron.bench.table import difference_words, number, share

WORDS = {"wins": "better", "loses": "worse", "ties": "not told apart", "open": "open"}
MARGIN = 4.0
"""Per cent of a forest's width that stay free at each side."""


class Bar(NamedTuple):
    """A row of a forest; places in per cent of its width."""

    arm: str
    verdict: str
    low: float
    mean: float
    high: float
    words: str


def page(results: Results) -> str:
    """The page.

    Raises:
        ImportError: jinja2 is missing, which the extra `report` brings.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("es_megatron.bench", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    spec = results.spec
    shown = [_section(results, case) for case in results.cases if any(arm.losses for arm in case.arms.values())]
    return environment.get_template("page.html.j2").render(
        title=f"es_megatron: {spec.path.stem}",
        subtitle=f"{results.finished} of {spec.runs} runs, {len(spec.seeds)} paired seeds",
        references=spec.references,
        sections=shown,
        backward=f"{results.units.backward:.2f}",
        scoring=f"{results.units.scoring:.2f}",
    )


def _section(results: Results, case: CaseResult) -> dict[str, Any]:
    references = results.spec.references
    arms = [arm for arm in case.arms.values() if arm.losses]
    rows = [
        {
            "arm": arm.arm,
            "cells": [share(arm.cost), share(arm.nominal_cost), number(arm.loss, ".4f")],
            "against": [difference_words(arm.against[name]) if name in arm.against else "" for name in references],
        }
        for arm in arms
    ]
    first = references[0] if references else ""
    others = [arm for arm in arms if first in arm.against and arm.against[first].seeds]
    return {
        "case": case.case,
        "rows": rows,
        "reference": first,
        "bars": _bars(others, first),
        "zero": _scale(others, first)(0.0),
        "headline": [f"{arm.arm}: {_sentence(arm.against[first], first)}" for arm in others],
    }


def _sentence(difference: PairedDifference, reference: str) -> str:
    if difference.verdict == "open":
        return f"open against {reference}, {difference.seeds} seeds so far"
    if difference.verdict == "ties":
        return f"not told apart from {reference} ({difference.mean:+.3f} nats)"
    side = "below" if difference.mean < 0 else "above"
    return f"{abs(difference.mean):.3f} nats {side} {reference}"


def _scale(arms: list[ArmResult], reference: str) -> Any:
    """From nats to per cent of the forest's width; 0 is always within."""
    ends = [0.0]
    for arm in arms:
        one = arm.against[reference]
        ends += [value for value in (one.low, one.mean, one.high) if math.isfinite(value)]
    low, width = min(ends), (max(ends) - min(ends)) or 1.0
    return lambda value: round(MARGIN + (100 - 2 * MARGIN) * (value - low) / width, 2)


def _bars(arms: list[ArmResult], reference: str) -> list[Bar]:
    place = _scale(arms, reference)
    found: list[Bar] = []
    for arm in arms:
        one = arm.against[reference]
        low, high = (value if math.isfinite(value) else one.mean for value in (one.low, one.high))
        words = f"{difference_words(one)}: {WORDS[one.verdict]}"
        found.append(Bar(arm.arm, one.verdict, place(low), place(one.mean), place(high), words))
    return found
