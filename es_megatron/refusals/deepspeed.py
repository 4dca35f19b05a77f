"""Blocks of a DeepSpeed configuration, and features of its engine, that Evolved Sampling does not go with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from es_megatron.refusals.table import Refusal, is_above_one

OWN_ORDER = "DeepSpeed's own sampler would choose the samples, and it knows them by index only"
OFF_AND_WHERE = "switch it off (docs/coming-from-curriculum-learning.md says what there is instead)"

DEEPSPEED: tuple[Refusal, ...] = (
    Refusal("data_efficiency", OWN_ORDER, cure=OFF_AND_WHERE),
    Refusal("curriculum_learning", "it shortens sequences behind the sampler's back", "selection", cure=OFF_AND_WHERE),
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


SAMPLING, ROUTING = ("data_efficiency", "data_sampling"), ("data_efficiency", "data_routing")
SWITCHES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "data_efficiency": ((*SAMPLING, "curriculum_learning"), (*SAMPLING, "dynamic_batching")),
    "random_ltd": ((*ROUTING, "random_ltd"),),
}
"""Where the blocks stand whose `enabled` counts, if not at the top: DeepSpeed passes over that of the blocks around."""


def block_is_on(config: Mapping[str, Any], name: str) -> bool:
    """Whether a block of a DeepSpeed configuration switches something on, as DeepSpeed reads it."""
    if name == "compression_training":  # its parts are switched on one by one
        return _any_enabled(config.get(name))
    return any(_is_enabled(config, place) for place in SWITCHES.get(name, ((name,),)))


def _is_enabled(config: Mapping[str, Any], place: tuple[str, ...]) -> bool:
    """Whether there is a block at a place, and says `"enabled": true`."""
    block: Any = config
    for key in place:
        block = block.get(key) if isinstance(block, dict) else None  # pyright: ignore[reportUnknownMemberType]
    return isinstance(block, dict) and block.get("enabled") is True  # pyright: ignore[reportUnknownMemberType]


def _any_enabled(value: Any) -> bool:
    """Whether `"enabled": true` stands anywhere in nested blocks."""
    if not isinstance(value, dict):
        return False
    return value.get("enabled") is True or any(map(_any_enabled, value.values()))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
