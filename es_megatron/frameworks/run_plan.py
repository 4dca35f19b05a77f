"""A run's plan before there is an engine, and the plan as `attach` prints it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch.distributed as dist

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config.names import SECTION, block_in
from es_megatron.core import plan as plans
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.plan import Plan
from es_megatron.core.run_sizes import Sizes
from es_megatron.data.manifest import Manifest
from es_megatron.errors import ConfigError

BATCH, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


class BatchSizes(NamedTuple):
    """What a plan needs to know of batches."""

    meta_batch: int
    """Sequences that an iteration draws."""
    micro_batch: int
    """Sequences of a rank's micro-batch."""
    data_parallel: int
    """Ranks that the meta-batch is shared out to."""


def plan_run(
    blend: Any,
    *,
    train_samples: int,
    deepspeed: str | Path | Mapping[str, Any] | None = None,
    config: EvolvedSamplingConfig | None = None,
    global_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    data_parallel: int | None = None,
    micro_batch_multiple: int = 1,
) -> Plan:
    """Plan a run before there is an engine or a process group, as `attach` will plan it.

    A rate schedule that is given to `deepspeed.initialize` has to end with `plan_run(...).iterations`. Where a run
    begins from a checkpoint of another blend, what `attach` gives as its `plan` counts.

    Args:
        blend: the training data, of `load_blend` or `blend_of`.
        train_samples: sequences that the plain run would draw.
        deepspeed: DeepSpeed's configuration, a file or its content: gives batch sizes and settings where they are not
            given here.
        config: settings; None: the `"evolved_sampling"` block of `deepspeed`, or the defaults without `deepspeed`.
        global_batch_size: the meta-batch, B.
        micro_batch_size: sequences of a rank's micro-batch.
        data_parallel: data-parallel ranks; None: all ranks of the process group or of the launcher. Give it where there
            are tensor or pipeline ranks.
        micro_batch_multiple: the pipeline size where stages of Megatron-Core are interleaved.

    Returns:
        The plan: `iterations`, `passes`, `kept`, and more.

    Raises:
        ConfigError: a batch size is not known or they do not agree, or what `attach` would refuse of them.
    """
    content = {} if deepspeed is None else content_of(deepspeed)
    given = {BATCH: global_batch_size, MICRO: micro_batch_size}
    known = {name: value for name, value in given.items() if value is not None}
    sizes = batch_sizes({**content, **known}, data_parallel)
    if config is None and deepspeed is None:
        config = EvolvedSamplingConfig()
    config = config or settings_in(content)
    quantum = math.lcm(sizes.micro_batch * sizes.data_parallel * micro_batch_multiple, config.selection.parts)
    manifest: Manifest = blend.manifest
    return plans.plan_run(config, manifest, sizes.meta_batch, quantum, train_samples)


def content_of(deepspeed: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration as a mapping.

    Raises:
        ConfigError: the file is no JSON, or is not there.
    """
    if isinstance(deepspeed, Mapping):
        return dict(deepspeed)
    try:
        found: object = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`deepspeed` must be a JSON file, but `{deepspeed}` is not: {error}. Correct it.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"`{deepspeed}` must hold a JSON object, but holds {found!r:.100} instead.")
    return cast(dict[str, Any], found)


def settings_in(content: Mapping[str, Any]) -> EvolvedSamplingConfig:
    """Settings in the `"evolved_sampling"` block of a DeepSpeed configuration.

    Raises:
        ConfigError: no such block, an unknown key, a value out of range.
    """
    block = block_in(content, "the DeepSpeed configuration")
    if block is None:
        raise ConfigError(
            f'The DeepSpeed configuration must have a block `"{SECTION}": {{...}}`. Add it, or pass `config`.'
        )
    return EvolvedSamplingConfig.from_mapping(block, f'DeepSpeed configuration: "{SECTION}"')


def batch_sizes(content: Mapping[str, Any], data_parallel: int | None) -> BatchSizes:
    """Batch sizes by DeepSpeed's rule: batch = micro-batch * accumulation steps * data-parallel ranks.

    Args:
        content: a configuration with two of the three, or all; "auto" is none.
        data_parallel: see `plan_run`.

    Raises:
        ConfigError: fewer are known, or they do not agree.
    """
    known = {name: int(content[name]) for name in (BATCH, MICRO, STEPS) if content.get(name) not in (None, "auto")}
    batch, micro, steps = (known.get(name) for name in (BATCH, MICRO, STEPS))
    if data_parallel is None and batch and micro and steps:
        data_parallel = batch // (micro * steps)
    ranks = data_parallel or world_size()
    if micro is None and batch and steps:
        micro = batch // (steps * ranks)
    if batch is None and micro:
        batch = micro * (steps or 1) * ranks
    if not batch or not micro:
        raise ConfigError(
            f"`global_batch_size` and `micro_batch_size` must be known before a run is planned, but only {known} is "
            f'given (`"auto"` says nothing yet). Pass them, or write `{BATCH}` and `{MICRO}` into the configuration.'
        )
    if batch % (micro * ranks) or (steps and batch != micro * steps * ranks):
        raise ConfigError(
            f"`{BATCH}` must be `{MICRO}` times `{STEPS}` times the data-parallel ranks, but is {batch} with a "
            f"micro-batch of {micro}, {steps or 'any number of'} steps and {ranks} ranks. Correct one, or pass "
            "`data_parallel` where there are tensor or pipeline ranks."
        )
    return BatchSizes(batch, micro, ranks)


def world_size() -> int:
    """Ranks of the process group, or those that a launcher has told of; 1 without either."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def print_plan(engine: EvolvedSampling, pipeline: int = 1, virtual: int = 1) -> None:
    """Print the plan of a run on its first rank.

    Args:
        engine: of the run.
        pipeline: stages.
        virtual: model chunks of a stage.
    """
    if engine.grid.world_rank:
        return
    sizes = Sizes(engine.meta_batch, engine.micro_batch, engine.grid.dp_size, pipeline, virtual, backward=2.0)
    layout = sizes.layout(engine.config.scorer.micro_batch_size)
    print(plans.describe(engine.plan, layout, engine.manifest.seq_length, calibrated=False), flush=True)
    if engine.plan.evolving_iterations:
        rate = math.sqrt(engine.plan.kept / engine.plan.meta_batch)
        print(f"  learning rate     lr x sqrt(b/B) = lr x {rate:.3g} to begin with; search around it")
        print("  loss              docs/results.md has what such runs won and lost; not measured for yours", flush=True)
