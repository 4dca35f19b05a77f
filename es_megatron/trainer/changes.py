"""Settings that differ from those of the checkpoint a run goes on from: they take effect, or are refused.

And the rows that a run leaves out from then on, where its folder names some.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from es_megatron.core.skipped import SKIPPED
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid
from es_megatron.trainer.settings import PretrainSettings, plain

SECTIONS = ("model", "training")
"""What is compared; Evolved Sampling compares its own, and the rest says where things are and who does them."""

TAKE_EFFECT = frozenset(
    {
        *("model.dropout", "model.recompute"),
        *(f"training.{name}" for name in ("lr", "min_lr", "warmup", "weight_decay", "clip_grad")),
        *(f"training.{name}" for name in ("adam_beta1", "adam_beta2", "adam_eps", "micro_batch_size", "max_skipped")),
        *(f"training.{name}" for name in ("eval_interval", "eval_samples", "log_interval")),
    }
)
"""Settings that a run may change as it goes on."""

OF_THE_LENGTH = frozenset({"training.passes", "training.train_samples", "training.global_batch_size"})
"""Held with the order of the data, which may be a new one where the blend has changed."""

OF_THE_BEGINNING = frozenset({"model.weights"})
"""Settings that mean nothing any more once a run has a checkpoint."""


def comparable(settings: PretrainSettings) -> dict[str, Any]:
    """What a checkpoint keeps of a run's settings, JSON-able."""
    return json.loads(json.dumps({name: plain(getattr(settings, name)) for name in SECTIONS}))


def changes(saved: Mapping[str, Any], settings: PretrainSettings) -> list[str]:
    """What differs from a checkpoint and takes effect from it on.

    Args:
        saved: of `comparable`; empty in a checkpoint of an older version. What it does not know is not compared.
        settings: of this run.

    Returns:
        Such as ``training.lr: 0.003 -> 0.001``.

    Raises:
        CheckpointError: a setting that cannot change once a run has begun; names each, and the cure.
    """
    differing = {
        f"{section}.{name}": (saved[section][name], value)
        for section, values in comparable(settings).items()
        for name, value in values.items()
        if name in saved.get(section, {})
        and saved[section][name] != value
        and f"{section}.{name}" not in OF_THE_BEGINNING
    }
    refused = {name: pair for name, pair in differing.items() if name not in TAKE_EFFECT | OF_THE_LENGTH}
    if refused:
        told = ", ".join(f"`{name}` was {old!r} and is {new!r}" for name, (old, new) in refused.items())
        raise CheckpointError(
            f"What is read at the beginning of a run has changed since: {told}. Restore these settings, or start a new "
            "run directory."
        )
    return [f"{name}: {old} -> {new}" for name, (old, new) in differing.items()]


def with_skipped(settings: PretrainSettings, world: RankGrid) -> PretrainSettings:
    """Settings with the rows to skip that the folder of the run names, unless they name others; collective."""
    config, own = settings.evolved_sampling, settings.run.directory / SKIPPED
    if config.order.skip is not None or not world.broadcast_object(own.is_file()):
        return settings
    return dataclasses.replace(settings, evolved_sampling=config.replaced({"order.skip": str(own)}))
