"""Merged scoring: one call of the schedule trains a meta-batch and scores the next, and neither feels the other.

The oracle is a second loop in the same process with the same initial weights and random states. It trains plainly on
what the first was seen to train on; scores are held against a forward-only pass at the same weights.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from es_megatron.core.simulation import program
from es_megatron.core.step import Work
from es_megatron.trainer.model import initialize
from es_megatron.trainer.model_state import random_state, restore_random_state
from tests.ranks_helper import run_on_ranks
from tests.small_loop import RAGGED, UNMASKED, Loop, RandomRows, build_experts
from tests.small_run import settings_of

from es_megatron.frameworks.megatron_core import ScheduleCall  # isort: skip - after the CPU layer
from megatron.core import parallel_state  # isort: skip
from megatron.core.pipeline_parallel import schedules  # isort: skip

ITERATIONS = 5
COUNT = 6
"""Micro-batches of a plain call."""
SIXTEENTHS = (
    "selection.keep_ratio=0.25",
    "selection.anneal=0.03",
    "scorer.overlap=merged",
    "scorer.micro_batch_size=null",
)
OVERLAPS = (
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "parallel.bucket_size=5000",
)
PP2 = ("parallel.pipeline=2",)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "pp2": (2, PP2),
    "pp4": (4, ("parallel.pipeline=4",)),
    "vpp2": (2, (*PP2, "parallel.virtual_pipeline=2")),
    "pp2-dp2-overlaps": (4, (*PP2, *OVERLAPS)),
    "vpp2-dp2-overlaps": (4, (*PP2, "parallel.virtual_pipeline=2", *OVERLAPS)),
    "tp2-pp2": (4, (*PP2, "parallel.tensor=2")),
}


HALF_PREFIX = (
    "evolved_sampling.scorer.kind=prefix",
    "evolved_sampling.scorer.prefix_share=0.5",
    "evolved_sampling.selection.keep_ratio=0.5",
)
"""As many micro-batches score as train: losses are doubled and halved, which is exact."""


def merged_settings(*overrides: str) -> Any:
    """Settings of a loop without files, whose scorer merges."""
    own = [f"evolved_sampling.{each}" for each in SIXTEENTHS]
    return settings_of(Path("unused"), Path("unused"), *own, *overrides)


def compare(settings: Any, rows: RandomRows, per_token: bool = False, experts: bool = False) -> list[tuple[Any, ...]]:
    """Evolve, then train plainly on what was chosen; score what was scored early once more before.

    Returns:
        For each iteration that scores early: (gradients equal, largest difference relative to the largest gradient,
        early losses, the same of a forward-only pass), losses None on stages without them.
    """
    initialize(settings)
    if experts:
        build_experts()
    torch.manual_seed(5 + parallel_state.get_pipeline_model_parallel_rank())
    start = random_state()
    loop = Loop(settings, rows, per_token=per_token)
    restore_random_state(start)
    oracle = Loop(settings, None, per_token=per_token)
    assert loop.sampling is not None
    engine, found = loop.sampling.engine, []
    noted: list[Any] = []
    train = ScheduleCall.train

    def fetch(batch: Any) -> None:
        if loop.sampling.feed is not None:
            loop.sampling.feed.fetch(batch)

    def noting(self: ScheduleCall, work: Work) -> Any:
        if work.ahead is None:
            return train(self, work)
        current = engine.sampler.batch(engine.iteration)
        fetch(work.ahead)
        fresh = self.score(engine.own)
        fetch(current)
        trained = train(self, work)
        noted.append((trained.ahead, fresh))
        return trained

    ScheduleCall.train = noting
    for _ in range(ITERATIONS):
        before = random_state()
        step = loop.evolve()
        after = random_state()
        restore_random_state(before)
        size = settings.training.micro_batch_size * engine.grid.dp_size
        plain = oracle.train_on(step.seen or [{}] * (len(step.chosen) // size))  # stages between see no data
        restore_random_state(after)
        distance = float((step.gradients - plain.gradients).abs().max() / plain.gradients.abs().max())
        if noted:
            found.append((torch.equal(step.gradients, plain.gradients), distance, *noted.pop()))
    return found


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], float]] = {
    "one": ("one", (), {}, 1e-6),
    "pp2": ("pp2", (), {}, 1e-6),
    "vpp2 per token": ("vpp2", (), {"per_token": True}, 0.0),
    "pp2 prefix": ("pp2", HALF_PREFIX, {}, 0.0),
}
SLOW_CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], float]] = {
    "pp4": ("pp4", (), {}, 1e-6),
    "pp2 dropout": ("pp2", ("model.dropout=0.1",), {}, 1e-6),
    "pp2 recompute": ("pp2", ("model.recompute=full", "model.dropout=0.1"), {}, 1e-6),
    "pp2 experts": ("pp2", (), {"per_token": True, "experts": True}, 0.0),
    "pp2-dp2-overlaps": ("pp2-dp2-overlaps", (), {}, 1e-6),
    "pp2-dp2-overlaps per token": ("pp2-dp2-overlaps", (), {"per_token": True}, 0.0),
    "pp2-dp2-overlaps bf16": ("pp2-dp2-overlaps", ("training.precision=bf16",), {"per_token": True}, 0.0),
    "vpp2-dp2-overlaps": ("vpp2-dp2-overlaps", (), {}, 1e-6),
    "vpp2 prefix": ("vpp2", HALF_PREFIX, {}, 0.0),
    "tp2-pp2": ("tp2-pp2", (), {}, 1e-6),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_neither_feels_the_other(case: str) -> None:
    """Gradients are those of plain training on the choice, bit for bit where losses are not rescaled."""
    layout, overrides, more, tolerance = {**CASES, **SLOW_CASES}[case]
    ranks, own = LAYOUTS[layout]
    rows = RandomRows(RAGGED if more.get("per_token") else UNMASKED)
    settings = merged_settings(*own, *overrides)
    found = run_on_ranks(ranks, functools.partial(compare, settings, rows, **more), timeout=200)
    told = 0
    for rank in found:
        assert len(rank) >= 3
        for equal, distance, early, fresh in rank:
            assert equal if tolerance == 0 else distance <= tolerance
            assert (early is None) == (fresh is None)
            if fresh is not None:
                told += 1
                np.testing.assert_array_equal(early, fresh)
    assert told >= 3


def passes_of(settings: Any) -> tuple[list[bool], tuple[int, int, int]]:
    """Forward (True) and backward passes in the order in which upstream's schedule runs them on this rank."""
    initialize(settings)
    loop = Loop(settings, None)
    found: list[bool] = []

    def noted(function: Any, forward: bool) -> Any:
        def noting(*args: Any, **named: Any) -> Any:
            found.append(forward)
            return function(*args, **named)

        return noting

    schedules.forward_step = noted(schedules.forward_step, True)
    schedules.backward_step = noted(schedules.backward_step, False)
    rows = [RandomRows()[number] for number in range(COUNT)]
    loop.train_on([{name: each[None] for name, each in row.items()} for row in rows])
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return found, (stage, parallel_state.get_pipeline_model_parallel_world_size(), len(loop.chunks))


@pytest.mark.parametrize("layout", ["pp2", "vpp2", pytest.param("pp4", marks=pytest.mark.slow)])
def test_the_simulation_runs_upstreams_order(layout: str) -> None:
    ranks, overrides = LAYOUTS[layout]
    for found, place in run_on_ranks(ranks, passes_of, merged_settings(*overrides), timeout=200):
        assert found == [event.forward for event in program(*place, COUNT)]
