"""Gradient accumulation of a `DeepSpeedEngine`: as many micro-batches as are trained on, then one step."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from es_megatron.errors import ConfigError


@contextmanager
def accumulating(deepspeed: Any, micro_batches: int) -> Generator[None]:
    """Have the engine step after so many micro-batches of a rank, counted from now; put its batch size back after.

    Without the count begun anew the boundaries would be those of the batches before.
    """
    before = deepspeed.train_batch_size()
    size = deepspeed.train_micro_batch_size_per_gpu() * deepspeed.dp_world_size
    deepspeed.set_train_batch_size(micro_batches * size)
    deepspeed.micro_steps = 0
    try:
        yield
    finally:
        deepspeed.set_train_batch_size(before)


def check_steps(steps: int) -> None:
    """Refuse an iteration in which the optimizer was not called once, for all its micro-batches.

    Raises:
        ConfigError: it was called never, or more often.
    """
    if steps != 1:
        raise ConfigError(
            f"DeepSpeed's optimizer must be called once for a meta-batch, but was called {steps} times: something in "
            "the loop moves the boundary of its gradient accumulation. Leave `set_gradient_accumulation_boundary`, "
            "`backward` and `step` of the engine to `sampling.step()`, and go on from the last checkpoint."
        )


@contextmanager
def boundary_counted(engine: Any) -> Generator[None]:
    """Have the engine count micro-batches itself in the body of a `with`.

    Who has called `set_gradient_accumulation_boundary` (accelerate does in every `backward`) has pinned the answer for
    good: the optimizer would step after every micro-batch, or never.
    """
    pinned = getattr(engine, "_is_gradient_accumulation_boundary", None)
    engine._is_gradient_accumulation_boundary = None
    try:
        yield
    finally:
        engine._is_gradient_accumulation_boundary = pinned


def discard_gradients(engine: Any) -> None:
    """Forget the gradients of backward passes that no step followed, at every ZeRO stage."""
    optimizer = engine.optimizer
    engine.module.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)  # at stage 3 this is all
    if engine.zero_optimization_stage() in (1, 2):
        optimizer.micro_step_id = -1  # the next backward pass overwrites what has been gathered
        for gathered in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for key in list(gathered):
                gathered[key] = None
    engine.micro_steps = 0
