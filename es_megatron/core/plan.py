"""What a run will do and cost, before its first iteration: iterations, passes, tokens, predicted saving.

Costs count sequences in forward units: a forward is 1, a backward is 2, so training on a sequence costs 3 and scoring
one costs 1. A layout with pipeline stages pays its ramps on top, per pass, as an event simulation of the schedule has
them (`core.simulation`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.config import EvolvedSamplingConfig, SelectionSettings
from es_megatron.core.simulation import Order, Times, best_order, duration, forward_duration
from es_megatron.data.manifest import Manifest
from es_megatron.data.ramp import Ramp
from es_megatron.data.schedule import Origin, Schedule
from es_megatron.errors import ConfigError, LayoutError
from es_megatron.scoring import Arm, Scorer, arm_of, published, scorer_of
from es_megatron.scoring.arms import prunes

FORWARD_COST = 1.0
TRAIN_COST = 3.0
NEVER_IDLE = "in the training pass; without pipeline stages nothing is idle, so that this saves nothing"


@dataclass(frozen=True)
class Plan:
    """The length of a run and what it passes through the model."""

    config: EvolvedSamplingConfig
    schedule: Schedule
    meta_batch: int
    kept: int
    """Sequences of an evolving meta-batch that get a backward pass (b)."""
    plain_iterations: int
    """Iterations of the plain run over the user's `train_samples`."""

    @property
    def iterations(self) -> int:
        """Optimizer steps of the run: what a learning-rate schedule ends with."""
        return self.schedule.iterations

    @property
    def break_even_gain(self) -> float:
        """How many times more uniform samples the weights must be worth for the scoring passes to pay (1 + cB / 3b)."""
        evolving = self.evolving_iterations
        cost = self.scoring_price * FORWARD_COST * self.sequences_scored / evolving if evolving else 0.0
        return 1.0 + cost / (TRAIN_COST * self.kept)

    @property
    def fallback(self) -> int:
        """Sequences trained once the guard has fallen back: all, or at most what scoring and training cost together.

        A multiple of what divides both b and B, which every layout of the run can train.
        """
        if self.config.guard.fallback == "plain":
            return self.meta_batch
        more, unit = (self.break_even_gain - 1.0) * self.kept, math.gcd(self.kept, self.meta_batch)
        return min(self.meta_batch, self.kept + int(more / unit + 1e-9) * unit)

    @cached_property
    def arm(self) -> Arm:
        """Evolved Sampling or a control arm."""
        return arm_of(self.config)

    @cached_property
    def scorer(self) -> Scorer:
        """Where losses come from."""
        return scorer_of(self.config)

    def selects_at(self, iteration: int) -> bool:
        """Whether an iteration trains on b of B sequences."""
        return self.evolving_iterations > 0 and self.schedule.phases.evolving(iteration)

    @property
    def evolving_iterations(self) -> int:
        """Iterations that select."""
        phases = self.schedule.phases
        return phases.stop - phases.start if self.arm.selects and self.kept < self.meta_batch else 0

    @property
    def whole_draws(self) -> int:
        """Sequences of the iterations that train on all they draw."""
        return self.schedule.ramp.position(self.schedule.iterations) - self.evolving_iterations * self.meta_batch

    @property
    def scored_iterations(self) -> int:
        """Iterations with a scoring pass."""
        if not self.evolving_iterations:
            return 0
        return self.scorer.passes(self.schedule.phases.start, self.schedule.phases.stop)

    @property
    def scored_share(self) -> float:
        """Share of a sequence's tokens that a scoring pass reads."""
        seq_length = self.schedule.manifest.seq_length
        return self.scorer.tokens(seq_length) / seq_length

    @property
    def scoring_price(self) -> float:
        """Cost of scoring a sequence, in forward passes over a whole one."""
        return self.scored_share * (self.config.scorer.cost or 1.0)

    @property
    def sequences_scored(self) -> int:
        """Forward-only sequences of the whole run."""
        return self.scored_iterations * self.meta_batch

    @property
    def sequences_trained(self) -> int:
        """Sequences of the whole run that get forward and backward."""
        return self.whole_draws + self.evolving_iterations * self.kept

    @property
    def cost(self) -> float:
        """Forward units of the whole run, in sequences."""
        return self.scoring_price * FORWARD_COST * self.sequences_scored + TRAIN_COST * self.sequences_trained

    @property
    def plain_cost(self) -> float:
        """The same of the plain run."""
        return TRAIN_COST * self.schedule.ramp.position(self.plain_iterations)

    @property
    def passes(self) -> npt.NDArray[np.float64]:
        """Passes over each component that the run stands for, float64[C]."""
        return self.schedule.passes()

    def unvisited(self) -> npt.NDArray[np.float64]:
        """Expected share of each component's rows without a visit when its first pruned epoch's mask is decided.

        As for a choice at random: losses of what is trained on count as visits too. float64[C] in [0, 1]; nan where no
        epoch is pruned, or where scores of before decide.
        """
        schedule, lag = self.schedule, self.config.order.mask_lag or 1
        epochs, sizes = schedule.epochs, schedule.manifest.sizes
        share = np.full(len(sizes), np.nan)
        if not self.arm.scores or not self.scorer.learns:
            return share
        scored = self.scored_iterations / max(1, self.evolving_iterations)
        visited = scored + (1 - scored) * self.kept / self.meta_batch
        for c in np.flatnonzero((epochs.first_pruned > 0) & (epochs.after_pruned > epochs.first_pruned)):
            first = schedule.blend.position(int(c), int(epochs.start(int(c), epochs.first_pruned[c])))
            begun = schedule.origin.iteration
            decided = max(begun, schedule.iteration_at(first) - lag)
            drawn = schedule.draws(decided)[c]
            annealed = schedule.draws(max(begun, min(decided, schedule.phases.start)))[c]
            share[c] = max(0.0, 1 - (annealed + visited * (drawn - annealed)) / sizes[c])
        return share


def plan_run(
    config: EvolvedSamplingConfig,
    manifest: Manifest,
    meta_batch: int,
    quantum: int,
    train_samples: int,
    origin: Origin | None = None,
    ramp: Ramp | None = None,
) -> Plan:
    """Plan a run; one that matches a cost gets as large a choice as reaches it, and is cut to it.

    Args:
        config: settings.
        manifest: the blend.
        meta_batch: sequences drawn per iteration (B).
        quantum: what b must be a multiple of: micro-batch size times data-parallel size, times the pipeline size where
            stages are interleaved.
        train_samples: draws of the plain run.
        origin: where the data order begins, if not at iteration 0.
        ramp: sizes of meta-batches, where they grow at first.

    Raises:
        ConfigError: sizes that do not divide.
    """
    ramp = ramp or Ramp(meta_batch)
    if meta_batch % quantum:
        raise ConfigError(
            f"The meta-batch (global batch size) must be a multiple of {quantum} (micro-batch size times data-parallel "
            f"size, times pipeline size when interleaved), but is {meta_batch} instead. "
            f"Use {nearest(meta_batch, quantum)}."
        )
    if train_samples < 1:
        raise ConfigError(f"`train_samples` must be >= 1, but is {train_samples} instead.")
    plain_iterations = ramp.iteration_at(train_samples - 1) + 1
    arm = arm_of(config)
    kept = kept_of(config, meta_batch, quantum) if arm.selects and config.selection.budget is None else meta_batch

    def make(kept: int, samples: int) -> Plan:
        ratio = config.pruning.ratio if prunes(config) else 0.0
        anneal = config.selection.anneal
        schedule = Schedule(manifest, meta_batch, samples, anneal=anneal, pruning_ratio=ratio, origin=origin, ramp=ramp)
        return Plan(config, schedule, meta_batch, kept, plain_iterations)

    if not arm.budgeted or not (config.selection.budget is not None or arm.shortened):
        return make(kept, train_samples)
    if config.selection.budget is not None:
        budget = config.selection.budget * TRAIN_COST * ramp.position(plain_iterations)
    else:
        budget = plan_run(published(config), manifest, meta_batch, quantum, train_samples, origin, ramp).cost
    if arm.selects:
        sizes = range(quantum, meta_batch + 1, quantum)
        kept = next((b for b in sizes if make(b, train_samples).cost >= budget), meta_batch)
    return make(kept, longest_within(budget, train_samples, lambda samples: make(kept, samples).cost))


def longest_within(budget: float, samples: int, cost: Callable[[int], float]) -> int:
    """The most samples, up to `samples`, whose run costs no more than `budget`; at least 1."""
    low, high = 1, samples
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def kept_of(config: EvolvedSamplingConfig, meta_batch: int, quantum: int) -> int:
    """b = keep_ratio * B, refused unless it is a whole multiple of `quantum`."""
    exact = config.selection.keep_ratio * meta_batch
    kept = round(exact)
    if abs(exact - kept) > 1e-6 or kept % quantum or kept < quantum:
        near = nearest(exact, quantum)
        raise ConfigError(
            f"`selection.keep_ratio` times the meta-batch must be a multiple of {quantum} (micro-batch size times "
            f"data-parallel size, times pipeline size when interleaved), but is {exact:g} instead. Use `keep_ratio` "
            f"{near / meta_batch:g} "
            f"(b = {near}), a smaller micro-batch, or a larger meta-batch."
        )
    return kept


def nearest(value: float, multiple: int) -> int:
    """The multiple nearest to a value, at least one."""
    return max(1, round(value / multiple)) * multiple


@dataclass(frozen=True)
class Layout:
    """What a pass costs on the cluster; times in any one unit."""

    micro_batches: int
    """Of a rank in a plain iteration (B / (micro-batch size * data-parallel size))."""
    scoring_micro_batches: int
    pipeline: int = 1
    virtual: int = 1
    forward: float = 1.0
    """Of one training micro-batch through all stages, divided by the stages."""
    backward: float = 2.0
    scoring_forward: float = 1.0
    """Forward of one scoring micro-batch."""
    exchange: float = 0.0
    """Sending one micro-batch's activations, or their gradients, from a stage to the next."""

    @property
    def times(self) -> Times:
        """Of passes through one stage."""
        return Times(self.forward, self.backward, self.scoring_forward, self.exchange)

    def pass_time(self, micro_batches: int, unit: float) -> float:
        """1F1B by arithmetic: the micro-batches and the two half ramps."""
        return (micro_batches + (self.pipeline - 1) / self.virtual) * unit

    def whole(self) -> float:
        """Time of a plain iteration."""
        return self.training(1.0)

    def scoring(self) -> float:
        """Time of a scoring pass."""
        return forward_duration(self.pipeline, self.virtual, self.scoring_micro_batches, self.times)

    def training(self, share: float) -> float:
        """Time of a training pass over a share of the meta-batch."""
        order = Order(0, round(share * self.micro_batches), 0)
        return duration(self.pipeline, self.virtual, order, self.times)

    def merged_order(self, share: float, scored_share: float = 1.0) -> Order:
        """The best order of a pass that trains a share of a meta-batch and scores the next one.

        Args:
            share: of the meta-batch that is trained.
            scored_share: of a sequence's tokens that are scored.
        """
        score = round(scored_share * self.scoring_micro_batches)
        return best_order(self.pipeline, self.virtual, round(share * self.micro_batches), score, self.times)

    def merged(self, share: float, scored_share: float = 1.0) -> float:
        """Time of that pass."""
        return duration(self.pipeline, self.virtual, self.merged_order(share, scored_share), self.times)


class Prediction(NamedTuple):
    """Predicted times in the layout's unit."""

    plain: float
    run: float
    selecting: float
    """Saving of an evolving iteration against a plain one, in [.., 1]."""

    @property
    def saving(self) -> float:
        """Share of the plain run's time that is saved; negative where the run costs more."""
        return 1.0 - self.run / self.plain


def predict(plan: Plan, layout: Layout) -> Prediction:
    """Time of the plain run and of this one on a layout."""
    share = plan.kept / plan.meta_batch
    whole, training = layout.whole(), layout.training(share)
    evolving, scored = plan.evolving_iterations, plan.scored_iterations
    scoring = layout.scoring() * plan.scored_share
    run = plan.whole_draws / plan.meta_batch * whole + evolving * training + scored * scoring
    step = training + (scored / evolving if evolving else 0.0) * scoring
    if plan.scorer.merges and evolving:
        # the first selecting iteration makes a pass of its own, the last one scores nothing
        step = layout.merged(share, plan.scored_share)
        run += (evolving - 1) * (step - training - scoring)
    return Prediction(
        plan.plain_cost / TRAIN_COST / plan.meta_batch * whole, run, 1.0 - step / whole if evolving else 0.0
    )


def nominal(layout: Layout) -> Layout:
    """The same layout with forward : backward = 1 : 2."""
    per_scoring = layout.micro_batches / layout.scoring_micro_batches
    return dataclasses.replace(layout, forward=1.0, backward=2.0, scoring_forward=per_scoring)


def describe(plan: Plan, layout: Layout, seq_length: int, *, calibrated: bool) -> str:
    """The plan as lines to print before the first iteration."""
    config, names = plan.config, [component.name for component in plan.schedule.manifest.components]
    tokens = 1e-6 * seq_length
    predicted, limit = predict(plan, layout), predict(plan, nominal(layout))
    scorer, ratio = config.scorer.kind if plan.arm.scores else "none", config.pruning.ratio if prunes(config) else 0.0
    passes = ", ".join(f"{name} {count:.2f}" for name, count in zip(names, plan.passes, strict=True))
    forwarded = (plan.scored_share * plan.sequences_scored + plan.sequences_trained) * tokens
    plain = plan.plain_cost / TRAIN_COST * tokens
    rows = {
        "iterations": f"{plan.schedule.iterations} (plain: {plan.plain_iterations}), {plan.evolving_iterations} select",
        "passes": passes,
        "tokens forwarded": f"{forwarded:.2f} M",
        "tokens trained": f"{plan.sequences_trained * tokens:.2f} M (plain: {plain:.2f} M)",
        "predicted saving": f"{limit.saving:.1%} nominal (backward = 2 forward), {limit.selecting:.1%} while selecting",
    }
    if plan.schedule.ramp.stages:
        rows["ramp-up"] = plan.schedule.ramp.told()
    if plan.scorer.merges and plan.evolving_iterations:
        order = layout.merged_order(plan.kept / plan.meta_batch, plan.scored_share)
        rows["scored early"] = order.told if layout.pipeline > 1 else NEVER_IDLE
    if calibrated:
        measured = f"backward = {layout.backward / layout.forward:.2f} forward on this machine"
        rows[""] = f"{predicted.saving:.1%} calibrated ({measured}), {predicted.selecting:.1%} while selecting"
    named = plan.arm.scores and config.selection.policy != SelectionSettings.policy
    scorer += f", policy {config.selection.policy}" if named else ""
    head = f"B = {plan.meta_batch}, b = {plan.kept}, scorer {scorer}, r = {ratio:g}, anneal {config.selection.anneal:g}"
    if plan.evolving_iterations and len(names) > 1:
        told = {"kept": "kept: components are trained as they are drawn", "free": "free: what is chosen moves it"}
        rows["mixture"] = told[config.mixture]
    unvisited = [(name, share) for name, share in zip(names, plan.unvisited(), strict=True) if share >= 0.005]
    if unvisited:
        found = ", ".join(f"{name} {share:.0%}" for name, share in unvisited)
        rows["never visited"] = f"{found} of the rows when pruning begins; each counts as its component's mean"
    lines = [f"plan: arm {config.arm}, {head}", *(f"  {name:18}{value}" for name, value in rows.items())]
    if plan.evolving_iterations and min(predicted.saving, limit.saving) <= 0:
        lines.append(
            "  WARNING: this run costs more than the plain one: scoring costs more than the skipped backward passes "
            "save. Lower `keep_ratio`, use more micro-batches per rank, or the `history` scorer."
        )
    return "\n".join(lines)


def check_micro_batches(plan: Plan, per_micro_batch: int, pipeline: int, virtual: int) -> None:
    """Refuse a choice that leaves too few micro-batches for interleaved stages.

    Args:
        plan: the run.
        per_micro_batch: sequences of one micro-batch over all data-parallel ranks.
        pipeline: stages.
        virtual: model chunks per stage.

    Raises:
        LayoutError: fewer than `pipeline` micro-batches, or not a multiple of it.
    """
    for what, sequences in (("meta-batch", plan.meta_batch), ("chosen part", plan.kept)):
        count = sequences // per_micro_batch
        if virtual > 1 and (count < pipeline or count % pipeline):
            raise LayoutError(
                f"The {what} must be a multiple of {pipeline} micro-batches with interleaved pipeline stages, but has "
                f"{count} instead. Use a smaller micro-batch, a larger `keep_ratio`, or no virtual stages."
            )
