"""Command-line flags `--es-*`, made from the fields of `EvolvedSamplingConfig` so that no list is written twice."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from es_megatron.config import PRESETS, EvolvedSamplingConfig, build

PREFIX = "es_"
STRICT_VERSIONS = "--es-strict-versions"


class Switches(NamedTuple):
    """What the flags say."""

    config: EvolvedSamplingConfig | None
    """None: Evolved Sampling is off, and the run is to be left as it is."""
    audit: Path | None
    """File for the chosen ids of each iteration."""
    strict_versions: bool = False
    """Whether an upstream that was not tested is refused; it switches nothing on by itself."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags; those that are not given leave no attribute, so that a run without them is told nothing.

    Args:
        parser: gets a group of arguments.

    Returns:
        The parser, as Megatron's functions of this kind do.
    """
    group = parser.add_argument_group(
        "evolved sampling", f"Any of these flags but {STRICT_VERSIONS} switches it on; see docs/patching.md."
    )
    group.add_argument(
        "--es",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="Evolved Sampling with default settings; --no-es switches it off whatever other flags are given.",
    )
    group.add_argument(
        "--es-audit",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="Append the chosen ids of each iteration to this file, as lines of JSON.",
    )
    group.add_argument(
        STRICT_VERSIONS,
        action="store_true",
        default=argparse.SUPPRESS,
        help="Refuse a version of the upstream that has not been tested, though all that is patched is as declared.",
    )
    hints, told = typing.get_type_hints(EvolvedSamplingConfig), field_help(EvolvedSamplingConfig)
    for field in dataclasses.fields(EvolvedSamplingConfig):
        group.add_argument(
            f"--es-{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{told[field.name]} Default: {_default(field)}.".replace("%", "%%"),
            **_kind(hints[field.name]),
        )
    return parser


def read_switches(arguments: argparse.Namespace) -> Switches:
    """Read what was given.

    Raises:
        ConfigError: a value out of range.
    """
    given = {name: value for name, value in vars(arguments).items() if name.startswith(PREFIX) or name == "es"}
    strict = bool(given.pop("es_strict_versions", False))
    if not given or not given.pop("es", True):
        return Switches(None, None, strict)
    audit = given.pop("es_audit", None)
    fields = {name.removeprefix(PREFIX): value for name, value in given.items()}
    config = build(EvolvedSamplingConfig, fields, "flags --es-*")
    return Switches(config, None if audit is None else Path(audit), strict)


def field_help(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    told: dict[str, str] = {}
    for field, text in itertools.pairwise(body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                told[name] = " ".join(said.split())
            case _:
                pass
    return told


def _default(field: dataclasses.Field[Any]) -> str:
    """A field's default in words."""
    return "that of the preset" if field.name in PRESETS["default"] else str(field.default)


def _kind(hint: Any) -> dict[str, Any]:
    """What argparse has to know about a field's type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "*", "type": typing.get_args(hint)[0]}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint}
