"""Every setting of a run with the source of its value, as YAML that `load_settings` reads back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from es_megatron.config import PRESET_NAMES
from es_megatron.config.names import SECTION, given_names, path_of
from es_megatron.trainer.settings import PretrainSettings, load_settings, read_sections

FOLLOWS = "follows from others"


def effective(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """All settings of a run, defaults that hang on others filled in.

    Args:
        path: settings file.
        overrides: of the command line.

    Returns:
        YAML; behind each value stands the file, `command line`, `preset paper`, `default`, or that it follows from
        others.

    Raises:
        ConfigError: what `load_settings` raises.
    """
    settings = load_settings(path, overrides)
    filled = filled_in(settings)
    sections = read_sections(path)
    given = {name: str(path) for name in names_of(sections)}
    given |= dict.fromkeys(map(name_of, overrides), "command line")
    preset_at = f"{SECTION}.preset"
    preset = next((_value(each) for each in reversed(overrides) if name_of(each) == preset_at), None)
    preset = preset or (sections.get(SECTION) or {}).get("preset", "default")

    def source(name: str, value: Any, raw: Any) -> str:
        for known in (name, name.rpartition(".")[0]):  # a whole section may be given at once
            if known in given:
                return given[known]
        if name.removeprefix(f"{SECTION}.") in PRESET_NAMES and preset != "default":
            return f"preset {preset}"
        return "default" if value == raw else FOLLOWS

    return "\n".join(_lines(filled, settings, "", source)) + "\n"


def filled_in(settings: PretrainSettings) -> PretrainSettings:
    """The same with what is derived from other settings written out."""
    model = dataclasses.replace(
        settings.model, num_query_groups=settings.model.query_groups, ffn_hidden_size=settings.model.ffn_size
    )
    return dataclasses.replace(settings, model=model, evolved_sampling=settings.evolved_sampling.filled_in())


def names_of(sections: Mapping[str, Any]) -> Iterator[str]:
    """Names of the settings that a file has, such as `training.lr`."""
    for section, value in sections.items():
        if section == SECTION and value is not None:
            yield from (f"{SECTION}.{name}" for name in given_names(value))
        elif isinstance(value, Mapping):
            yield from (f"{section}.{name}" for name in cast(Mapping[str, Any], value))
        else:
            yield section


def name_of(override: str) -> str:
    """Name of the setting that an override of the command line sets, as of today."""
    section, dot, name = override.partition("=")[0].partition(".")
    if section != SECTION or not dot:
        return section + dot + name
    return ".".join((SECTION, *path_of(name, _value(override))))


def _value(override: str) -> Any:
    return yaml.safe_load(override.partition("=")[2])


def _lines(value: Any, raw: Any, prefix: str, source: Any) -> Iterator[str]:
    """YAML of a dataclass; `raw` is the same without what is filled in."""
    indent = "  " * prefix.count(".")
    for field in dataclasses.fields(value):
        each, before, name = getattr(value, field.name), getattr(raw, field.name), prefix + field.name
        if dataclasses.is_dataclass(each):
            yield f"{indent}{field.name}:"
            yield from _lines(each, before, f"{name}.", source)
        else:
            told = str(each) if isinstance(each, Path) else each
            text = json.dumps(dict(told) if isinstance(told, Mapping) else told)
            yield f"{indent}{field.name}: {text}  # {source(name, each, before)}"
