"""Megatron-Core's sums of auxiliary losses are where we look for them, and only they are rescaled."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from es_megatron.frameworks import auxiliary_losses
from es_megatron.trainer.model import initialize
from tests.contract.test_gradients import DROPOUT, moe_counters, settings_for
from tests.ranks_helper import on_ranks, run_on_ranks
from tests.small_loop import Loop, RandomRows, build_experts

from es_megatron.frameworks.megatron_core import reads_data  # isort: skip - after the CPU layer


@on_ranks(1)
def test_experts_sums_become_means_over_what_was_trained() -> None:
    settings = settings_for(DROPOUT)
    initialize(settings)
    build_experts()
    loop = Loop(settings, RandomRows())
    steps = [loop.evolve() for _ in range(4)]
    buffers = len([None for chunk in loop.chunks for _ in torch.nn.Module.buffers(chunk)])
    before = [each.tolist() for each in moe_counters(loop)]
    found = [each.tolist() for each in auxiliary_losses.sums()]
    assert sorted(found) == sorted(before[buffers:]), "the balancing loss and the z-loss of each layer"
    assert len(found) == 2
    assert all(value > 0 for each in found for value in each)
    assert len(steps[-1].chosen) < 16
    auxiliary_losses.rescale(4.0)
    after = [each.tolist() for each in moe_counters(loop)]
    assert after[:buffers] == before[:buffers]
    assert after[buffers:] == [[4 * value for value in each] for each in before[buffers:]]


@on_ranks(1)
def test_losses_of_multi_token_prediction_are_rescaled_and_counts_are_not() -> None:
    module = importlib.import_module("megatron.core.transformer.multi_token_prediction")
    helper: Any = module.MTPLossLoggingHelper
    initialize(settings_for())
    if hasattr(helper, "save_metrics_to_tracker"):  # 0.19 and later count right tokens, too
        helper.save_metrics_to_tracker(torch.tensor(3.0), torch.tensor(5.0), torch.tensor(7.0), 1, 2)
    else:
        helper.save_loss_to_tracker(torch.tensor(3.0), 1, 2)
    auxiliary_losses.rescale(4.0)
    values = {name: each.tolist() for name, each in helper.tracker.items() if isinstance(each, torch.Tensor)}
    assert [0.0, 12.0] in values.values()
    assert all(each in ([0.0, 12.0], [0.0, 5.0], [0.0, 7.0]) for each in values.values())
    helper.tracker.clear()
    assert list(auxiliary_losses.sums()) == []


@pytest.mark.parametrize(
    ("stages", "reading"),
    [
        ([["embedding", "decoder"], ["decoder"], ["decoder", "mtp", "loss"]], [0, 2]),
        ([["embedding"], ["decoder"], ["mtp"], ["loss"]], [0, 2, 3]),
    ],
)
def test_stages_with_multi_token_prediction_read_data(stages: list[list[str]], reading: list[int]) -> None:
    """As `mtp_on_this_rank` of Megatron-Core has it for layouts."""
    layout = SimpleNamespace(layout=[[[SimpleNamespace(name=name) for name in stage]] for stage in stages])

    def reads() -> bool:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=len(stages), create_gloo_process_groups=False
        )
        return reads_data(SimpleNamespace(pipeline_model_parallel_layout=layout))

    assert [rank for rank, found in enumerate(run_on_ranks(len(stages), reads)) if found] == reading
