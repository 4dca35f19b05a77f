"""Blocks of a DeepSpeed configuration, and features of its engine, that Evolved Sampling does not go with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from es_megatron.refusals.table import Refusal, is_above_one

OWN_ORDER = "DeepSpeed's own sampler would choose the samples, and it knows them by index only"

DEEPSPEED: tuple[Refusal, ...] = (
    Refusal("curriculum_learning", "it shortens sequences behind the sampler's back", "selection"),
    Refusal("data_efficiency", OWN_ORDER),
    Refusal("random_ltd", "it drops tokens in training that the score would see", "selection"),
    Refusal("progressive_layer_drop", "the pass would go through other layers than training does", "scoring"),
    Refusal("hybrid_engine", "it is for reinforcement learning, which makes its samples as it goes"),
    Refusal(
        "autotuning",
        "it changes batch sizes from run to run",
        cure="tune first, then use the configuration that it found",
    ),
    Refusal("compression_training", "quantisation and pruning schedules count forward passes", "scoring"),
    Refusal("moe_layers", "DeepSpeed's experts have not been tried with fewer micro-batches", "selection"),
    Refusal(
        "sequence_parallel_size",
        "ranks that share a sequence are not told apart yet, and its losses would be spread over them",
        must="1",
        applies=lambda setting: is_above_one(setting("sequence_parallel_size")),
    ),
)
"""Blocks of a DeepSpeed configuration, and features of its engine."""


def block_is_on(config: Mapping[str, Any], name: str) -> bool:
    """Whether a block of a DeepSpeed configuration switches something on, as DeepSpeed reads it."""
    block: Any = config.get(name)
    if not isinstance(block, dict):
        return False
    if name == "compression_training":  # its parts are switched on one by one
        return _any_enabled(block)
    return block.get("enabled", False) is True  # pyright: ignore[reportUnknownMemberType]


def _any_enabled(value: Any) -> bool:
    """Whether `"enabled": true` stands anywhere in nested blocks."""
    if not isinstance(value, dict):
        return False
    return value.get("enabled") is True or any(map(_any_enabled, value.values()))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
