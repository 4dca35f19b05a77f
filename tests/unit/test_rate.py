"""Another learning rate for one step, whoever moves the schedule."""

from __future__ import annotations

import pytest
import torch

from es_megatron.frameworks.rate import scaled_steps

SCHEDULES = {
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "steps": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "absolute": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_moves_in_the_block_is_that_of_a_run_without_factor(name: str) -> None:
    """DeepSpeed moves the schedule right after the optimizer's step; plain SGD on a slope of 1 tells the rate used."""
    used: dict[float, list[float]] = {}
    after: dict[float, list[float]] = {}
    for factor in (1.0, 1.25):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        schedule = SCHEDULES[name](optimizer)
        used[factor], after[factor] = [], []
        for _ in range(6):
            before = weight.item()
            with scaled_steps(optimizer, factor):
                weight.grad = torch.ones_like(weight)
                optimizer.step()
                schedule.step()
            used[factor].append(before - weight.item())
            after[factor].append(optimizer.param_groups[0]["lr"])
    assert after[1.25] == after[1.0]
    assert used[1.25] == pytest.approx([1.25 * rate for rate in used[1.0]])
    assert len(set(after[1.0])) > 1
