"""Entries of a spec of a comparison: mappings, names and numbers, checked with words that name the place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from es_megatron.errors import ConfigError


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Take a mapping, None for an empty one; `ConfigError` if it is something else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"`{where}` must be a mapping, but is {value!r} instead.")
    return {str(key): entry for key, entry in cast(dict[Any, Any], value).items()}


def check_keys(content: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse an unknown key, naming the nearest one."""
    for key in content:
        if key not in known:
            raise ConfigError(f"Unknown key `{key}` in `{where}`. {nearest(key, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(known)}."


def integers(value: Any, where: str) -> tuple[int, ...]:
    """Whole numbers of a list, each once; `ConfigError` if it is something else."""
    return tuple(int(number) for number in numbers(value, where, "whole numbers", whole=True))


def numbers(value: Any, where: str, what: str = "numbers", *, whole: bool = False) -> tuple[float, ...]:
    """Numbers of a list, each once; YAML reads 1e-3 as a string; `ConfigError` if it is something else."""
    if not isinstance(value, list):
        raise ConfigError(f"`{where}` must be a list of {what}, but is {value!r} instead.")
    found: list[float] = []
    for item in cast(list[Any], value):
        try:
            number = math.nan if isinstance(item, bool) else float(item)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ConfigError(f"`{where}` must be a list of {what}, but has {item!r}.")
        found.append(number)
    return tuple(dict.fromkeys(found))
