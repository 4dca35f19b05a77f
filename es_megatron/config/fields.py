"""What a setting's field says of itself beside its type: limits, unit, and names that other programs give it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from typing import Any, Literal, NamedTuple

from es_megatron.errors import ConfigError

_BOUND = re.compile(r"(?P<sign>>=|>) (?P<low>\S+)")
_INTERVAL = re.compile(r"in (?P<open>[\[(])(?P<low>[^,]+), (?P<high>[^\])]+)(?P<close>[\])])")


class Spec(NamedTuple):
    """Stands in `Annotated[float, Spec("in (0, 1]", "share of the meta-batch")]`."""

    limits: str = ""
    """`>= 1`, `> 0`, `in [0, 1)`, as errors and documents have them; nothing: any value of the type."""
    unit: str = ""
    """What a number counts."""
    also: tuple[str, ...] = ()
    """What Megatron, DeepSpeed and Hugging Face call it: named where one of them is given."""


class Limits(NamedTuple):
    """The numbers of `Spec.limits`."""

    low: float
    high: float
    low_open: bool
    high_open: bool

    def hold(self, value: float) -> bool:
        """Whether a value is within them; nan is not."""
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)


class Fact(NamedTuple):
    """A field and what its annotation says."""

    hint: Any
    """Its type, without `Spec`."""
    spec: Spec

    @property
    def kind(self) -> Any:
        """Its type, without None."""
        if typing.get_origin(self.hint) in (types.UnionType, typing.Union):
            return next(each for each in typing.get_args(self.hint) if each is not type(None))
        return self.hint

    @property
    def optional(self) -> bool:
        """Whether None is allowed."""
        return type(None) in typing.get_args(self.hint)


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise the usual `ConfigError` unless a setting keeps its rule."""
    if not holds:
        raise ConfigError(f"`{name}` must be {rule}, but is {value!r} instead.")


def require_choice(name: str, value: object, literal: Any) -> None:
    """Raise unless `value` is one of the strings of a `Literal`; names the nearest one."""
    choices = typing.get_args(literal)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r} instead.{hint}")


@functools.cache
def facts_of(cls: type) -> dict[str, Fact]:
    """Fields of a dataclass by name, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found: dict[str, Fact] = {}
    for field in dataclasses.fields(cls):
        hint, extras = hints[field.name], ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extras = typing.get_args(hint)
        found[field.name] = Fact(hint, next((each for each in extras if isinstance(each, Spec)), Spec()))
    return found


@functools.cache
def limits_of(text: str) -> Limits:
    """Read `Spec.limits`.

    Raises:
        ValueError: it is written in another way.
    """
    if interval := _INTERVAL.fullmatch(text):
        low, high = (_number(interval[name]) for name in ("low", "high"))
        return Limits(low, high, interval["open"] == "(", interval["close"] == ")")
    if bound := _BOUND.fullmatch(text):
        return Limits(_number(bound["low"]), math.inf, bound["sign"] == ">", high_open=False)
    raise ValueError(f"limits must be `>= 1`, `> 0` or `in [0, 1)`, but are {text!r}")


def check_fields(settings: object, prefix: str = "") -> None:
    """Hold every field of a dataclass against its limits and its choices; None is let pass.

    Raises:
        ConfigError: names the field, with `prefix` before it.
    """
    for name, fact in facts_of(type(settings)).items():
        value: Any = getattr(settings, name)
        if value is None:
            continue
        if typing.get_origin(fact.kind) is Literal:
            require_choice(prefix + name, value, fact.kind)
        elif fact.spec.limits:
            require(limits_of(fact.spec.limits).hold(value), prefix + name, fact.spec.limits, value)


def _number(text: str) -> float:
    base, power, exponent = text.partition("^")
    return int(base) ** int(exponent) if power else float(text) if "." in text else int(text)
