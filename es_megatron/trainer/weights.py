"""Weights of another run: a reference that scores, or what a model begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from es_megatron.checkpoint.rotation import newest_of
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.frameworks.blend_file import read_blend_file
from es_megatron.trainer.settings import SETTINGS, PretrainSettings, load_settings

SHAPES = ("num_layers", "hidden_size", "num_attention_heads", "query_groups", "ffn_size")
KINDS = ("normalization", "position_embedding", "swiglu", "bias", "tie_embeddings", "vocab_multiple")


@dataclass(frozen=True)
class Model:
    """The model of a run."""

    settings: PretrainSettings
    """Of the run that trained it."""
    checkpoint: Path
    """Folder of its weights."""


def find_model(path: Path, overrides: Sequence[str]) -> Model:
    """The model of a run's newest checkpoint, or of one of its checkpoints.

    Args:
        path: folder of a run of `es-megatron pretrain`, or of one of its checkpoints.
        overrides: `section.key=value`, such as `parallel.tensor=2` and the blend to score.

    Raises:
        CheckpointError: there is none.
    """
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    checkpoint = newest_of(run / "checkpoints") if run == path else path
    if checkpoint is None:
        raise CheckpointError(
            f"`{path}` must be the folder of a run of `es-megatron pretrain` or `es-megatron reference train`, or "
            "one of its checkpoints, but has no `checkpoints/latest` that names one. Check the path."
        )
    settings = load_settings(run / SETTINGS, overrides)
    if settings.backend != "megatron":
        raise ConfigError(
            f"`{path}` must be a run with `backend: megatron`, whose weights can be read, but has `backend: "
            f"{settings.backend}` instead. Train it with that backend."
        )
    return Model(settings, checkpoint / "model")


def find_weights(settings: PretrainSettings) -> Path | None:
    """The checkpoint whose weights a model begins with, checked against the model.

    Args:
        settings: of the run that begins.

    Returns:
        Folder for `load_weights`; None where the model begins with weights drawn at random.

    Raises:
        CheckpointError: there is none.
        ConfigError: it is of another model or tokenizer; names what differs.
    """
    path = settings.model.weights
    if path is None:
        return None
    found = find_model(path, ())
    saved, own = found.settings.model, settings.model
    differing = [
        f"`{name}` {getattr(saved, name)!r} (here {getattr(own, name)!r})"
        for name in (*SHAPES, *KINDS)
        if getattr(saved, name) != getattr(own, name)
    ]
    if differing:
        raise ConfigError(
            f"`model.weights` must be of the same model, but `{path}` has {', '.join(differing)}. "
            "Set them as they were."
        )
    tokenizers = {_tokenizer(found.settings.data.blend), _tokenizer(settings.data.blend)}
    if len(tokenizers) == 2 and None not in tokenizers:
        raise ConfigError(
            f"`model.weights` must be of a run with the tokenizer of `{settings.data.blend}`, but that of `{path}` is "
            "another one: its ids mean other tokens. Prepare the data with that run's tokenizer (`--tokenizer`)."
        )
    return found.checkpoint


def _tokenizer(blend: Path) -> bytes | None:
    """A blend's tokenizer, if it is there."""
    if not blend.is_file():
        return None
    name = read_blend_file(blend).tokenizer
    file = None if name is None else blend.parent / name
    return file.read_bytes() if file is not None and file.is_file() else None
