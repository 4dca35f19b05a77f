"""`attach`: one verb for DeepSpeed's engines and for loops around Megatron-Core.

Importing this imports neither megatron nor deepspeed; `attach` imports what the object it is given comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.data.manifest import Manifest
from es_megatron.errors import ConfigError
from es_megatron.frameworks.run_plan import print_plan


class BlendLike(Protocol):
    """Samples by id, and what they belong to; `load_blend` makes one of a blend file, `blend_of` of datasets."""

    @property
    def manifest(self) -> Manifest:
        """Components and their sizes."""
        ...

    @property
    def rows(self) -> Any:
        """`rows[id]` is a sample: `tokens`, `labels`, `loss_mask`, `position_ids`, each `[T]`."""
        ...


def attach(
    target: Any,
    blend: BlendLike,
    *,
    train_samples: int,
    config: EvolvedSamplingConfig | None = None,
    show_plan: bool = True,
    **options: Any,
) -> Any:
    """Attach Evolved Sampling to a training loop, and print its plan; collective, on every rank.

    Args:
        target: a `DeepSpeedEngine` or `PipelineEngine`, as `deepspeed.initialize` gives it; or the model of a loop
            around Megatron-Core, a module or the list of its chunks, once `parallel_state` is initialised.
        blend: the training data, of `load_blend` or `blend_of`.
        train_samples: sequences that the plain run would draw.
        config: settings; None: the engine's `"evolved_sampling"` block, or the defaults on Megatron-Core.
        show_plan: print the plan on the first rank.
        options: those of the framework's own `attach` (`deepspeed_engine`, `deepspeed_pipe`, `megatron_core`).
            Megatron-Core needs `global_batch_size` and `micro_batch_size`; with `optimizer=` given, its `step` closes
            every iteration, and `finish` is not to be called.

    Returns:
        A `Handle`. On DeepSpeed `step()` trains one meta-batch; on Megatron-Core `wrap(schedule)` goes around the
        schedule, and `finish(succeeded)` closes an iteration. Both have `plan`, `iteration`, `done`, `save`, `load`,
        `state_dict` and `detach`.

    Raises:
        ConfigError: what cannot work, before the first iteration.
        DataError: a data file is not what the hash beside it says, as far as a few seconds of reading tell; what is
            found later is raised by `save`.
    """
    handle, stages = _attach(target, blend, train_samples, config, options)
    from es_megatron.frameworks.data_check import FIRST_SECONDS, check_behind
    from es_megatron.frameworks.megatron_data import LoadedBlend

    if isinstance(blend, LoadedBlend):
        engine = handle.engine
        handle.data = check_behind(blend, engine.grid, wanted=engine.config.order.check_files)
        handle.data.agree(FIRST_SECONDS)
    if show_plan:
        print_plan(handle.engine, *stages)
    return handle


def _attach(
    target: Any, blend: BlendLike, train_samples: int, config: EvolvedSamplingConfig | None, options: dict[str, Any]
) -> tuple[Any, tuple[int, int]]:
    """Let the framework's own `attach` do it; gives the pipeline stages and their model chunks too."""
    engines = {each.__name__ for each in type(target).__mro__ if each.__module__.partition(".")[0] == "deepspeed"}
    if "PipelineEngine" in engines:
        from es_megatron.frameworks import deepspeed_pipe

        handle = deepspeed_pipe.attach(
            target, blend.manifest, blend.rows, train_samples=train_samples, config=config, **options
        )
        return handle, (int(target.num_stages), 1)
    if "DeepSpeedEngine" in engines:
        from es_megatron.frameworks import deepspeed_engine

        handle = deepspeed_engine.attach(
            target, blend.manifest, blend.rows, train_samples=train_samples, config=config, **options
        )
        return handle, (1, 1)
    model_config = _config_of(target)
    for name in ("global_batch_size", "micro_batch_size"):
        if name not in options:
            raise ConfigError(f"`{name}` must be given for a loop around Megatron-Core. Give the run's own.")
    from es_megatron.frameworks import megatron_core

    handle = megatron_core.attach(
        config or EvolvedSamplingConfig(),
        blend.manifest,
        blend.rows,
        model_config=model_config,
        train_samples=train_samples,
        **options,
    )
    virtual = getattr(model_config, "virtual_pipeline_model_parallel_size", None)
    return handle, (int(model_config.pipeline_model_parallel_size), int(virtual or 1))


def _config_of(target: Any) -> Any:
    """The `TransformerConfig` of a model of Megatron-Core.

    Raises:
        ConfigError: it is none.
    """
    chunks = cast(Sequence[Any], target) if isinstance(target, list | tuple) else [target]
    found = getattr(chunks[0], "config", None) if chunks else None
    if not hasattr(found, "pipeline_model_parallel_size"):
        raise ConfigError(
            "`attach` must be given a DeepSpeed engine, or a model of Megatron-Core (which has a `config`), but "
            f"is given {type(target).__name__} instead. For a model of another kind use DeepSpeed's engine."
        )
    return found
