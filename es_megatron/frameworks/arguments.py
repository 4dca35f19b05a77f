"""Command-line flags `--es-*`, made from the settings of `EvolvedSamplingConfig` so that no list is written twice."""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from es_megatron.config import PRESET_NAMES, EvolvedSamplingConfig
from es_megatron.config.names import FLAT_NAMES, Setting, flag_of, given_names, settings_in
from es_megatron.config.settings import Preset
from es_megatron.errors import ConfigError

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
    given: frozenset[str] = frozenset()
    """Names of the settings that were given, such as `selection.keep_ratio`."""
    score_reference: Path | None = None
    """Folder for the losses of a reference, which the run is to score instead of training."""


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
        "--es-score-reference",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="Do not train: give every row of the training data the loss that the model of --load has of it, write "
        "them into this folder for --es-reference, and end. Goes on where it was stopped.",
    )
    group.add_argument(
        STRICT_VERSIONS,
        action="store_true",
        default=argparse.SUPPRESS,
        help="Refuse a version of the upstream that has not been tested, though all that is patched is as declared.",
    )
    group.add_argument(
        "--es-preset",
        choices=typing.get_args(Preset),
        default=argparse.SUPPRESS,
        help="Where what is not given comes from: what paid for language models, or the paper. Default: default.",
    )
    for setting in settings_in(EvolvedSamplingConfig):
        hint = typing.get_type_hints(setting.owner)[setting.field.name]
        told = field_help(setting.owner)[setting.field.name]
        usual = _default(setting)
        group.add_argument(
            flag_of(setting.name),
            default=argparse.SUPPRESS,
            help=f"{told} Default: {usual}.".replace("%", "%%"),
            **_kind(hint),
        )
        for flat in _old_names(setting):
            group.add_argument(flat, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **_kind(hint))
    return parser


def check_flags(words: Sequence[str]) -> None:
    """Refuse a flag that looks like one of ours and is none, with the nearest; others are the script's business.

    Raises:
        ConfigError: names both.
    """
    known = list(add_arguments(argparse.ArgumentParser(add_help=False))._option_string_actions)  # pyright: ignore[reportPrivateUsage]
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if not flag.startswith(("--es-", "--no-es-")) or any(each.startswith(flag) for each in known):
            continue  # argparse takes the beginning of a flag for it
        if near := difflib.get_close_matches(flag, known, n=1):
            raise ConfigError(f"Unknown flag `{word.partition('=')[0]}`. Did you mean `{near[0]}`?")


def read_switches(arguments: argparse.Namespace) -> Switches:
    """Read what was given.

    Raises:
        ConfigError: a value out of range.
    """
    given = {name: value for name, value in vars(arguments).items() if name.startswith(PREFIX) or name == "es"}
    strict = bool(given.pop("es_strict_versions", False))
    if not given or not given.pop("es", True):
        return Switches(None, None, strict)
    audit, scores = given.pop("es_audit", None), given.pop("es_score_reference", None)
    mapping = _mapping_of(given)
    config = EvolvedSamplingConfig.from_mapping(mapping, "flags --es-*", flag_of)
    files = (None if path is None else Path(path) for path in (audit, scores))
    return Switches(config, next(files), strict, given_names(mapping), next(files))


def _mapping_of(given: dict[str, Any]) -> dict[str, Any]:
    """Settings by group, as far as flags have names of today; the others by the flat names they have."""
    paths = {flag_of(each.name)[2:].replace("-", "_"): each.path for each in settings_in(EvolvedSamplingConfig)}
    mapping: dict[str, Any] = {}
    for name, value in given.items():
        path = paths.get(name, (name.removeprefix(PREFIX),))
        inside = mapping if len(path) == 1 else mapping.setdefault(path[0], {})
        inside[path[-1]] = value
    return mapping


def _old_names(setting: Setting) -> list[str]:
    """Flags that a setting had before, where they are others."""
    old = [flag_of(flat) for flat, path in FLAT_NAMES.items() if path == setting.path]
    return [flag for flag in old if flag != flag_of(setting.name)]


@functools.cache
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


def _default(setting: Setting) -> str:
    """A setting's default in words."""
    if setting.name in PRESET_NAMES:
        return "that of the preset"
    return "none" if isinstance(setting.field.default_factory, types.GenericAlias) else str(setting.field.default)


def _kind(hint: Any) -> dict[str, Any]:
    """What argparse has to know about a field's type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is Mapping:
        return {"nargs": "*", "metavar": "NAME=VALUE"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint}
