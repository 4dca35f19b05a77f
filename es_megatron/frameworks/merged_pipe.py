"""One `train_batch` of DeepSpeed's `PipelineEngine` that trains a meta-batch and scores the next one.

The engine runs any schedule of its own instructions. This is its training schedule, in which the micro-batches that
score have a forward pass of their own kind, no backward pass, and send and receive no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from es_megatron.core.simulation import Order
from es_megatron.frameworks.scoring import traceless

LossOfOutputs = Callable[[Any, Any], Tensor]


@contextmanager
def merged_schedule(deepspeed: Any, order: Order, losses_of: LossOfOutputs, found: list[Tensor]) -> Generator[None]:
    """Have `train_batch` train some micro-batches and score the others, in the body of a `with`.

    Args:
        deepspeed: the engine; its accumulation steps must be those that train.
        order: of the micro-batches that its data iterator gives.
        losses_of: losses of sequences `[b]`, of the last stage's outputs and the labels.
        found: takes the losses of each scoring micro-batch, on the last stage.
    """
    from deepspeed.runtime.pipe import schedule

    trains = order.trains

    class ScoringPass(schedule.BufferOpInstruction):
        """Forward, without autograd and in evaluation mode."""

    class MergedSchedule(schedule.TrainSchedule):
        """Upstream's schedule without the backward half of what scores."""

        def steps(self) -> Generator[list[Any]]:
            before = -1
            for number, commands in enumerate(super().steps()):
                now, _ = self._step_to_micro_batch(number)
                yield [each for command in commands if (each := self._turned(command, now, before)) is not None]
                before = now

        def _turned(self, command: Any, now: int, before: int) -> Any:
            """A command of this step as it is run, None where it is not; gradients are sent one step later."""
            at = before if isinstance(command, schedule.SendGrad) else now
            about = (schedule.ForwardPass, schedule.BackwardPass, schedule.SendGrad, schedule.RecvGrad)
            if not isinstance(command, about) or trains[at]:
                return command
            return ScoringPass(command.kwargs["buffer_id"]) if isinstance(command, schedule.ForwardPass) else None

    def score(engine: Any, buffer_id: int) -> None:
        with forward_only(engine, losses_of):
            engine._exec_forward_pass(buffer_id)
        if engine.is_last_stage():
            found.append(engine.fwd_outputs.pop())

    deepspeed._INSTRUCTION_MAP = {**type(deepspeed)._INSTRUCTION_MAP, ScoringPass: score}
    deepspeed._train_schedule = lambda: MergedSchedule(len(trains), deepspeed.num_stages, deepspeed.stage_id)
    try:
        yield
    finally:
        del deepspeed._INSTRUCTION_MAP, deepspeed._train_schedule  # of the instance; the class has its own


@contextmanager
def forward_only(deepspeed: Any, losses_of: LossOfOutputs) -> Generator[None]:
    """Leave no trace of a forward pass of the engine: nothing is added to the losses of the batch that is trained."""
    module, totals = deepspeed.module, (deepspeed.total_loss, deepspeed.total_additional_losses)
    loss_fn, deepspeed.total_loss = module.loss_fn, None
    module.loss_fn = losses_of
    try:
        with traceless([module]), torch.no_grad():
            # the engine takes this flag alone for evaluation, and would drop the activations of what trains
            module.training = True
            yield
    finally:
        module.loss_fn = loss_fn
        deepspeed.total_loss, deepspeed.total_additional_losses = totals
