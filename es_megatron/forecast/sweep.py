"""What scoring costs and saves over pipeline sizes and micro-batches, by event simulation, without a run to plan."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from es_megatron.config import EvolvedSamplingConfig, require
from es_megatron.core.plan import Layout, plan_run
from es_megatron.core.simulation import Order, peak_activations
from es_megatron.data.manifest import Component, Manifest
from es_megatron.forecast.collectives import ALPHA, BETA, collectives_of
from es_megatron.forecast.forecast import EXCHANGED_BYTES
from es_megatron.frameworks.arguments import read_switches
from es_megatron.scoring import published

PIPELINES = (2, 4, 8, 16)
MICRO_BATCHES = (8, 16, 32, 64)
KEEP_RATIO = 0.25
GPUS = (8, 64, 512, 4096)
COPY = 8
"""GPUs that hold one copy of the model, in the table of collectives."""
SEQUENCES = 16
"""Of a meta-batch on each copy there."""


@dataclass(frozen=True)
class Cell:
    """One pipeline size and number of micro-batches; savings are those of a selecting iteration against a plain one."""

    pipeline: int
    micro_batches: int
    trained: int
    score_then_train: float
    merged: float
    bound: float
    """With no stage idle but in one ramp of forward passes."""
    history: float
    """Without scoring."""
    after: int
    """Micro-batches that the merged pass scores after the trained ones (x)."""
    plain_activations: float
    """Micro-batches whose activations the fullest stage holds in a plain iteration."""
    activations: float
    """The same in a merged pass."""


def cell(layout: Layout, keep_ratio: float) -> Cell | None:
    """Simulate a layout; None where interleaved stages cannot run so many micro-batches."""
    p, v, m = layout.pipeline, layout.virtual, layout.micro_batches
    trained = max(1, round(keep_ratio * m))
    if v > 1 and (m % p or trained % p):
        return None
    share, whole = trained / m, layout.whole()
    order = layout.merged_order(share)
    work = m * layout.scoring_forward + trained * (layout.forward + layout.backward)
    return Cell(
        pipeline=p,
        micro_batches=m,
        trained=trained,
        score_then_train=1 - (layout.scoring() + layout.training(share)) / whole,
        merged=1 - layout.merged(share) / whole,
        bound=1 - (work + (p - 1) / v * layout.scoring_forward) / whole,
        history=1 - layout.training(share) / whole,
        after=order.after,
        plain_activations=peak_activations(p, v, Order(0, m, 0)),
        activations=peak_activations(p, v, order),
    )


def run_sweep(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The tables as text, and as JSON.

    Args:
        arguments: of `es-megatron plan`: `pipeline`, `virtual`, `recompute` and `backward_over_forward` are read.
    """
    switches = read_switches(arguments)
    told = switches.config is not None and "selection.keep_ratio" in switches.given
    ratio = switches.config.selection.keep_ratio if told and switches.config is not None else KEEP_RATIO
    virtual = arguments.virtual or 1
    backward = arguments.backward_over_forward or (3.0 if arguments.recompute == "full" else 2.0)
    require(virtual >= 1, "--virtual", ">= 1", virtual)
    require(backward > 0, "--backward-over-forward", "> 0", backward)
    require(arguments.pipeline is None or arguments.pipeline >= 1, "--pipeline", ">= 1", arguments.pipeline)
    pipelines = PIPELINES if arguments.pipeline is None else (arguments.pipeline,)
    cells = [[cell(Layout(m, m, p, virtual, backward=backward), ratio) for m in MICRO_BATCHES] for p in pipelines]
    chunks = f", {virtual} chunks a stage" if virtual > 1 else ""
    sections = [
        f"simulated: b/B = {ratio:g}, backward = {backward:g} forward, p stages, m micro-batches{chunks}",
        "saved while selecting: score-then-train / merged / bound",
        *table(cells, lambda c: f"{100 * c.score_then_train:.1f} / {100 * c.merged:.1f} / {100 * c.bound:.1f}%"),
        "saved by history / x / micro-batches whose activations the fullest stage holds: plain, merged",
        *table(cells, lambda c: f"{100 * c.history:.1f}% / {c.after} / {c.plain_activations:g}, {c.activations:g}"),
        *collective_lines(),
    ]
    found = [dataclasses.asdict(each) for row in cells for each in row if each is not None]
    document = {"keep_ratio": ratio, "backward_over_forward": backward, "virtual": virtual, "cells": found}
    return "\n".join(sections), document


def table(cells: list[list[Cell | None]], told: Any) -> list[str]:
    """Rows by pipeline size, columns by micro-batches."""
    rows = [["", *(f"m={m}" for m in MICRO_BATCHES)]]
    for row in cells:
        size = next((each.pipeline for each in row if each is not None), None)
        if size is not None:
            rows.append([f"p={size}", *("-" if each is None else told(each) for each in row)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(each.ljust(width) for each, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def collective_lines() -> list[str]:
    """What one selecting iteration of a fresh scorer sends, from 8 GPUs to 4,096."""
    assumed = f"alpha = {1e6 * ALPHA:g} us a message, {8e-9 / BETA:g} Gbit/s"
    sizes = f"{COPY} GPUs a copy of the model, {SEQUENCES} sequences of the meta-batch a copy"
    lines = [f"collectives of an iteration, fresh: {sizes}; gloo, assumed: {assumed}"]
    config = published(EvolvedSamplingConfig.from_mapping({"preset": "paper", "selection": {"anneal": 0.0}}))
    manifest = Manifest((Component("data", "", 10**6, 1.0, ""),), 8)
    for gpus in GPUS:
        copies = gpus // COPY
        plan = plan_run(config, manifest, copies * SEQUENCES, copies, 10 * copies * SEQUENCES)
        found = collectives_of(plan, EXCHANGED_BYTES * plan.meta_batch, copies, COPY)
        each = ", ".join(f"{one.name} {one.bytes} B over {one.ranks}" for one in found)
        lines.append(f"  {gpus:5} GPUs  {1e3 * sum(one.seconds for one in found):6.2f} ms: {each}")
    return lines
