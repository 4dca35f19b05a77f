"""Checks of a DeepSpeed JSON: features that change the batch, the data order or the forward pass on their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from es_megatron.checks.findings import Finding, note, ok, refuse
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.existing_run import ExistingRun
from es_megatron.refusals.deepspeed import DEEPSPEED, block_is_on
from es_megatron.refusals.table import Refusal, find

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
NOTED = {
    "elasticity": (
        "the micro-batch size depends on the number of GPUs, and b must fit each of them",
        "check each size with `--world-size N`",
    ),
    "flops_profiler": ("it counts the scoring pass too", "read tokens trained and forwarded in the log instead"),
}

REMOVED = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
)
"""Keys that DeepSpeed 0.19.8 refuses wherever they stand."""


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A block of the JSON; empty if it is missing or no block."""
    value = config.get(name)
    return cast(Mapping[str, Any], value) if isinstance(value, dict) else {}


def enabled(config: Mapping[str, Any], name: str) -> bool:
    """Whether a block is there and not switched off."""
    block = section(config, name)
    return bool(block) and block.get("enabled", True) is True


def check_deepspeed(run: ExistingRun, settings: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Findings about a DeepSpeed JSON, for settings of Evolved Sampling."""
    config = run.deepspeed
    yield from _zero(config)
    found = list(find_blocks(config, settings))
    for row in found:
        yield refuse(f"`{row.name}`", row.why, row.way_out())
    if not found:
        yield ok("data order", "no curriculum, data efficiency, layer drop or autotuning of DeepSpeed's own")
    gone = [name for name in REMOVED if name in config and name not in {row.name for row in found}]
    if gone:
        yield note(
            " ".join(f"`{name}`" for name in gone),
            "DeepSpeed 0.19.8 ends with an error where this stands, also where it is switched off",
            "take it out",
        )
    for name, (why, cure) in NOTED.items():
        if enabled(config, name):
            yield note(f"`{name}`", why, cure)
    monitors = [name for name in MONITORS if enabled(config, name)]
    if monitors:
        yield note(
            " ".join(f"`{name}`" for name in monitors),
            "with a PipelineEngine DeepSpeed's monitor cannot take the scoring pass's list of losses",
            "switch it off there, and read the log of Evolved Sampling",
        )
    if enabled(config, "fp16") and section(config, "fp16").get("loss_scale", 0) == 0:
        yield note(
            "`fp16`",
            "an iteration that the loss scaler skips leaves the scores as they were",
            "none needed; bf16 skips none",
        )


def find_blocks(config: Mapping[str, Any], settings: EvolvedSamplingConfig) -> Iterator[Refusal]:
    """Rows of the table that the blocks and sizes of a DeepSpeed configuration break."""

    def setting(name: str) -> Any:
        value = config.get(name)
        return value if isinstance(value, int) else block_is_on(config, name) or None

    return find(DEEPSPEED, setting, settings)


def check_blocks_in_yaml(run: ExistingRun, settings: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Findings about DeepSpeed's blocks in a YAML file, at its top or in a block of it, as GPT-NeoX has them."""
    places = [run.deepspeed, *(each for each in run.deepspeed.values() if isinstance(each, dict))]
    for place in places:
        blocks = {name: value for name, value in place.items() if isinstance(value, dict)}
        for row in find_blocks(blocks, settings):
            yield refuse(f"`{row.name}`", row.why, row.way_out())


def _zero(config: Mapping[str, Any]) -> Iterator[Finding]:
    stage = section(config, "zero_optimization").get("stage", 0)
    bf16 = enabled(config, "bf16") or enabled(config, "bfloat16")
    if stage not in (0, 1, 2, 3):
        yield refuse(f"`zero_optimization.stage: {stage}`", "it must be 0, 1, 2 or 3", "correct it")
    elif bf16 and stage == 0:
        yield refuse(
            "`bf16` with ZeRO stage 0",
            "DeepSpeed takes an extra optimizer step at start-up there, which shifts Adam's bias correction",
            "use stage 1",
        )
    elif stage == 3:
        yield ok(
            "`zero_optimization.stage: 3`",
            "every rank makes the same number of forward and backward passes, as it needs",
        )
    else:
        yield ok(f"`zero_optimization.stage: {stage}`", "tried with Evolved Sampling")
    if stage in (2, 3):
        yield note(
            f"`zero_optimization.stage: {stage}`",
            "DeepSpeed's PipelineEngine does not take gradients partitioned by ZeRO",
            "stage 0 or 1 if the run has pipeline stages",
        )
