"""Merged scoring against history at what an iteration costs over stages: measured with two, simulated with eight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.findings import interval
from es_megatron.bench.kept import KeptRuns
from es_megatron.bench.results import Results
from es_megatron.core.plan import Layout

MICRO_BATCHES = 8
KEPT = {"history": 5, "excess": 5, "merged-2": 3, "excess-merged-2": 3, "merged-8": 4, "excess-merged-8": 4}
"""Micro-batches of 8 that an arm trains while it selects."""
STAGES = {
    2: ("history", "merged-2", "excess", "excess-merged-2"),
    8: ("history", "merged-8", "excess", "excess-merged-8"),
}
"""Arms whose budgets were set for so many stages."""


class Row(NamedTuple):
    """One arm over so many stages."""

    stages: int
    arm: str
    kept: int
    time: float
    """Of the whole run, as a share of the plain run's, mean over seeds and cases."""
    how: str


def prices(measured: Path) -> dict[int, dict[str, float]]:
    """Time of a selecting iteration as a share of a plain one, by number of stages and arm.

    Args:
        measured: outputs of `python -m benchmarks.step --scorer fresh --pipeline 2 --micro-batches 8 --json` by b/B.
    """
    found: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
    layout = Layout(MICRO_BATCHES, MICRO_BATCHES, 8)
    two: dict[str, float] = {}
    eight: dict[str, float] = {}
    for arm, kept in KEPT.items():
        share = kept / MICRO_BATCHES
        way = "merged" if "merged" in arm else "history"
        if f"{share:g}" in found:
            two[arm] = 1 - found[f"{share:g}"]["pipeline_2"]["arms"][way]["saving"]
        eight[arm] = (layout.merged(share) if way == "merged" else layout.training(share)) / layout.whole()
    return {2: two, 8: eight}


def rows(kept: KeptRuns, measured: Path) -> Iterator[Row]:
    """What the runs of each arm took, were their iterations as long as those over stages."""
    for stages, price in prices(measured).items():
        for arm in STAGES[stages]:
            shares = [
                run_time(outcome.summary, KEPT[arm], price[arm])
                for task, outcome in kept.outcomes.items()
                if task.arm == arm
            ]
            if shares:
                how = "simulated" if stages == 8 else "measured"
                yield Row(stages, arm, KEPT[arm], sum(shares) / len(shares), how)


def run_time(summary: Mapping[str, Any], kept: int, price: float) -> float:
    """Time of a run as a share of the plain run's.

    Args:
        summary: of the run.
        kept: micro-batches that it trains while it selects.
        price: of a selecting iteration, a plain one being 1.
    """
    trained, every = summary["sequences_trained"], summary["meta_batch"]
    chosen = kept * every // MICRO_BATCHES
    whole = (trained - summary["iterations"] * chosen) / (every - chosen)
    return (whole + (summary["iterations"] - whole) * price) / summary["plain_iterations"]


def table(results: Results, kept: KeptRuns, measured: Path) -> str:
    """Loss and time of each arm, in Markdown."""
    cases = [case for case in results.cases if any(arm.losses for arm in case.arms.values())]
    head = [
        "stages",
        "arm",
        "trained of 8 micro-batches",
        "time of plain",
        *(f"{case.case}: against history" for case in cases),
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows(kept, measured):
        cells = [f"{row.stages}", f"`{row.arm}`", f"{row.kept}", f"{row.time:.1%} ({row.how})"]
        for case in cases:
            against = case.arms[row.arm].against.get("history")
            told = "" if row.arm == "history" else interval(against if against and against.seeds else None)
            cells.append(told)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
