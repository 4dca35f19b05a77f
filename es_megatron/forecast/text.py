"""A forecast as lines to print, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from es_megatron.core.metrics import plan_facts
from es_megatron.core.plan import describe
from es_megatron.core.simulation import Order, peak_activations
from es_megatron.forecast.collectives import ALPHA, BETA
from es_megatron.forecast.expected import expected_loss
from es_megatron.forecast.forecast import BreakEven, Duration, Forecast
from es_megatron.forecast.request import Request
from es_megatron.scoring import arm_of

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
WARNING = "WARNING"


def told(request: Request, found: Forecast) -> str:
    """The plan that the trainer prints, and what only this command tells."""
    first, *rest = _described(request, found).splitlines()
    loss = [f"  {'loss' if number == 0 else '':18}{line}" for number, line in enumerate(expected_loss(found.plan))]
    lines = [first, *loss, *rest]
    lines += [f"  {name:18}{value}" for name, value in _rows(request, found)]
    lines += [f"  note: {note}" for note in request.notes]
    return "\n".join(lines)


def document(request: Request, found: Forecast) -> dict[str, Any]:
    """The same for programs; bytes, seconds, and shares of 1."""
    lines = _described(request, found).splitlines()
    duration = found.duration
    return {
        "plan": plan_facts(found.plan, found.layout, request.manifest.seq_length),
        "loss": expected_loss(found.plan),
        "calibrated": found.calibrated,
        "world_size": request.world_size,
        "data_parallel": request.sizes.data_parallel,
        "saving": found.prediction.saving,
        "saving_selecting": found.prediction.selecting,
        "time_split": {**dataclasses.asdict(found.split), "saved": found.split.saved},
        "footprint": dataclasses.asdict(found.footprint),
        "break_even": dataclasses.asdict(found.break_even),
        "lr_factor": found.lr_factor,
        "lr": None if request.lr is None else request.lr * found.lr_factor,
        "collectives": [{**dataclasses.asdict(each), "seconds": each.seconds} for each in found.collectives],
        "duration": None if duration is None else dataclasses.asdict(duration),
        "warnings": [line.strip().removeprefix(f"{WARNING}: ") for line in lines if WARNING in line],
        "notes": list(request.notes),
    }


def _described(request: Request, found: Forecast) -> str:
    return describe(found.plan, found.layout, request.manifest.seq_length, calibrated=found.calibrated)


def _rows(request: Request, found: Forecast) -> Iterator[tuple[str, str]]:
    split, size, sizes, config = found.split, found.footprint, request.sizes, request.config
    if request.recomputes and not found.calibrated:
        saving, selecting = found.prediction.saving, found.prediction.selecting
        yield "with recompute", f"{saving:.1%} (backward = 3 forward), {selecting:.1%} while selecting"
    scored, ramps = f"{split.scoring:.1%} scoring", f"{split.scoring_ramps:.1%} + {split.training_ramps:.1%}"
    idle = f", {ramps} ramps of the pipeline (scoring + training)" if sizes.pipeline > 1 else ""
    yield "time", f"{scored}, {split.training:.1%} training{idle}, {split.saved:.1%} saved; of the plain run's time"
    if sizes.pipeline > 1 and found.plan.evolving_iterations and arm_of(config).scores:
        yield "pipeline", _pipeline(found)
    if found.duration is not None:
        yield from _seconds(found.duration)
    if arm_of(config).scores:
        own, whole = bytes_of(size.score_bytes_per_rank), bytes_of(size.score_bytes)
        each = f"{size.sample_bytes} B a sample" + (", of a reference too" if config.reference.folder else "")
        yield "scores", f"{own} on each of {sizes.data_parallel} data-parallel ranks ({each}), {whole} in all"
    if size.mask_bytes:
        where = "a node" if size.masks_shared else "each rank; set `mask_folder` to share them on a node"
        yield "kept masks", f"{bytes_of(size.mask_bytes)} for {where} (1.15 bits a sample)"
    if arm_of(config).scores:
        ranks = min(request.gpus_per_node, request.world_size)
        yield "memory of a node", f"{bytes_of(size.node_bytes)} ({ranks} ranks)"
        each = f"{size.exchange_bytes / sizes.meta_batch:.3g} B a sequence of the meta-batch"
        yield "exchange", f"{bytes_of(size.exchange_bytes)} a step ({each})"
    if found.collectives and request.world_size > 1:
        yield "collectives", _collectives(found)
    if found.break_even.price:
        yield from _break_even(found, found.break_even)
    if found.plan.kept < found.plan.meta_batch:
        yield "learning rate", _rate(request, found)


def _pipeline(found: Forecast) -> str:
    """What scoring by a pass of its own, scoring in the training pass, and not scoring would save here."""
    layout, share = found.layout, found.plan.kept / found.plan.meta_batch
    whole, training = layout.whole(), layout.training(share)
    layout = dataclasses.replace(layout, scoring_micro_batches=layout.micro_batches, scoring_forward=layout.forward)
    order = layout.merged_order(share)
    held = [
        peak_activations(layout.pipeline, layout.virtual, each) for each in (Order(0, layout.micro_batches, 0), order)
    ]
    return (
        f"while selecting, fresh scores save {1 - (found.layout.scoring() + training) / whole:.1%} by a pass of their "
        f"own, {1 - layout.merged(share) / whole:.1%} merged (x = {order.after}), history {1 - training / whole:.1%}; "
        f"activations of {held[0]:g} micro-batches plain, {held[1]:g} merged"
    )


def _collectives(found: Forecast) -> str:
    each = ", ".join(f"{one.name} {bytes_of(one.bytes)} over {one.ranks}" for one in found.collectives)
    seconds = sum(one.seconds for one in found.collectives)
    constants = f"assumed: {1e6 * ALPHA:g} us a message, {8e-9 / BETA:g} Gbit/s"
    return f"{len(found.collectives)} while selecting, {1e3 * seconds:.3g} ms ({constants}): {each}"


def _seconds(duration: Duration) -> Iterator[tuple[str, str]]:
    plain, selecting = duration.plain_iteration, duration.selecting_iteration
    yield "an iteration", f"{plain:.4g} s plain, {selecting:.4g} s selecting ({duration.source})"
    yield "the run", f"{hours_of(duration.plain_hours)} plain, {hours_of(duration.hours)} with Evolved Sampling"


def _break_even(found: Forecast, even: BreakEven) -> Iterator[tuple[str, str]]:
    plan, prices = found.plan, f"c/{even.training_price:.3g}"
    here = f"b/B = {even.layout_ratio:.3f} on this layout"
    limit = f"{even.ratio:.3f} by arithmetic (1 - {prices}, c = {even.price:.3g})"
    yield "break-even", f"{here}, {limit}; this run has {plan.kept / plan.meta_batch:.3g}"
    more = f"{even.uniform_more:.1f} more sequences (B {prices})"
    if plan.kept + even.uniform_more >= plan.meta_batch:
        yield "equal cost", f"a uniform choice may train on {more}, which is the whole meta-batch"
    else:
        total = f"{plan.kept + even.uniform_more:.1f} instead of {plan.kept}"
        yield "equal cost", f"a uniform choice may train on {more}: {total}; nearest b here: {even.uniform_kept}"


def _rate(request: Request, found: Forecast) -> str:
    plan = found.plan
    times = f"lr x sqrt(b/B) = lr x {found.lr_factor:.3g}"
    start = times if request.lr is None else f"{request.lr:.4g} -> {request.lr * found.lr_factor:.4g} ({times})"
    why = f"the optimizer sees {plan.kept} sequences, not {plan.meta_batch}"
    return f"{start} to begin with: {why}. A rule of thumb for Adam: search around it"


def hours_of(hours: float) -> str:
    """Hours with three digits: 0.104 h; whole ones from 100 on: 25,180 h."""
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"


def bytes_of(count: float) -> str:
    """A number of bytes with three digits: 145 MB."""
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"
