"""The numbers of a run before its launch: time, memory, traffic, break-even; all from `es_megatron.core.plan`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from es_megatron.core.merged import check_merged
from es_megatron.core.plan import Layout, Plan, Prediction, check_micro_batches, nearest, plan_run, predict
from es_megatron.data.mask import mask_bytes
from es_megatron.forecast.collectives import Collective, collectives_of
from es_megatron.forecast.request import Request
from es_megatron.scoring.arms import prunes

SCORE_BYTES = 5
"""Of a sample: float32 score, uint8 visits."""
EXCHANGED_BYTES, EXCHANGED_WIDE = 12, 24
"""Of a sequence of the meta-batch: score, visits and loss, as float32, or as float64 where scores are debiased."""
REFERENCE_BYTES = {"float32": 4, "float16": 2}
"""Of a sample, where choices are by a reference."""
SHARD_BYTES = 16
"""Of a component, with debiased scores: the two sums that its mean is made of."""
MOMENTS = 5
"""Sums of a component that a reference's rules are made of."""
FORWARD_FLOPS = 2.0
"""Of a parameter and a token; the backward pass has twice as many, so that a plain step has 6."""


@dataclass(frozen=True)
class TimeSplit:
    """Where the time of the run goes, as shares of the plain run's time."""

    scoring: float
    training: float
    scoring_ramps: float
    """Idle time of the pipeline's stages while scoring passes begin and end."""
    training_ramps: float

    @property
    def saved(self) -> float:
        """What is left of the plain run's time."""
        return 1.0 - (self.scoring + self.training + self.scoring_ramps + self.training_ramps)


@dataclass(frozen=True)
class Footprint:
    """Memory and traffic of the scores, in bytes."""

    score_bytes_per_rank: int
    score_bytes: int
    """Of one copy of all scores, with their reference, over the data-parallel ranks."""
    sample_bytes: int
    """Of a sample: 5, and 4 or 2 where there is a reference."""
    mask_bytes: int
    """Of the kept masks of one epoch of every component."""
    masks_shared: bool
    """Whether the ranks of a node share them (`mask_folder`)."""
    node_bytes: int
    """Scores and masks on a node."""
    exchange_bytes: int
    """Of one step's exchange."""


@dataclass(frozen=True)
class BreakEven:
    """What a score has to be worth."""

    price: float
    """Scoring of one sequence of a selecting iteration's meta-batch, in forward passes (c)."""
    training_price: float
    """Forward and backward of one, in forward passes: 3, or 4 with full recompute."""
    ratio: float
    """b/B above which scoring costs more than it saves, by arithmetic: 1 - c/3."""
    layout_ratio: float
    """The same with the ramps and micro-batches of this layout."""
    uniform_more: float
    """More sequences of a meta-batch that a uniform choice trains on at equal cost: B c/3."""
    uniform_kept: int
    """The b nearest to that which this layout can hold."""


@dataclass(frozen=True)
class Duration:
    """Predicted seconds."""

    source: str
    """Where the seconds are from."""
    plain_iteration: float
    selecting_iteration: float
    """Mean over the selecting iterations."""
    plain_hours: float
    hours: float


@dataclass(frozen=True)
class Forecast:
    """All of it."""

    plan: Plan
    layout: Layout
    calibrated: bool
    """Whether the layout's ratio of backward to forward is measured."""
    prediction: Prediction
    split: TimeSplit
    footprint: Footprint
    break_even: BreakEven
    lr_factor: float
    """sqrt(b/B)."""
    duration: Duration | None
    collectives: tuple[Collective, ...]
    """Of a selecting iteration."""


def forecast(request: Request) -> Forecast:
    """Compute the numbers of a run.

    Raises:
        ConfigError, LayoutError: what the trainer would refuse.
    """
    sizes, config, training = request.sizes, request.config, request.settings.training
    manifest = request.manifest
    draws = training.draws(manifest.total)
    plan = plan_run(config, manifest, sizes.meta_batch, sizes.quantum, draws, request.origin)
    check_micro_batches(plan, sizes.micro_batch * sizes.data_parallel, sizes.pipeline, sizes.virtual)
    check_merged(config, manifest.seq_length, sizes.own, sizes.micro_batch, sizes.multiple)
    scoring = config.scorer.micro_batch_size
    if scoring is not None and scoring not in sizes.scoring_sizes:
        refuse_scoring_size(request)
    layout, source = layout_of(request)
    prediction, footprint = predict(plan, layout), footprint_of(plan, request)
    copy = request.world_size // sizes.data_parallel
    return Forecast(
        plan=plan,
        layout=layout,
        calibrated=request.speed.backward_over_forward is not None,
        prediction=prediction,
        split=split_of(plan, layout, prediction),
        footprint=footprint,
        break_even=break_even_of(plan, layout, prediction, sizes.quantum),
        lr_factor=math.sqrt(plan.kept / plan.meta_batch),
        duration=None if source is None else duration_of(plan, layout, prediction, source),
        collectives=collectives_of(plan, footprint.exchange_bytes, sizes.data_parallel, copy),
    )


def refuse_scoring_size(request: Request) -> None:
    """Raise what the trainer raises for a scoring micro-batch that does not divide; importing torch takes seconds."""
    from es_megatron.frameworks.megatron_core_checks import check_scoring_size

    check_scoring_size(request.config, request.sizes.own, request.sizes.pipeline, request.sizes.virtual)


def layout_of(request: Request) -> tuple[Layout, str | None]:
    """What the passes cost, and where their seconds are from; None where times are in forward passes."""
    sizes, speed, model = request.sizes, request.speed, request.settings
    forward, source = 1.0, None
    if speed.forward is not None:
        forward, source = speed.forward, "measured forward"
    elif speed.parameters is not None and speed.flops is not None:
        tokens = sizes.micro_batch * model.model.seq_length
        pieces = model.parallel.tensor * model.parallel.context * sizes.pipeline
        forward = FORWARD_FLOPS * speed.parameters * tokens / (pieces * speed.flops)
        flops = "8 FLOP, 2 of them recomputed," if request.recomputes else "6 FLOP"
        source = f"estimate: {flops} per parameter and token"
    layout = sizes.layout(request.config.scorer.micro_batch_size, forward)
    if speed.backward_over_forward is not None:
        layout = dataclasses.replace(layout, backward=speed.backward_over_forward * forward)
    if speed.scoring_forward is not None:
        layout = dataclasses.replace(layout, scoring_forward=speed.scoring_forward)
    return layout, source


def split_of(plan: Plan, layout: Layout, prediction: Prediction) -> TimeSplit:
    """Split the predicted time by what it is spent on."""
    selecting = plan.evolving_iterations
    whole = plan.schedule.iterations - selecting
    training = whole * layout.whole() + selecting * layout.training(plan.kept / plan.meta_batch)
    training_ramps = plan.schedule.iterations * layout.pass_time(0, layout.forward + layout.backward)
    scoring = plan.scored_iterations * plan.scored_share * layout.scoring_micro_batches * layout.scoring_forward
    scoring_ramps = prediction.run - training - scoring
    work = training - training_ramps
    if plan.scorer.merges:  # scoring fills the ramps of training
        training_ramps, scoring_ramps = training_ramps + scoring_ramps, 0.0
    parts = (scoring, work, scoring_ramps, training_ramps)
    return TimeSplit(*(part / prediction.plain for part in parts))


def footprint_of(plan: Plan, request: Request) -> Footprint:
    """Memory and traffic of the scores."""
    config, manifest, sizes = plan.config, plan.schedule.manifest, request.sizes
    by_reference = config.reference.folder is not None
    keeps = SCORE_BYTES + by_reference * REFERENCE_BYTES[config.reference.precision] if plan.arm.scores else 0
    own = keeps * -(-manifest.total // sizes.data_parallel)
    masks = sum(mask_bytes(int(n)) for n in manifest.sizes) if prunes(config) else 0
    ranks, shared = min(request.gpus_per_node, request.world_size), config.order.mask_folder is not None
    wide = config.correction == "debiased"
    exchanged = EXCHANGED_WIDE * plan.meta_batch + SHARD_BYTES * len(manifest.components)
    exchanged += by_reference * 8 * (plan.meta_batch + MOMENTS * len(manifest.components))
    return Footprint(
        score_bytes_per_rank=own,
        score_bytes=keeps * manifest.total,
        sample_bytes=keeps,
        mask_bytes=masks,
        masks_shared=shared,
        node_bytes=ranks * own + (1 if shared else ranks) * masks,
        exchange_bytes=0 if not plan.arm.scores else exchanged if wide else EXCHANGED_BYTES * plan.meta_batch,
    )


def break_even_of(plan: Plan, layout: Layout, prediction: Prediction, quantum: int) -> BreakEven:
    """Where scoring costs what it saves."""
    selecting = plan.evolving_iterations
    price = plan.scoring_price * plan.scored_iterations / selecting if selecting else 0.0
    training_price = 1.0 + layout.backward / layout.forward
    whole = plan.schedule.iterations - selecting
    training = whole * layout.whole() + selecting * layout.training(plan.kept / plan.meta_batch)
    scoring = (prediction.run - training) / selecting if selecting else 0.0
    more = plan.meta_batch * price / training_price
    return BreakEven(
        price=price,
        training_price=training_price,
        ratio=1.0 - price / training_price,
        layout_ratio=1.0 - scoring / (layout.micro_batches * (layout.forward + layout.backward)),
        uniform_more=more,
        uniform_kept=min(plan.meta_batch, nearest(plan.kept + more, quantum)),
    )


def duration_of(plan: Plan, layout: Layout, prediction: Prediction, source: str) -> Duration:
    """Seconds and hours, where the layout's times are in seconds."""
    return Duration(
        source=source,
        plain_iteration=layout.whole(),
        selecting_iteration=layout.whole() * (1.0 - prediction.selecting),
        plain_hours=prediction.plain / 3600,
        hours=prediction.run / 3600,
    )
