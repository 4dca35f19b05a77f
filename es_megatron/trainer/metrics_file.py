"""`metrics.jsonl`: the plan of a run, then what each stretch of its iterations did, as lines of JSON.

A stretch is a log window, cut where selection begins or ends, after the first iteration of a process (which pays for
what is made once), and at every save, so that a run that resumes finds its lines to end where it begins again. Times
are rank 0's. What is not known is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es_megatron.core.line_file import LineFile
from es_megatron.core.plan import Plan
from es_megatron.core.step import StepRecord
from es_megatron.errors import DataError
from es_megatron.trainer.backend import Iteration

NAME = "metrics.jsonl"
LOSSES = ("meta_loss", "chosen_loss", "skipped_loss")


@dataclass(frozen=True)
class Stretch:
    """What consecutive iterations did, all of them selecting or none."""

    iteration: int
    """Iterations finished at its end."""
    iterations: int
    selecting: bool
    elapsed: float
    """Seconds of the iterations, without evaluations and saves."""
    seconds: dict[str, float]
    """Of them: `score`, `train`, `exchange`, `order` and, where it can be told, `optimizer`."""
    scored: int
    """Sequences that got a scoring pass."""
    trained: int
    """Sequences that got forward and backward."""
    stood_for: int
    """Draws of the plain run that everything up to its end stands for."""
    drawn: dict[str, int]
    """Sequences of the meta-batches, by component."""
    chosen: dict[str, int]
    """Sequences trained, by component."""
    meta_loss: float | None
    """Mean loss of the meta-batches, in nats per token, like the other losses."""
    chosen_loss: float | None
    skipped_loss: float | None
    lr: float | None
    """Of the last iteration."""
    lm_loss: float | None
    """Mean training loss since the last log line; null where the stretch does not end with one."""
    bad: int
    """Sequences with a non-finite loss."""
    skipped: int
    """Iterations whose optimizer step was skipped."""
    grad_norm: float | None = None
    """Norm of the gradients before clipping, of the last optimizer step; null where the framework does not tell."""
    start: int = 0
    """Iteration at which the process began or resumed: its machine and number of ranks may be others."""


@dataclass(frozen=True)
class Metrics:
    """The content of a metrics file."""

    plan: dict[str, Any]
    """What `es_megatron.core.metrics.plan_facts` told."""
    stretches: tuple[Stretch, ...]
    validation: dict[int, dict[str, float]]
    """Validation losses by iteration and domain, in nats per token."""


class Gathering:
    """Sums over the iterations of the stretch that is open."""

    def __init__(self, components: int) -> None:
        """Start at nothing."""
        self.iterations = self.scored = self.trained = self.bad = self.skipped = 0
        self.selecting, self.elapsed, self.rate = False, 0.0, math.nan
        self.norm = math.nan
        self.seconds: dict[str, float] = {}
        self.drawn, self.chosen = np.zeros(components, np.int64), np.zeros(components, np.int64)
        self.losses = {name: [0.0, 0] for name in LOSSES}

    def add(self, record: StepRecord, iteration: Iteration, elapsed: float) -> None:
        """Count one iteration."""
        self.iterations += 1
        self.selecting = record.evolving
        self.elapsed += elapsed
        for name, value in {**record.seconds, "optimizer": iteration.updating}.items():
            if not math.isfinite(value):
                continue
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self.scored, self.trained = self.scored + record.scored, self.trained + len(record.chosen)
        self.bad, self.skipped = self.bad + record.bad, self.skipped + int(not iteration.succeeded)
        self.drawn += np.bincount(record.drawn, minlength=len(self.drawn))
        self.chosen += np.bincount(record.components, minlength=len(self.chosen))
        self.rate, self.norm = iteration.rate, iteration.norm if iteration.succeeded else self.norm
        for name, total in self.losses.items():
            if math.isfinite(loss := float(getattr(record, name))):
                total[0], total[1] = total[0] + loss, total[1] + 1

    def close(self, iteration: int, stood_for: int, names: Sequence[str], lm_loss: float) -> Stretch:
        """What it came to."""
        means: dict[str, Any] = {name: total / count if count else None for name, (total, count) in self.losses.items()}
        return Stretch(
            iteration=iteration,
            iterations=self.iterations,
            selecting=self.selecting,
            elapsed=self.elapsed,
            seconds=self.seconds,
            scored=self.scored,
            trained=self.trained,
            stood_for=stood_for,
            drawn=dict(zip(names, self.drawn.tolist(), strict=True)),
            chosen=dict(zip(names, self.chosen.tolist(), strict=True)),
            lr=known(self.rate),
            lm_loss=known(lm_loss),
            bad=self.bad,
            skipped=self.skipped,
            grad_norm=known(self.norm),
            **means,
        )


class MetricsFile:
    """The metrics file of a run that goes on."""

    def __init__(self, directory: Path, plan: Plan, facts: Mapping[str, Any], start: int) -> None:
        """Write the plan, keep the lines of the iterations before `start`, and drop those that are run again.

        Args:
            directory: of the run.
            plan: of the run.
            facts: the first line.
            start: iteration the run begins or resumes at.
        """
        self._names = [component.name for component in plan.schedule.manifest.components]
        self._plan, self._first = plan, True  # the first iteration has a stretch of its own
        self._file = LineFile(
            directory / NAME,
            lambda line: "plan" not in line and int(line["iteration"]) <= start,
            [json.dumps({"plan": facts})],
        )
        self._start = self._done = start
        self._open = Gathering(len(self._names))

    def add(self, record: StepRecord, iteration: Iteration, elapsed: float) -> None:
        """Count one finished iteration."""
        if self._open.iterations and (self._first or record.evolving != self._open.selecting):
            self.end()
        self._open.add(record, iteration, elapsed)
        self._done = record.iteration + 1

    def end(self, lm_loss: float = math.nan) -> None:
        """End the stretch that is open, if it has iterations."""
        if self._open.iterations:
            stood_for = self._plan.schedule.stood_for(self._done)
            closed = self._open.close(self._done, stood_for, self._names, lm_loss)
            self._write(dataclasses.asdict(dataclasses.replace(closed, start=self._start)))
            self._open, self._first = Gathering(len(self._names)), False

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Note validation losses."""
        self._write({"iteration": iteration, "validation": {name: known(loss) for name, loss in losses.items()}})

    def close(self) -> None:
        """Write what is left, and close."""
        self.end()
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line))


def known(value: float) -> float | None:
    """JSON knows no nan."""
    return value if math.isfinite(value) else None


def read_metrics(directory: Path) -> Metrics:
    """Read the metrics of a run, also of one that is still going on: a half-written last line is left out.

    Raises:
        DataError: there is no run, no metrics file, or a line of it cannot be read.
    """
    path = directory / NAME
    if not directory.is_dir():
        raise DataError(f"`{directory}` must be the folder of a run, but does not exist. Check the path.")
    if not path.is_file():
        raise DataError(
            f"`{directory}` must hold a `{NAME}`, but does not. Name the `run.directory` of a run of `es-megatron "
            "pretrain` that has begun to train, made with this version or a later one."
        )
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # what ends a file has no line feed
    plan: dict[str, Any] | None = None
    stretches: list[Stretch] = []
    validation: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if "plan" in content:
                plan = dict(content["plan"])
            elif "validation" in content:
                losses = {name: math.nan if loss is None else loss for name, loss in content["validation"].items()}
                validation[int(content["iteration"])] = losses
            else:
                stretches.append(Stretch(**content))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"Line {number} of `{path}` must be a line of metrics, but cannot be read ({error}). Remove that line "
                "from a copy of the file's folder, or let the run resume, which drops it."
            ) from error
    if plan is None:
        raise DataError(f"`{path}` must begin with the plan of the run, but has none. Let the run resume once.")
    return Metrics(plan, tuple(stretches), validation)
