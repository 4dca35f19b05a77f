"""Invariant 4: a scoring pass leaves nothing behind but its losses, whatever the model keeps."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from es_megatron.trainer.model import initialize
from es_megatron.trainer.model_state import random_state
from tests.contract.test_gradients import DROPOUT, LAYOUTS, moe_counters, settings_for
from tests.ranks_helper import run_on_ranks
from tests.small_loop import RAGGED, Loop, RandomRows, build_experts
from tests.small_run import main_gradients

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip - after the CPU layer

from es_megatron.frameworks.megatron_core import ScheduleCall


class Counter(torch.nn.Module):
    """Counts its calls in a buffer whatever the mode, and draws from every generator there is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.current_max_attn_logits: torch.Tensor | None = None  # as Transformer Engine's attention has it

    def note(self, *_: Any) -> None:
        self.calls += 1
        before = self.current_max_attn_logits
        self.current_max_attn_logits = torch.ones(1) if before is None else before + 1
        torch.rand(3)


class Timers:
    """Upstream's timers, counting how often they are asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any, **__: Any) -> Timers:
        self.calls += 1
        return self

    def start(self, **_: Any) -> None:
        """Nothing to time."""

    stop = start


def snapshot(loop: Loop) -> dict[str, Any]:
    """Everything of a rank that a pass could change, as values that can be compared with ==."""
    state = random_state()
    modules = [module for chunk in loop.chunks for module in chunk.modules()]
    configs = [chunk.config for chunk in loop.chunks]
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "torch": state["torch"].tolist(),
        "cuda": state["cuda"].tolist(),
        "tracker": {name: value.tolist() for name, value in state["tracker"].items()},
        "weights": [weight.tolist() for chunk in loop.chunks for weight in chunk.parameters()],
        "gradients": main_gradients(loop.chunks).tolist(),
        "grad": [weight.grad is None for chunk in loop.chunks for weight in chunk.parameters()],
        "added": [getattr(weight, "grad_added_to_main_grad", None) for m in modules for weight in m.parameters()],
        "buffers": [buffer.tolist() for buffer in moe_counters(loop)],
        "modes": [module.training for module in modules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],  # pyright: ignore[reportPrivateUsage]
        "logits": [str(chunk.module.counter.current_max_attn_logits) for chunk in loop.chunks],
        "timers": [config.timers and config.timers.calls for config in configs],
        "config": [{key: repr(value) for key, value in vars(config).items()} for config in configs],
        "scores": loop.sampling and loop.sampling.engine.store.checksum(),
        "enabled": torch.is_grad_enabled(),
    }


def score(loop: Loop) -> Any:
    """The scoring pass of the iteration that comes, and nothing else of it."""
    assert loop.sampling is not None
    engine = loop.sampling.engine
    batch = engine.draw()
    assert loop.sampling.feed is not None
    loop.sampling.feed.fetch(batch)
    none = None if len(loop.chunks) == 1 else [None for _ in loop.chunks]
    call = {**loop.call(len(engine.own)), "data_iterator": none}
    return ScheduleCall(loop.sampling, get_forward_backward_func(), call).score(engine.own)


def leave_traces(overrides: tuple[str, ...], experts: bool) -> dict[str, bool]:
    """Score in the middle of an iteration with gradients half accumulated, and say what changed."""
    settings = settings_for(DROPOUT, "evolved_sampling.scorer.micro_batch_size=2", *overrides)
    initialize(settings)
    if experts:
        build_experts()
    loop = Loop(settings, RandomRows(RAGGED))
    for chunk in loop.chunks:
        counter = Counter()
        chunk.module.add_module("counter", counter)
        chunk.module.decoder.layers[0].register_forward_hook(counter.note)
        chunk.module.decoder.layers[-1].eval()  # a user may have frozen a part
        chunk.config.timers = Timers()
    for _ in range(3):
        loop.evolve()
    if settings.parallel.overlap_param_gather:
        score(loop)  # the first forward pass after an optimizer step gathers its weights, whoever runs it
    before = snapshot(loop)
    frozen = [chunk.module.decoder.layers[-1] for chunk in loop.chunks]
    losses = score(loop)
    assert not any(layer.training for layer in frozen), "nor have the scoring passes of whole iterations thawed it"
    after = snapshot(loop)
    assert losses is None or np.isfinite(losses).all()
    calls = [chunk.module.counter.calls.item() for chunk in loop.chunks]
    assert all(count > 0 for count in calls)
    return {name: after[name] == value for name, value in before.items()}


@pytest.mark.parametrize("name", ["one", "dp2", "pp2", "vpp2", "tp2", "dp2-overlaps"])
def test_scoring_leaves_no_trace(name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    for same in run_on_ranks(ranks, leave_traces, overrides, False):
        assert [key for key, equal in same.items() if not equal] == []


def test_scoring_leaves_no_trace_in_a_mixture_of_experts() -> None:
    for same in run_on_ranks(1, leave_traces, (), True):
        assert [key for key, equal in same.items() if not equal] == []


def test_scoring_does_not_see_dropout_and_training_does() -> None:
    def run() -> tuple[list[float], list[float], bool]:
        settings = settings_for("model.dropout=0.3")
        initialize(settings)
        loop = Loop(settings, RandomRows(RAGGED))
        first, second = score(loop).tolist(), score(loop).tolist()
        before = random_state()["torch"]
        loop.evolve()
        return first, second, torch.equal(before, random_state()["torch"])

    first, second, unmoved = run_on_ranks(1, run)[0]
    assert first == second
    assert not unmoved


def test_the_snapshot_sees_a_trace() -> None:
    """The tests above can fail: a pass without the protection changes what they look at."""

    def run() -> set[str]:
        from es_megatron.frameworks import megatron_core

        megatron_core.traceless = lambda chunks: torch.no_grad()
        return {name for name, equal in leave_traces((), False).items() if not equal}

    assert {"torch", "buffers", "timers", "logits"} <= run_on_ranks(1, run)[0]
