"""The blend file: which components a run reads, relative to the file's own folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from es_megatron.config import build, require
from es_megatron.errors import ConfigError, DataError


@dataclass(frozen=True)
class BlendEntry:
    """One component of a blend file."""

    name: str
    """Unique name of the component."""

    train: str
    """Prefix of the training `.bin` and `.idx`, relative to the blend file."""

    validation: str | None = None
    """Prefix of the validation files; null: the component is not evaluated."""

    weight: float | None = None
    """Share of the draws relative to the other components, above 0; null: by size."""

    def __post_init__(self) -> None:
        """Check the weight."""
        require(
            self.weight is None or 0 < self.weight < float("inf"), "weight", "above 0 and finite, or null", self.weight
        )


@dataclass(frozen=True)
class BlendFile:
    """The content of a blend file."""

    components: list[BlendEntry]
    """At least one component."""

    tokenizer: str | None = None
    """A sentencepiece model, relative to the blend file; may be left out if `vocab_size` is given."""

    vocab_size: int | None = None
    """Number of token ids, at least 2; null: asked of the tokenizer."""

    def __post_init__(self) -> None:
        """Check the components together."""
        require(len(self.components) > 0, "components", "a list with at least one entry", self.components)
        require(self.vocab_size is None or self.vocab_size >= 2, "vocab_size", "at least 2", self.vocab_size)
        if self.tokenizer is None and self.vocab_size is None:
            raise ConfigError("`tokenizer` or `vocab_size` must be given, but both are missing: add one of them.")
        names = [entry.name for entry in self.components]
        if len(set(names)) < len(names):
            raise ConfigError(f"Names of `components` must differ, but are {names} instead: rename one.")
        weighted = [entry.name for entry in self.components if entry.weight is not None]
        if weighted and len(weighted) < len(names):
            raise ConfigError(
                f"`weight` must be given for every component or for none (null: by size), but is given for {weighted} "
                f"only: weigh the others too, or set these to null."
            )


def read_blend_file(path: Path) -> BlendFile:
    """Read and check a blend file.

    Raises:
        ConfigError: It is not YAML, or a key is unknown, missing, mistyped or out of range.
        DataError: It does not exist.
    """
    if not path.is_file():
        raise DataError(f"Blend file `{path}` does not exist: write it with `es-megatron prepare --output DIR`.")
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Blend file `{path}` must be YAML, but is not: {error}. Correct it, or prepare again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"Blend file `{path}` must be a mapping with `components`, but is {content!r:.100} instead.")
    try:
        return build(BlendFile, content, str(path))
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from error


def vocabulary(path: Path, blend: BlendFile) -> tuple[Path | None, int]:
    """Find the tokenizer's path, None if there is none, and the number of token ids.

    Raises:
        DataError: The tokenizer is missing or is not a sentencepiece model.
    """
    tokenizer = None if blend.tokenizer is None else path.parent / blend.tokenizer
    if tokenizer is not None and not tokenizer.is_file():
        raise DataError(f"Tokenizer `{tokenizer}` of `{path}` does not exist: put it there, or correct `tokenizer`.")
    if blend.vocab_size is not None or tokenizer is None:
        return tokenizer, blend.vocab_size or 0
    from sentencepiece import SentencePieceProcessor  # only needed where the blend file leaves the size out

    try:
        return tokenizer, int(SentencePieceProcessor(model_file=str(tokenizer)).vocab_size())
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"Tokenizer `{tokenizer}` must be a sentencepiece model, but is not: {error}. "
            f"Correct `tokenizer` of `{path}`."
        ) from error
