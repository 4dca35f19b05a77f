"""Settings from mappings (YAML, JSON, flags): every value is checked against its field's type, every key is known."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from es_megatron.config.hints import hint_for
from es_megatron.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], mapping: Mapping[str, Any], where: str, root: type | None = None) -> T:
    """Make a settings dataclass from a mapping, nested ones included.

    Args:
        cls: a dataclass.
        mapping: what was read from YAML or JSON.
        where: names the source in errors, such as `configs/small.yaml`.
        root: dataclass of all settings, if `cls` is one of its sections; hints are looked for there.

    Raises:
        ConfigError: unknown or missing key, or a value of another type; names key, source and the nearest key.
    """
    if not isinstance(mapping, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"`{where}` must be a mapping of settings, but is {mapping!r} instead.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls)) if field.init}
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"Unknown key `{key}` in `{where}`. {hint_for(str(key), cls, root or cls)}")
    values = {key: convert(hints[key], value, f"{where}: {key}", root or cls) for key, value in mapping.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in values:
            raise ConfigError(f"Key `{name}` is missing in `{where}`. Add it.")
    return cls(**values)


def convert(hint: Any, value: Any, where: str, root: type | None = None) -> Any:
    """Check a value read from YAML or JSON against a field's type; ints stand in for floats.

    Raises:
        ConfigError: the value is of another type.
    """
    if hasattr(hint, "from_mapping"):
        return hint.from_mapping(value, where)
    if dataclasses.is_dataclass(hint):
        return build(cast(type[Any], hint), value, where, root)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return convert(next(argument for argument in arguments if argument is not type(None)), value, where, root)
    if origin is Literal:
        return value  # the dataclass itself names the choices
    if origin in (tuple, list, Mapping):
        return _convert_container(origin, arguments, value, where)
    if hint is float and isinstance(value, str):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"`{where}` must be of type {hint.__name__}, but is {value!r} instead.")
    return value


def _convert_container(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{where}` must be a mapping, but is {value!r} instead.")
        return dict(cast(Mapping[str, Any], value))
    if not isinstance(value, list | tuple):
        raise ConfigError(f"`{where}` must be a list, but is {value!r} instead.")
    items = [convert(arguments[0], item, where) for item in cast(list[Any], value)]
    return tuple(items) if origin is tuple else items
