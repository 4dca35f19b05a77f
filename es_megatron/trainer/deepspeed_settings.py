"""What DeepSpeed is told, and what it cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from es_megatron.config.fields import Spec, check_fields
from es_megatron.errors import ConfigError

if TYPE_CHECKING:
    from es_megatron.trainer.model_settings import ParallelSettings


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What DeepSpeed is told beyond the rest of the settings, with `backend: deepspeed`."""

    zero_stage: Annotated[int, Spec("in [0, 3]", "stage", ("stage", "zero"))] = 1
    """What is sharded over data-parallel ranks, 0 to 3: nothing, optimizer state, gradients too, weights too."""

    config: Annotated[Path | None, Spec(also=("deepspeed_config", "ds_config"))] = None
    """A DeepSpeed JSON file whose blocks are passed on (offload, communication, activation checkpointing); batch sizes,
    precision, clipping and ZeRO stage come from the other settings, and must agree where the file has them too."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self)


def check_deepspeed(settings: DeepSpeedSettings, parallel: ParallelSettings, *, bf16: bool, clips: bool) -> None:
    """Refuse what DeepSpeed does in other ways, or not at all.

    Raises:
        ConfigError: names the setting and the cure.
    """
    stage = settings.zero_stage
    for name in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, name):
            raise ConfigError(
                f"`{name}` must be off with `backend: deepspeed`, where `deepspeed.zero_stage` says what is sharded. "
                "Turn it off."
            )
    if parallel.virtual_pipeline is not None:
        raise ConfigError(
            "`virtual_pipeline` must be null with `backend: deepspeed`, which has no interleaved schedule. "
            "Set it to null."
        )
    if parallel.context > 1:
        raise ConfigError(
            f"`context` must be 1 with `backend: deepspeed`, but is {parallel.context} instead: its ranks that share a "
            "sequence are not told apart. Use 1, or `backend: megatron`."
        )
    if parallel.sequence_parallel:
        raise ConfigError(
            "`sequence_parallel` must be off with `backend: deepspeed`: norms' gradients are not summed over tensor "
            "ranks there. Turn it off."
        )
    if parallel.pipeline > 1 and stage > 1:
        raise ConfigError(
            f"`zero_stage` must be 0 or 1 with pipeline stages, but is {stage} instead: DeepSpeed's pipeline "
            "engine keeps whole gradients. Use 1, or `pipeline: 1`."
        )
    if parallel.pipeline > 1 and stage == 0 and clips:
        raise ConfigError(
            "`zero_stage` must be 1 with pipeline stages and `clip_grad`: without ZeRO DeepSpeed's norm of the "
            "gradients leaves out vectors of all stages but the first, and counts tied matrices twice. Use 1, or "
            "`clip_grad: 0`."
        )
    if bf16 and stage == 0:
        raise ConfigError(
            "`zero_stage` must be 1 or more with bf16: DeepSpeed's bf16 optimizer without ZeRO takes a step of its own "
            "at the start, which shifts Adam's bias correction. Use 1."
        )
