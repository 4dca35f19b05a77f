"""Policies and pruners by name: those of this package, and those that other packages bring by entry point.

A package adds one in its own metadata, and users name it as they name those that are here:

    [project.entry-points."es_megatron.policies"]
    newest-first = "their_package:NewestFirst"
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

from es_megatron.config import build
from es_megatron.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes by name; instances are made of options."""

    def __init__(self, base: type[T], kind: str, group: str) -> None:
        """Start empty.

        Args:
            base: what every class inherits from.
            kind: what the entries are, for messages: `policy` or `pruner`.
            group: of entry points.
        """
        self._base, self._kind, self._group = base, kind, group
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Give a frozen dataclass a name."""

        def add(cls: C) -> C:
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Every name there is, other packages' among them."""
        return sorted({*self._classes, *(point.name for point in entry_points(group=self._group))})

    def make(self, name: str, options: Mapping[str, Any] = MappingProxyType({})) -> T:
        """Make the instance of a name.

        Args:
            name: of a class of this package, or of an entry point.
            options: for the fields of its class, by name; `a+b` is a list.

        Raises:
            ConfigError: no such name, or option, or a value of another type; an entry point that is no such class.
        """
        cls = self._classes.get(name) or self._load(name)
        fields = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        values: dict[str, Any] = {}
        for key, value in options.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = f"Did you mean `{near[0]}`?" if near else f"It has {', '.join(fields) or 'none'}."
                raise ConfigError(f"There is no option `{key}` of {self._kind} `{name}`. {hint}")
            listed = isinstance(fields[key].default, tuple) and isinstance(value, str)
            values[key] = value.split("+") if listed else value
        return cast(T, build(cls, values, f"options of {self._kind} {name}") if fields else cls())

    def _load(self, name: str) -> type:
        for point in entry_points(group=self._group):
            if point.name == name:
                loaded: object = point.load()
                if isinstance(loaded, type) and issubclass(loaded, self._base) and not inspect.isabstract(loaded):
                    return loaded
                raise ConfigError(
                    f"Entry point `{name} = {point.value}` of `{self._group}` must be a class that inherits from "
                    f"`{self._base.__module__}.{self._base.__name__}` and has its abstract methods, but is {loaded!r} "
                    "instead. Correct the package that brings it."
                )
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"There are {', '.join(self.names())}."
        raise ConfigError(f"There is no {self._kind} `{name}`. {hint}")
