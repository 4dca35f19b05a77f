"""Names of settings: by group, as flags, and the flat ones that they had before."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import yaml

from es_megatron.config.hints import misspelt
from es_megatron.errors import ConfigError

LOGGER = logging.getLogger(__name__)

SECTION = "evolved_sampling"
"""The section of a run's settings, and the block of an engine's JSON, that is ours."""

GROUPS = ("selection", "scorer", "scores", "reference", "pruning", "order", "guard")
HEADS: Mapping[str, str] = {"scorer": "kind", "guard": "fallback", "reference": "folder"}
"""The field that a group's bare name means: `scorer: history` is `scorer: {kind: history}`."""

FLAT_NAMES: Mapping[str, tuple[str, str]] = {
    "policy": ("selection", "policy"),
    "policy_options": ("selection", "options"),
    "keep_ratio": ("selection", "keep_ratio"),
    "anneal": ("selection", "anneal"),
    "selection_parts": ("selection", "parts"),
    "granularity": ("selection", "granularity"),
    "weight_floor": ("selection", "weight_floor"),
    "inclusion_weights": ("selection", "inclusion_weights"),
    "max_bad_losses": ("selection", "max_bad_losses"),
    "budget": ("selection", "budget"),
    "score_every": ("scorer", "every"),
    "prefix_share": ("scorer", "prefix_share"),
    "scoring_micro_batch_size": ("scorer", "micro_batch_size"),
    "scoring_cost": ("scorer", "cost"),
    "beta1": ("scores", "beta1"),
    "beta2": ("scores", "beta2"),
    "score_correction": ("scores", "correction"),
    "initial_scores": ("scores", "initial"),
    "score_folder": ("scores", "folder"),
    "pruning_ratio": ("pruning", "ratio"),
    "pruner": ("pruning", "pruner"),
    "pruner_options": ("pruning", "options"),
    "mask_lag": ("order", "mask_lag"),
    "mask_folder": ("order", "mask_folder"),
    "guard_window": ("guard", "window"),
}
"""Names of before, when settings stood in no groups; they are still read."""

GONE: Mapping[str, str] = {"match_cost": "Give `selection.budget`, the share of the plain run's cost, such as 0.625"}
"""Names of before that nothing is called by now, and what to do."""


class Setting(NamedTuple):
    """One setting and its names."""

    path: tuple[str, ...]
    """Its group, if it is in one, and its field."""
    field: dataclasses.Field[Any]
    owner: type
    """The dataclass that has the field."""

    @property
    def name(self) -> str:
        """As in a mapping: `selection.keep_ratio`."""
        return ".".join(self.path)


def flag_of(name: str) -> str:
    """A setting's flag: `--es-selection-keep-ratio` of `selection.keep_ratio`; a group's head has the group's name."""
    group, _, last = name.partition(".")
    return "--es-" + (group if HEADS.get(group) == last else name).replace(".", "-").replace("_", "-")


def settings_in(cls: type) -> Iterator[Setting]:
    """Every setting of the configuration's class, groups unfolded."""
    for field in dataclasses.fields(cls):
        if field.name not in GROUPS:
            yield Setting((field.name,), field, cls)
            continue
        group = cast(type, field.default_factory)
        yield from (Setting((field.name, each.name), each, group) for each in dataclasses.fields(group))


def nested(mapping: Mapping[str, Any], where: str, spell: Callable[[str], str] = str) -> dict[str, Any]:
    """A mapping with every setting in its group.

    Args:
        mapping: by group, by the flat names of before, or both.
        where: names the source in errors.
        spell: how the source spells a name, for what is told of old ones.

    Raises:
        ConfigError: no mapping, a name that is gone, or a setting that is given twice.
    """
    if not isinstance(mapping, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"`{where}` must be a mapping of settings, but is {mapping!r} instead.")
    found: dict[str, Any] = {}
    old: list[str] = []
    for key, value in mapping.items():
        if key in GONE:
            raise ConfigError(f"`{spell(key)}` in `{where}` is gone. {GONE[key]}.")
        path = path_of(key, value)
        if key in FLAT_NAMES:
            old.append(key)
        if key in GROUPS and isinstance(value, Mapping):
            inside = cast(Mapping[str, Any], value)
        elif len(path) > 1:
            inside = {path[1]: value}
        elif key in GROUPS:
            raise ConfigError(f"`{where}: {key}` must be a mapping of settings, but is {value!r} instead.")
        else:
            found[key] = value
            continue
        group: dict[str, Any] = found.setdefault(path[0], {})
        for name, each in inside.items():
            if name in group:
                raise ConfigError(f"`{path[0]}.{name}` stands twice in `{where}`. Leave one of the two out.")
            group[name] = options_of(each) if name == "options" else each
    tell_renamed(old, where, spell)
    return found


def path_of(key: str, value: object = None) -> tuple[str, ...]:
    """Group and field of a setting by any name it has or had; another key alone."""
    if key in HEADS and not isinstance(value, Mapping):
        return (key, HEADS[key])
    return FLAT_NAMES.get(key) or tuple(str(key).split("."))


def tell_renamed(old: Sequence[str], where: str, spell: Callable[[str], str] = str) -> None:
    """One line with the names of today."""
    if old and os.environ.get("RANK", "0") == "0":
        told = ", ".join(f"`{spell(key)}` is now `{spell('.'.join(FLAT_NAMES[key]))}`" for key in old)
        LOGGER.warning("%s: %s (old names are still read)", where, told)


def grouped(sections: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Sections of a run's settings with those of Evolved Sampling in their groups."""
    made = dict(sections)
    if made.get(SECTION) is not None:
        made[SECTION] = nested(made[SECTION], f"{where}: {SECTION}")
    return made


def override_path(key: str, value: object, where: str) -> list[str]:
    """Where `section.key` stands in grouped sections, such as `evolved_sampling.selection.budget`."""
    section, dot, name = key.partition(".")
    if section != SECTION or not dot:
        return key.split(".")
    tell_renamed([name] if name in FLAT_NAMES else [], where)
    return [section, *path_of(name, value)]


def block_in(content: Mapping[str, Any], where: str) -> Any:
    """The block of our settings in a program's configuration, None if it has none.

    Raises:
        ConfigError: a key looks like ours; the program would pass over it in silence.
    """
    near = misspelt(content, SECTION)
    if near is not None:
        raise ConfigError(f"Unknown key `{near}` in `{where}`. Did you mean `{SECTION}`?")
    return content.get(SECTION)


def options_of(given: Any) -> Any:
    """Options as a mapping; `name=value` words, as command lines have them, are read as YAML."""
    if not isinstance(given, list | tuple):
        return given
    found: dict[str, Any] = {}
    for word in cast("Iterable[Any]", given):
        name, equals, text = str(word).partition("=")
        if not equals:
            raise ConfigError(f"Option `{word}` must be `option=value`.")
        found[name] = yaml.safe_load(text)
    return found


def given_names(mapping: Mapping[str, Any]) -> frozenset[str]:
    """Names of the settings that a mapping has: `selection.keep_ratio`."""
    found = nested(mapping, "settings")
    inside = {f"{group}.{name}" for group in GROUPS for name in found.get(group, {})}
    return frozenset(inside | {name for name in found if name not in GROUPS})
