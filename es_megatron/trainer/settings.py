"""Everything a pretraining run is told, read from YAML and checked before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml

from es_megatron.checkpoint.disk import replace_file
from es_megatron.config import EvolvedSamplingConfig, build, require
from es_megatron.config.fields import Spec, check_fields
from es_megatron.config.names import grouped, override_path
from es_megatron.errors import ConfigError, LayoutError
from es_megatron.trainer.deepspeed_settings import DeepSpeedSettings, check_deepspeed
from es_megatron.trainer.model_settings import ModelSettings, ParallelSettings

Precision = Literal["fp32", "bf16"]
BackendName = Literal["megatron", "deepspeed"]
BlendChange = Literal["refuse", "keep_scores"]


@dataclass(frozen=True)
class DataSettings:
    """Where samples come from."""

    blend: Annotated[Path, Spec(also=("data_path", "dataset", "train_data_path", "data_prefix"))]
    """The blend file `es-megatron prepare` wrote; relative to the working directory."""

    num_workers: Annotated[int, Spec(">= 0", "processes of a rank", ("dataloader_num_workers", "workers"))] = 0
    """Loader processes of each rank that reads data, >= 0; 0 reads in the training process."""

    prefetch: Annotated[int, Spec(">= 1", "meta-batches", ("prefetch_factor",))] = 2
    """Meta-batches that each worker loads ahead, >= 1; at most `order.mask_lag` / workers, where that is given."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self)


@dataclass(frozen=True)
class TrainingSettings:
    """Length, batch, optimizer and schedule."""

    passes: Annotated[
        float | None, Spec("> 0", "passes over the blend", ("num_train_epochs", "epochs", "num_epochs"))
    ] = None
    """How often the whole blend's number of samples is drawn, > 0. Give this or `train_samples`."""

    train_samples: Annotated[int | None, Spec(">= 1", "samples", ("num_samples", "max_samples"))] = None
    """Samples a plain run would draw, >= 1. Give this or `passes`."""

    global_batch_size: Annotated[int, Spec(">= 1", "sequences", ("batch_size", "train_batch_size"))] = 32
    """Samples in a meta-batch (B): what Megatron calls the global batch. The optimizer sees the chosen ones."""

    micro_batch_size: Annotated[
        int, Spec(">= 1", "sequences", ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"))
    ] = 4
    """Samples in one forward and backward pass of a rank, >= 1."""

    lr: Annotated[float, Spec("> 0", also=("learning_rate", "max_lr"))] = 1e-3
    """Highest learning rate, > 0."""

    min_lr: Annotated[float, Spec(">= 0", also=("min_learning_rate", "lr_min", "warmup_min_lr"))] = 1e-4
    """Learning rate at the end of the cosine, in [0, lr]."""

    warmup: Annotated[
        float,
        Spec(
            "in [0, 1)",
            "share of the schedule",
            ("lr_warmup_fraction", "warmup_ratio", "warmup_steps", "lr_warmup_iters"),
        ),
    ] = 0.05
    """Share of the schedule with a linear warm-up, in [0, 1)."""

    weight_decay: Annotated[float, Spec(">= 0", also=("wd",))] = 0.1
    """Decoupled weight decay of matrices, >= 0; norms and biases have none."""

    adam_beta1: Annotated[float, Spec("in [0, 1)", also=("beta1",))] = 0.9
    """Decay of Adam's first moment, in [0, 1)."""

    adam_beta2: Annotated[float, Spec("in [0, 1)", also=("beta2",))] = 0.95
    """Decay of Adam's second moment, in [0, 1)."""

    adam_eps: Annotated[float, Spec("> 0", also=("eps", "adam_epsilon"))] = 1e-8
    """Adam's epsilon, > 0."""

    clip_grad: Annotated[
        float, Spec(">= 0", "norm of the gradients", ("gradient_clipping", "max_grad_norm", "grad_clip"))
    ] = 1.0
    """Norm that gradients are clipped to, >= 0; 0 does not clip."""

    precision: Annotated[Precision, Spec(also=("bf16", "dtype", "params_dtype", "fp16"))] = "fp32"
    """`fp32` or `bf16` (with fp32 master weights and gradients)."""

    max_skipped: Annotated[int, Spec(">= 0", "optimizer steps")] = 10
    """Optimizer steps skipped for gradients that are not finite before the run stops without saving, >= 0; each step
    taken since makes up for one skipped. 0 never stops."""

    seed: Annotated[int, Spec(">= 0")] = 1234
    """Seed of dropout and of the libraries' generators, >= 0. Data order has the seed of Evolved Sampling."""

    eval_interval: Annotated[int, Spec(">= 0", "iterations", ("eval_steps",))] = 100
    """Iterations between evaluations, >= 0; 0 evaluates at the end only."""

    eval_samples: Annotated[int, Spec(">= 0", "samples of a domain", ("eval_iters",))] = 64
    """Validation samples of each domain in one evaluation, >= 0; 0 never evaluates."""

    log_interval: Annotated[int, Spec(">= 1", "iterations", ("logging_steps", "steps_per_print"))] = 10
    """Iterations between log lines, >= 1."""

    def __post_init__(self) -> None:
        """Check every field and their combinations."""
        check_fields(self)
        if (self.passes is None) == (self.train_samples is None):
            given = "neither is" if self.passes is None else "both are"
            raise ConfigError(f"Exactly one of `passes` and `train_samples` must be given, but {given}. Give one.")
        require(self.min_lr <= self.lr, "min_lr", f"in [0, lr = {self.lr}]", self.min_lr)

    def draws(self, samples: int) -> int:
        """Samples that the plain run draws from a blend of so many."""
        return self.train_samples or max(1, round((self.passes or 1.0) * samples))


@dataclass(frozen=True)
class RunSettings:
    """What a run writes, and where."""

    directory: Annotated[Path, Spec(also=("output_dir", "save", "save_dir"))] = Path("runs/pretrain")
    """Folder of logs, checkpoints and summaries."""

    save_interval: Annotated[int | None, Spec(">= 0", "iterations", ("save_steps", "checkpoint_interval"))] = 0
    """Iterations between checkpoints, >= 0, with one more at the end; 0 saves at the end only. None: only where the run
    is stopped before it."""

    keep_checkpoints: Annotated[int, Spec(">= 1", "checkpoints", ("save_total_limit",))] = 2
    """Newest checkpoints kept, >= 1; older ones are removed once a newer one is complete."""

    resume: Annotated[bool, Spec(also=("resume_from_checkpoint", "load"))] = True
    """Go on from the newest complete checkpoint in `directory`, if there is one."""

    on_blend_change: BlendChange = "refuse"
    """What to do if the blend is not the one the checkpoint was made with: `refuse`, or `keep_scores`, which goes on
    with weights, optimizer and the scores of what did not change, and begins a new order of the new blend there."""

    background_save: bool = False
    """Write scores and checksums of a checkpoint while training goes on, from a copy of the scores in memory."""

    tensorboard: bool = False
    """Write TensorBoard scalars."""

    wandb: bool = False
    """Write the same scalars to Weights & Biases, through its own client. Project, name, entity and mode are that
    client's environment variables: `WANDB_PROJECT`, `WANDB_NAME`, `WANDB_ENTITY`, `WANDB_MODE`."""

    audit: bool = False
    """Write the chosen sample ids of every iteration, and their losses where they are known (`es-megatron spike`)."""

    progress: bool = True
    """Show a progress bar on rank 0."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """A whole run."""

    backend: BackendName = "megatron"
    """Who trains the same model on the same data: `megatron` (Megatron-Core's data-parallel wrapper, optimizer and
    schedules) or `deepspeed` (its engine, with `pipeline` above 1 its pipeline engine)."""

    model: ModelSettings = field(default_factory=ModelSettings)
    """The GPT."""

    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """Its layout over ranks."""

    data: DataSettings
    """Where samples come from."""

    training: TrainingSettings
    """Length, batch, optimizer and schedule."""

    run: RunSettings = field(default_factory=RunSettings)
    """What is written, and where."""

    deepspeed: DeepSpeedSettings = field(default_factory=DeepSpeedSettings)
    """What only DeepSpeed is told."""

    evolved_sampling: EvolvedSamplingConfig = field(default_factory=EvolvedSamplingConfig)
    """What gets a backward pass."""

    def __post_init__(self) -> None:
        """Check combinations of sections."""
        check_fields(self)
        model, parallel = self.model, self.parallel
        for name, size in (
            ("num_attention_heads", model.num_attention_heads),
            ("num_query_groups", model.query_groups),
            ("ffn_hidden_size", model.ffn_size),
        ):
            require(size % parallel.tensor == 0, name, f"a multiple of tensor-parallel size {parallel.tensor}", size)
        pieces = parallel.pipeline * parallel.chunks
        rule = f"a multiple of pipeline size x chunks per rank = {pieces}"
        require(model.num_layers % pieces == 0, "num_layers", rule, model.num_layers)
        pieces = 2 * parallel.context
        if parallel.context > 1:
            require(
                model.seq_length % pieces == 0, "seq_length", f"a multiple of 2 x context = {pieces}", model.seq_length
            )
        lag, prefetch = self.evolved_sampling.order.mask_lag, self.data.prefetch
        if lag is not None:
            require(prefetch <= lag, "prefetch", f"at most `order.mask_lag` = {lag}", prefetch)
        if self.backend == "deepspeed":
            training = self.training
            bf16, clips = training.precision == "bf16", training.clip_grad > 0
            check_deepspeed(self.deepspeed, parallel, bf16=bf16, clips=clips)


SETTINGS = "settings.yaml"
"""File of a run's folder with all of its settings."""


def write_settings(settings: PretrainSettings, path: Path) -> None:
    """Write all settings of a run, with absolute paths, so that `load_settings` reads them back."""
    replace_file(path, yaml.safe_dump(plain(settings), sort_keys=False).encode())


def plain(value: Any) -> Any:
    """Settings as mappings, with absolute paths."""
    if isinstance(value, EvolvedSamplingConfig):
        return value.to_mapping()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value.resolve()) if isinstance(value, Path) else value


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> PretrainSettings:
    """Read a run's settings.

    Args:
        path: a YAML file with the sections of `PretrainSettings`.
        overrides: settings of the command line, each `section.key=value` with a YAML value; they win.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (names it, the file and the nearest), a value out of range.
    """
    sections = read_sections(path)
    for override in overrides:
        apply_override(sections, override)
    return build(PretrainSettings, sections, f"{path} and the command line" if overrides else str(path))


def read_sections(path: str | Path) -> dict[str, Any]:
    """What a settings file has, those of Evolved Sampling in their groups; `ConfigError` if it cannot be read."""
    try:
        mapping: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Settings `{path}` cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Settings `{path}` must be YAML, but are not: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"Settings `{path}` must be a mapping of sections, but are {mapping!r} instead.")
    return grouped(cast(dict[str, Any], mapping), str(path))


def apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a nested mapping, in place; `ConfigError` if it cannot be."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"`{override}` must be of the form section.key=value. For example: training.lr=0.001")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of `{override}` must be YAML, but is not: {error}") from error
    parts = override_path(key, value, "command line")
    for depth, part in enumerate(parts[:-1], 1):
        if mapping.get(part) is None:
            mapping[part] = {}
        if not isinstance(mapping[part], dict):
            raise ConfigError(f"`{override}` sets something inside `{'.'.join(parts[:depth])}`, which is no section.")
        mapping = mapping[part]
    mapping[parts[-1]] = value


def check_layout(settings: PretrainSettings, world_size: int) -> None:
    """Refuse a world of `world_size` processes that cannot hold the layout, or a meta-batch it cannot split.

    Raises:
        LayoutError: names the sizes and a cure.
    """
    parallel, training = settings.parallel, settings.training
    ranks = parallel.ranks
    if world_size % ranks != 0:
        parts = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
        parts |= {"context": parallel.context} if parallel.context > 1 else {}
        raise LayoutError(
            f"The number of processes must be a multiple of {' x '.join(parts)} = "
            f"{' x '.join(map(str, parts.values()))}, but is {world_size} instead. "
            f"Start {-(-world_size // ranks) * ranks}, or split the model less."
        )
    dp_size = parallel.data_parallel(world_size)
    step = training.micro_batch_size * dp_size
    if training.global_batch_size % step != 0:
        raise LayoutError(
            f"`global_batch_size` must be a multiple of micro-batch size x data-parallel size = "
            f"{training.micro_batch_size} x {dp_size}, but is {training.global_batch_size} instead. "
            f"Use {max(step, round(training.global_batch_size / step) * step)}, or a smaller `micro_batch_size`."
        )
    count = training.global_batch_size // step
    if parallel.virtual_pipeline is not None and count % parallel.pipeline != 0:
        raise LayoutError(
            f"Micro-batches of a meta-batch on a rank must be a multiple of {parallel.pipeline} stages with "
            f"`virtual_pipeline`, but are {count} instead. Use another `micro_batch_size` or `global_batch_size`."
        )
