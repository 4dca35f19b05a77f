"""What a run did: tokens forwarded and trained, where the time went, what was chosen from which component."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.core.plan import FORWARD_COST, TRAIN_COST, Layout, Plan, nominal, predict
from es_megatron.core.step import StepRecord
from es_megatron.scoring.arms import prunes

Int64 = npt.NDArray[np.int64]

TOLD_COMPONENTS = 6
"""Components that a log line names."""


@dataclass
class RunTotals:
    """Sums over the iterations since they were made; `state_dict` carries them through a resume."""

    components: int
    meta_batch: int
    sequences_scored: int = 0
    sequences_trained: int = 0
    evolving_iterations: int = 0
    bad: int = 0
    masked: int = 0
    """Sequences seen without a loss, since all their tokens are masked; each time they are drawn."""
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Wall-clock by part of the step, `score`, `train`, `exchange`, `order`, `optimizer`, and `step` for the whole."""
    chosen: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """Sequences trained by component, int64[C]."""
    drawn: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """Sequences drawn by component, int64[C]."""

    def __post_init__(self) -> None:
        """Start the counts of components at 0."""
        if len(self.chosen) == 0:
            self.chosen = np.zeros(self.components, dtype=np.int64)
            self.drawn = np.zeros(self.components, dtype=np.int64)

    def add(self, record: StepRecord, extra: Mapping[str, float], *, succeeded: bool) -> None:
        """Count one iteration.

        Args:
            record: of the engine.
            extra: further wall-clock by part.
            succeeded: whether the optimizer stepped.
        """
        self.sequences_scored += record.scored
        self.sequences_trained += len(record.chosen)
        self.evolving_iterations += int(record.evolving)
        self.bad += record.bad
        self.masked += record.masked
        self.skipped += int(not succeeded)
        self.chosen += np.bincount(record.components, minlength=self.components)
        self.drawn += np.bincount(record.drawn, minlength=self.components)
        for name, value in {**record.seconds, **extra}.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def state_dict(self) -> dict[str, Any]:
        """The sums, JSON-able."""
        return {
            "sequences_scored": self.sequences_scored,
            "sequences_trained": self.sequences_trained,
            "evolving_iterations": self.evolving_iterations,
            "bad": self.bad,
            "masked": self.masked,
            "skipped": self.skipped,
            "seconds": dict(self.seconds),
            "chosen": self.chosen.tolist(),
            "drawn": self.drawn.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take sums over; missing keys raise `KeyError`. Versions that did not count draws trained what they drew."""
        for name in ("sequences_scored", "sequences_trained", "evolving_iterations", "bad", "skipped"):
            setattr(self, name, int(state[name]))
        self.masked = int(state.get("masked", 0))
        self.seconds = {name: float(value) for name, value in state["seconds"].items()}
        self.chosen = np.asarray(state["chosen"], dtype=np.int64)
        self.drawn = np.asarray(state.get("drawn", state["chosen"]), dtype=np.int64)

    def shares(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Share of each component in what was drawn, and in what was trained, so far."""
        parts = [each / max(1, int(each.sum())) for each in (self.drawn, self.chosen)]
        return {name: (float(d), float(t)) for name, d, t in zip(names, *parts, strict=True)}

    def told_shares(self, names: Sequence[str]) -> str:
        """The same as text, `a 40.0/39.8%`, those first that have moved most; empty with one component."""
        shares = self.shares(names)
        if len(shares) < 2:
            return ""
        moved = sorted(shares.items(), key=lambda each: -abs(each[1][1] - each[1][0]))
        more = f", {len(moved) - TOLD_COMPONENTS} more" if len(moved) > TOLD_COMPONENTS else ""
        return ", ".join(f"{name} {100 * d:.1f}/{100 * t:.1f}%" for name, (d, t) in moved[:TOLD_COMPONENTS]) + more


def saved_share(plan: Plan, iterations: int, totals: RunTotals) -> float:
    """Share of the plain run's forward and backward work saved so far, in nominal units (backward = 2 forward).

    Args:
        plan: the run.
        iterations: finished ones.
        totals: what they passed through the model.

    Returns:
        1 - cost / (cost of the plain run over the draws they stand for); negative where they cost more.
    """
    schedule = plan.schedule
    stood_for = schedule.origin.stood_for + float((schedule.passes(iterations) * schedule.manifest.sizes).sum())
    cost = plan.scoring_price * FORWARD_COST * totals.sequences_scored + TRAIN_COST * totals.sequences_trained
    return 1.0 - cost / (TRAIN_COST * stood_for) if stood_for else 0.0


def plan_facts(plan: Plan, layout: Layout, seq_length: int) -> dict[str, Any]:
    """What `describe` tells of a run before its first iteration, JSON-able.

    Args:
        plan: the run.
        layout: what its passes cost, measured or assumed.
        seq_length: tokens of a sequence.
    """
    config, components = plan.config, plan.schedule.manifest.components
    weights = sum(component.weight for component in components)
    as_given, as_nominal = predict(plan, layout), predict(plan, nominal(layout))
    return {
        "arm": config.arm,
        "scorer": config.scorer.kind if plan.arm.scores else None,
        "policy": config.selection.policy if plan.arm.scores else None,
        "granularity": config.selection.granularity,
        "mixture": config.mixture if plan.evolving_iterations else None,
        "pruning_ratio": config.pruning.ratio if prunes(config) else 0.0,
        "anneal": config.selection.anneal,
        "meta_batch": plan.meta_batch,
        "kept": plan.kept,
        "seq_length": seq_length,
        "iterations": plan.schedule.iterations,
        "plain_iterations": plan.plain_iterations,
        "selecting_iterations": plan.evolving_iterations,
        "scoring_iterations": plan.scored_iterations,
        "sequences_scored": plan.sequences_scored,
        "sequences_trained": plan.sequences_trained,
        "scored_share": plan.scored_share,
        "components": [
            {"name": each.name, "samples": each.samples, "share": each.weight / weights, "passes": float(count)}
            for each, count in zip(components, plan.passes, strict=True)
        ],
        "layout": dataclasses.asdict(layout),
        "nominal_saving": as_nominal.saving,
        "nominal_saving_selecting": as_nominal.selecting,
        "layout_saving": as_given.saving,
        "layout_saving_selecting": as_given.selecting,
    }


@dataclass(frozen=True)
class LogEntry:
    """What one log line tells, over the iterations since the one before."""

    iteration: int
    iterations: int
    consumed: int
    milliseconds: float
    learning_rate: float
    meta_batch: int
    lm_loss: float
    kept: int
    score_ms: float
    train_ms: float
    other_ms: float
    grad_norm: float
    skipped: int
    bad: int
    shares: str = ""
    """Drawn and trained share of components, as `RunTotals.told_shares` gives them."""

    def line(self) -> str:
        """Megatron's pipe-delimited log line, with what ES adds."""
        parts = [
            f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {self.iteration:8d}/{self.iterations:8d}",
            f"consumed samples: {self.consumed:12d}",
            f"elapsed time per iteration (ms): {self.milliseconds:.1f}",
            f"learning rate: {self.learning_rate:.6E}",
            f"global batch size: {self.meta_batch:5d}",
            f"lm loss: {self.lm_loss:.6E}",
            f"es kept: {self.kept}/{self.meta_batch}",
            f"es score/train/other (ms): {self.score_ms:.1f}/{self.train_ms:.1f}/{self.other_ms:.1f}",
            f"grad norm: {self.grad_norm:.3f}",
            f"number of skipped iterations: {self.skipped:3d}",
            f"number of nan sequences: {self.bad:3d}",
        ]
        if self.shares:
            parts.append(f"drawn/trained: {self.shares}")
        return " | ".join(parts) + " |"
