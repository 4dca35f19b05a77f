"""Megatron-Core's optimizer and learning-rate schedule, with steps that a non-finite gradient cannot spoil."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from es_megatron.errors import ConfigError
from es_megatron.frameworks import adam
from es_megatron.trainer.settings import PretrainSettings


def build_optimizer(settings: PretrainSettings, chunks: Sequence[DistributedDataParallel]) -> ChainedOptimizer:
    """Build the Adam of a run, sharded over data-parallel ranks if the settings say so.

    Args:
        settings: of the run.
        chunks: of `build_model`; their config learns how the optimizer scales losses.
    """
    adam.install()
    training = settings.training
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.precision == "bf16",
        params_dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=settings.parallel.distributed_optimizer,
        overlap_param_gather=settings.parallel.overlap_param_gather,
    )
    optimizer: Any = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    chunks[0].config.grad_scale_func = optimizer.scale_loss  # one config for all chunks
    return optimizer


def build_scheduler(
    settings: PretrainSettings, optimizer: ChainedOptimizer, total_steps: int
) -> OptimizerParamScheduler:
    """Build the linear warm-up and cosine decay of a run.

    Args:
        settings: of the run.
        optimizer: of `build_optimizer`.
        total_steps: what the caller's `scheduler.step(increment)` will add up to, >= 1: iterations or samples.

    Raises:
        ConfigError: there is no step to schedule.
    """
    if total_steps < 1:
        raise ConfigError(f"A run must have at least 1 step, but has {total_steps} instead. Raise `passes`.")
    training = settings.training
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=int(training.warmup * total_steps),
        lr_decay_steps=total_steps,
        lr_decay_style="cosine",
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,  # the settings of the run that goes on count, not the checkpoint's
        override_opt_param_scheduler=True,
    )


def take_settings(settings: PretrainSettings, optimizer: Any, scheduler: OptimizerParamScheduler) -> None:
    """Give an optimizer that has been loaded what the run's settings say, for it comes with those of its checkpoint."""
    training = settings.training
    values = {
        "max_lr": training.lr,
        "min_lr": training.min_lr,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_eps,
    }
    for group in optimizer.param_groups:
        group.update({name: value for name, value in values.items() if name in group})
    scheduler.step(0)  # rate and weight decay of where the schedule stands


def zero_gradients(chunks: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer) -> None:
    """Start an iteration: zero the gradient buffers, and with `overlap_param_gather` let weights be gathered again.

    Before the scoring pass too, not between it and the training pass.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def step(optimizer: ChainedOptimizer) -> tuple[bool, float]:
    """Clip the gradients and update the weights, unless the gradients are not finite.

    Megatron's own fp32 step takes any gradient, and one NaN then ruins every weight.

    Returns:
        Whether weights were updated, the same on every rank, and the norm of the gradients before clipping.
    """
    if optimizer.prepare_grads():
        return False, math.nan
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return False, norm
    for part in optimizer.chained_optimizers:
        parameters: list[torch.Tensor] = list(part.get_parameters())
        if part.config.clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    with torch.no_grad():
        return bool(optimizer.step_with_ready_grads()), norm


def learning_rate(optimizer: ChainedOptimizer) -> float:
    """Give the learning rate of the next step."""
    return float(optimizer.param_groups[0]["lr"])
