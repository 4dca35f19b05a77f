"""Every setting of a run, with what its field says: what page and schema are written from."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from es_megatron.config import PRESET_NAMES, EvolvedSamplingConfig
from es_megatron.config.fields import Fact, facts_of
from es_megatron.config.names import FLAT_NAMES, GROUPS, SECTION, flag_of
from es_megatron.frameworks.arguments import field_help
from es_megatron.trainer.settings import PretrainSettings

WORDS: Mapping[Any, str] = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}


class Entry(NamedTuple):
    """One setting."""

    name: str
    """In a run's settings: `training.lr`, `evolved_sampling.selection.keep_ratio`."""
    fact: Fact
    help: str
    default: Any
    """`dataclasses.MISSING` where it must be given."""
    paper: Any
    """Default under preset `paper`, where that is another one; else `dataclasses.MISSING`."""

    @property
    def own(self) -> str | None:
        """Its name in our block, None if it stands in another section."""
        return self.name.removeprefix(f"{SECTION}.") if self.name.startswith(f"{SECTION}.") else None

    @property
    def flag(self) -> str | None:
        """Of Megatron-LM's command line."""
        return None if self.own is None else flag_of(self.own)

    @property
    def before(self) -> list[str]:
        """Names that it had when settings stood in no groups."""
        return [] if self.own is None else [old for old, path in FLAT_NAMES.items() if ".".join(path) == self.own]

    @property
    def type_words(self) -> str:
        """Its type in words."""
        if typing.get_origin(self.fact.kind) is Literal:
            words = ", ".join(f"`{each}`" for each in typing.get_args(self.fact.kind))
        else:
            words = WORDS.get(self.fact.kind, "mapping of options")
        return f"{words}, or null" if self.fact.optional else words


class Section(NamedTuple):
    """Settings that stand together."""

    name: str
    """Empty for those in no section."""
    help: str
    entries: tuple[Entry, ...]


def sections() -> Iterator[Section]:
    """All settings of `es-megatron pretrain`, section by section."""
    loose = [name for name, fact in facts_of(PretrainSettings).items() if not dataclasses.is_dataclass(fact.hint)]
    yield Section("", "", tuple(_entries(PretrainSettings, "", loose)))
    for name, fact in facts_of(PretrainSettings).items():
        if not dataclasses.is_dataclass(fact.hint):
            continue
        cls = cast(type, fact.hint)
        inside = [each for each in facts_of(cls) if cls is not EvolvedSamplingConfig or each not in GROUPS]
        yield Section(name, _summary(cls), tuple(_entries(cls, f"{name}.", inside)))
    for group in GROUPS:
        cls = facts_of(EvolvedSamplingConfig)[group].kind
        yield Section(f"{SECTION}.{group}", _summary(cls), tuple(_entries(cls, f"{SECTION}.{group}.", facts_of(cls))))


def entries() -> dict[str, Entry]:
    """All settings by name."""
    return {entry.name: entry for section in sections() for entry in section.entries}


def _entries(cls: type, prefix: str, names: Any) -> Iterator[Entry]:
    helps = field_help(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in names:
        full = prefix + name
        own = full.removeprefix(f"{SECTION}.")
        default, paper = _default(fields[name]), dataclasses.MISSING
        if own in PRESET_NAMES and full != own:
            default, paper = (EvolvedSamplingConfig.from_mapping({"preset": each}).value(own) for each in _PRESETS)
            paper = dataclasses.MISSING if paper == default else paper
        yield Entry(full, facts_of(cls)[name], helps[name], default, paper)


_PRESETS = ("default", "paper")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _summary(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())
