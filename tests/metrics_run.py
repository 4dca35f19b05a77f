"""Folders of runs as the trainer writes them, without a model: metrics of iterations made up by rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from es_megatron.core.metrics import plan_facts
from es_megatron.core.plan import Layout, Plan, plan_run
from es_megatron.core.step import StepRecord
from es_megatron.data.manifest import Manifest
from es_megatron.trainer.backend import Iteration
from es_megatron.trainer.metrics_file import MetricsFile
from es_megatron.trainer.settings import SETTINGS
from tests.es_config import es_config
from tests.unit.naive import make_manifest

B, SECONDS = 32, 0.3
MANIFEST = make_manifest((400, 90, 20))
LAYOUT = Layout(8, 8, forward=0.01, backward=0.02, scoring_forward=0.01)


def plan_of(manifest: Manifest = MANIFEST, **settings: Any) -> Plan:
    return plan_run(es_config(preset="paper", **settings), manifest, B, 4, 4 * manifest.total)


def step(plan: Plan, number: int) -> tuple[StepRecord, Iteration, float]:
    """An iteration whose scoring costs a third of the training, and whose domain 1 is chosen twice as often."""
    random = np.random.default_rng(number)
    weight = [0.7, 0.2, 0.1] + [0.0] * (len(plan.schedule.manifest.components) - 3)
    drawn = np.sort(random.choice(len(weight), B, p=weight)).astype(np.int64)
    evolving = plan.arm.selects and plan.schedule.phases.evolving(number)
    chosen = np.sort(np.argsort(-(1.0 + (drawn == 1)) * random.random(B))[: plan.kept]) if evolving else np.arange(B)
    scored = B if evolving and plan.arm.scores else 0
    seconds = {"score": scored / B * SECONDS / 3, "train": len(chosen) / B * SECONDS, "order": 0.001}
    known = bool(scored) or not evolving
    loss, of_skipped = (5.0 - 0.01 * number if known else math.nan), (4.5 if scored else math.nan)
    record = StepRecord(
        number, evolving, scored, chosen, drawn[chosen], loss, loss + 0.5, 0, seconds, drawn, of_skipped
    )
    return record, Iteration(4.0, 1, True, 1.0, 1e-3, 0.002), sum(seconds.values()) + 0.002


def usual(number: int) -> float:
    """The load of a machine that is the run's own: none of an iteration's time is another's."""
    return 1.0


def write_run(
    directory: Path,
    plan: Plan,
    upto: int,
    start: int = 0,
    interval: int = 5,
    *,
    load: Callable[[int], float] = usual,
    above: float = 0.0,
) -> None:
    """What the trainer writes of iterations `start` up to `upto`.

    Args:
        directory: of the run.
        plan: of the run.
        upto: iterations finished in the end.
        start: iteration that it resumes at.
        interval: iterations between log lines.
        load: times that each iteration takes longer.
        above: added to the validation losses, which fall with the iterations.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = MetricsFile(directory, plan, plan_facts(plan, LAYOUT, 16), start)
    for number in range(start, upto):
        record, iteration, elapsed = step(plan, number)
        file.add(record, iteration, load(number) * elapsed)
        if (number + 1) % interval == 0:
            file.end(4.0)
            file.evaluated(number + 1, {"c0": above + 2 + math.exp(-number / 100), "c1": math.nan, "mean": 4.1})
    file.close()


def finish(directory: Path, settings: Mapping[str, Any] | None = None) -> None:
    """What the trainer writes at the end of a run, and its settings."""
    (directory / "summary.json").write_text('{"finished": true}')
    if settings is not None:
        (directory / SETTINGS).write_text(yaml.safe_dump(settings))
