"""What is to be planned: read from a run's settings, from flags alone, or from both; the flags win.

Flags stand for settings of the trainer, so that what it would refuse is refused here in the same words.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from es_megatron.config import PRESET_NAMES, EvolvedSamplingConfig, build, require
from es_megatron.core.run_sizes import Sizes
from es_megatron.data.manifest import Component, Manifest
from es_megatron.data.schedule import Origin
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.arguments import PREFIX, read_switches
from es_megatron.trainer.settings import PretrainSettings, apply_override, check_layout, load_settings

SETTINGS = {
    "seq_length": "model.seq_length",
    "recompute": "model.recompute",
    "tensor": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "virtual": "parallel.virtual_pipeline",
    "global_batch_size": "training.global_batch_size",
    "micro_batch_size": "training.micro_batch_size",
    "lr": "training.lr",
    "passes": "training.passes",
    "train_samples": "training.train_samples",
}
"""Setting of the trainer that each flag stands for."""
LENGTHS = {"passes": "train_samples", "train_samples": "passes"}
"""Giving the one takes the other away."""
UNKNOWN_BLEND = "no blend"


@dataclass(frozen=True)
class Speed:
    """What is known of how fast the passes are."""

    backward_over_forward: float | None
    """Measured."""
    forward: float | None
    """Measured seconds of the forward of a training micro-batch on one stage."""
    scoring_forward: float | None
    """The same of a scoring micro-batch."""
    parameters: float | None
    flops: float | None
    """Floating-point operations a second that one GPU reaches in a pass."""

    def __post_init__(self) -> None:
        """Check what is given."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value is None or value > 0, field.name, "> 0", value)
        for name, other in (("parameters", "flops"), ("flops", "parameters"), ("scoring_forward", "forward")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ConfigError(f"`{name}` must be given with `{other}`, which is missing. Give both.")


@dataclass(frozen=True)
class Request:
    """A run to be planned."""

    settings: PretrainSettings
    manifest: Manifest
    world_size: int
    speed: Speed
    gpus_per_node: int
    origin: Origin
    lr: float | None
    """Highest learning rate of the plain run; None: not told."""
    notes: tuple[str, ...]
    """What is assumed."""

    @property
    def config(self) -> EvolvedSamplingConfig:
        """Settings of Evolved Sampling."""
        return self.settings.evolved_sampling

    @property
    def recomputes(self) -> bool:
        """Whether all layers run forward again in the backward pass."""
        return self.settings.model.recompute == "full"

    @property
    def sizes(self) -> Sizes:
        """Batch and parallel sizes, which divide."""
        training, parallel = self.settings.training, self.settings.parallel
        return Sizes(
            training.global_batch_size,
            training.micro_batch_size,
            parallel.data_parallel(self.world_size),
            parallel.pipeline,
            parallel.chunks,
            2.0 + self.recomputes,
        )


def read_request(arguments: argparse.Namespace) -> Request:
    """Read what is to be planned.

    Raises:
        ConfigError, LayoutError: settings that the trainer would refuse, or too few to plan with.
        DataError: the blend is not there, and no samples are told.
    """
    settings = read_settings(arguments)
    parallel, notes = settings.parallel, list[str]()
    world_size = arguments.world_size
    if world_size is None:
        world_size = parallel.ranks * (arguments.data_parallel or 1)
    elif arguments.data_parallel is not None and parallel.data_parallel(world_size) != arguments.data_parallel:
        raise ConfigError(
            f"`--world-size` must be tensor x pipeline x data-parallel = {parallel.tensor} x {parallel.pipeline} x "
            f"{arguments.data_parallel}, but is {world_size} instead. Give one of `--world-size` and `--data-parallel`."
        )
    require(world_size >= 1, "--world-size", ">= 1", world_size)
    check_layout(settings, world_size)
    if arguments.world_size is None and arguments.data_parallel is None:
        notes.append("one data-parallel rank is assumed: give `--world-size` or `--data-parallel`")
    manifest = read_manifest(arguments, settings)
    require(arguments.gpus_per_node >= 1, "--gpus-per-node", ">= 1", arguments.gpus_per_node)
    origin = Origin()
    if settings.evolved_sampling.scores.initial is not None:
        origin = origin_of(Path(settings.evolved_sampling.scores.initial), manifest)
    speed = Speed(
        arguments.backward_over_forward,
        arguments.forward_seconds,
        arguments.scoring_forward_seconds,
        arguments.parameters,
        arguments.flops_per_gpu,
    )
    lr = settings.training.lr if arguments.config is not None else arguments.lr
    return Request(settings, manifest, world_size, speed, arguments.gpus_per_node, origin, lr, tuple(notes))


def read_settings(arguments: argparse.Namespace) -> PretrainSettings:
    """Settings of the trainer, from its file and the flags, or from the flags and a model that fits any layout."""
    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    overrides = [f"{SETTINGS[name]}={value}" for name, value in given.items()]
    overrides += [f"{SETTINGS[LENGTHS[name]]}=null" for name in given if name in LENGTHS and LENGTHS[name] not in given]
    if arguments.config is not None:
        settings = load_settings(arguments.config, [*arguments.overrides, *overrides])
    else:
        if arguments.overrides:
            told = " ".join(arguments.overrides)
            raise ConfigError(f"`{told}` must come with `--config FILE`, whose settings it changes. Give it, or flags.")
        settings = settings_of_flags(given, overrides)
    switches = read_switches(arguments)
    if switches.config is None and hasattr(arguments, "es"):
        raise ConfigError("`--no-es` leaves nothing to plan. Leave it out, or give `--es-arm plain`.")
    if switches.config is None:
        return settings
    names = {*switches.given, *(PRESET_NAMES if hasattr(arguments, f"{PREFIX}preset") else ())} - {"preset"}
    config = settings.evolved_sampling.replaced({name: switches.config.value(name) for name in sorted(names)})
    return dataclasses.replace(settings, evolved_sampling=config)


def settings_of_flags(given: dict[str, Any], overrides: list[str]) -> PretrainSettings:
    """Settings that the flags tell, with a model whose sizes are multiples of what the layout asks for."""
    missing = [name for name in ("global_batch_size", "micro_batch_size", "seq_length") if name not in given]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(f"{flags} must be given where there is no `--config FILE`. Give them, or the file.")
    tensor = max(1, given.get("tensor", 1))
    pieces = max(1, given.get("pipeline", 1)) * max(1, given.get("virtual", 1))
    mapping: dict[str, Any] = {
        "model": {
            "num_layers": pieces,
            "num_attention_heads": tensor,
            "hidden_size": 2 * tensor,
            "ffn_hidden_size": tensor,
        },
        "data": {"blend": UNKNOWN_BLEND, "prefetch": 1},
        "training": {} if LENGTHS.keys() & given.keys() else {"passes": 1.0},
    }
    if given.get("lr") is not None:
        mapping["training"]["min_lr"] = 0.0
    for override in overrides:
        apply_override(mapping, override)
    return build(PretrainSettings, mapping, "the flags")


def read_manifest(arguments: argparse.Namespace, settings: PretrainSettings) -> Manifest:
    """The blend: as told, or as the settings' files have it."""
    length = settings.model.seq_length
    if arguments.samples is not None and arguments.component:
        raise ConfigError("`--samples` must not be given with `--component`, which tells them. Give one of them.")
    if arguments.samples is not None:
        return Manifest((Component("data", "", arguments.samples, 1.0, ""),), length)
    if arguments.component:
        return Manifest(tuple(component_of(told) for told in arguments.component), length)
    if arguments.config is None:
        raise ConfigError(
            "The samples of the blend must be told where there is no `--config FILE`. Give `--samples N`, or "
            "`--component NAME:SAMPLES[:WEIGHT]` for each."
        )
    from es_megatron.frameworks.megatron_data import load_blend

    try:
        return load_blend(settings.data.blend, length).manifest
    except DataError as error:
        raise DataError(
            f"{error} Or tell its sizes with `--samples N` or `--component NAME:SAMPLES:WEIGHT`."
        ) from error


def component_of(told: str) -> Component:
    """A component as told: `name:samples`, drawn by its size, or `name:samples:weight`."""
    name, _, rest = told.partition(":")
    samples, _, weight = rest.partition(":")
    try:
        return Component(name, "", int(float(samples)), float(weight or samples), "")
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"`--component` must be NAME:SAMPLES or NAME:SAMPLES:WEIGHT, but is {told!r}. For example: code:400000:0.3"
        ) from error


def origin_of(scores: Path, manifest: Manifest) -> Origin:
    """Beginning of a run with these scores: its scored components are pruned from epoch 0 on."""
    from es_megatron.checkpoint.transfer import SCORED_SHARE, plan_transfer
    from es_megatron.score_files.files import ScoreFiles, describe

    files = ScoreFiles(scores)
    plan_transfer(files.manifest, manifest)  # refuses what the run would refuse
    sizes = {component.name: component.samples for component in manifest.components}
    found = [describe(files, n) for n, c in enumerate(files.manifest.components) if c.name in sizes]
    return Origin(scored=tuple(each.component for each in found if each.seen >= SCORED_SHARE * sizes[each.component]))
