"""Puts flags into the launch lines of scripts, and takes them out again.

Every patch is read again as the original was: each launch must be the same but for the runner and the flags, and no
other command may have changed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from es_megatron.config_files.launches import RUNNER, Launch, Script, Site
from es_megatron.config_files.shell.commands import SHELLS
from es_megatron.config_files.shell.tree import Statement
from es_megatron.errors import ConfigError

ARRAYS = ("ES_ARGS", "ES_MEGATRON_ARGS")
CARRIERS = ("echo", "printf", "eval", "export", "tee", "logger", *SHELLS)
"""Commands whose words may hold the launch line as a text."""
RUN_AS_MODULE = re.compile(rf"(?:-m|--module) {re.escape(RUNNER)} ")
WORD = re.compile(r"(?:\$\{[^}\n]*\}|\$\([^)\n]*\)|`[^`\n]*`|\"[^\"\n]*\"|'[^'\n]*'|\\.|[^\s\"'`\\;&|<>()])+")
"""A word that is the training script: no quotes or brackets that are left open in it."""

Reread = Callable[[str], Sequence[Script]]
"""From the text of a file to the scripts in it."""


@dataclass(frozen=True)
class Insertion:
    """Text put in place of a part of the file."""

    start: int
    end: int
    text: str


def patch_launches(
    text: str,
    flags: Sequence[str],
    scripts: Reread,
    mark: Callable[[list[str], str], str],
    begins: Callable[[str, Sequence[Script]], list[int]] | None = None,
) -> str:
    """The text with every launch line going through the runner.

    Args:
        text: of the file.
        flags: put behind the script's word.
        scripts: reads the scripts in a file.
        mark: gives lines between marks, with an indentation.
        begins: gives, for each launch, the start of the line for its mark, if the file is no script itself.

    Raises:
        ConfigError: a launch line cannot be changed without changing something else.
    """
    before = scripts(text)
    launches = [launch for script in before for launch in script.launches]
    statements = [statement for script in before for statement in script.statements]
    array = next(name for name in ARRAYS if name not in text) if has_arrays(text) and begins is None else None
    lines = begins(text, before) if begins is not None else None
    choice = [0] * len(launches)
    while True:
        sites = [launch.sites[number] for launch, number in zip(launches, choice, strict=True)]
        edits = edits_of(text, launches, sites, Means(flags, array, mark, statements, lines))
        patched = text
        for edit in edits:
            patched = patched[: edit.start] + edit.text + patched[edit.end :]
        wrong = first_wrong(before, scripts(patched), flags)
        if wrong is None:
            return patched
        moved = next((at for at in [wrong, *range(len(launches))] if choice[at] + 1 < len(launches[at].sites)), None)
        if moved is None:
            line = text.count("\n", 0, launches[wrong].at) + 1
            raise ConfigError(
                f"Line {line}: the launch cannot be changed there without changing another command. "
                f"Put `-m {RUNNER}` before the training script by hand, and the flags behind it: {' '.join(flags)}"
            )
        choice[moved] += 1


class Means(NamedTuple):
    """What is put in, and where lines may stand."""

    flags: Sequence[str]
    array: str | None
    mark: Callable[[list[str], str], str]
    statements: Sequence[Statement]
    lines: list[int] | None


def edits_of(text: str, launches: Sequence[Launch], sites: Sequence[Site], means: Means) -> list[Insertion]:
    """What is put in, from the end of the file to its start."""
    flags, array, mark, statements, lines = means
    found: dict[tuple[int, int], Insertion] = {}
    marks: dict[int, list[str]] = {}
    for number, site in enumerate(sites):
        shared = [each for each, place in zip(launches, sites, strict=True) if place[:2] == site[:2]]
        options = [option for option in shared[0].takes if all(option in each.takes for each in shared)]
        if not options:
            line = text.count("\n", 0, site.start) + 1
            raise ConfigError(
                f"Line {line}: the script is started by launchers of which one takes a module by `-m`, another by "
                "`--module`. Say which with `--set NAME=VALUE` for the variable that decides, or patch each by hand."
            )
        direct = array is not None and site.direct and all(each.sites[0].direct for each in shared)
        word = text[site.start : site.end]
        passed = f'"${{{array}[@]}}"' if direct else " ".join(flags)
        found[site[:2]] = Insertion(site.start, site.end, f"{options[0]} {RUNNER} {word} {passed}")
        body = [f"{array}=(", *(f"    {flag}" for flag in flags), ")"] if direct else []
        where = lines[number] if lines is not None else line_for(text, site.start, statements)
        marks[where] = body or marks.get(where, [])
    for where, body in marks.items():
        line = text[where:]
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        found[where, where] = Insertion(where, where, mark(body, indent))
    return sorted(found.values(), key=lambda each: (each.start, each.end), reverse=True)


def line_for(text: str, at: int, statements: Sequence[Statement]) -> int:
    """Start of the line before which a command can be put that is run before what stands at an offset."""
    begins = {statement.start for statement in statements}
    around = sorted((each for each in statements if each.start <= at < each.end), key=lambda each: -each.start)
    for statement in around:
        line = text.rfind("\n", 0, statement.start) + 1
        first = line + len(text[line:]) - len(text[line:].lstrip(" \t\r"))
        if first in begins:
            return line
    first = min(begins, default=0)
    return text.rfind("\n", 0, first) + 1


def has_arrays(text: str) -> bool:
    """Whether the shell of a script knows arrays."""
    first = text.split("\n", 1)[0]
    return not first.startswith("#!") or "bash" in first or "zsh" in first


def first_wrong(before: Sequence[Script], after: Sequence[Script], flags: Sequence[str]) -> int | None:
    """The number of the first launch that is not as it must be after patching; None if all are."""
    words = " ".join(flags).split()
    old = [launch for script in before for launch in script.launches]
    new = [launch for script in after for launch in script.launches]
    for number, launch in enumerate(old):
        if number >= len(new):
            return number
        other = new[number]
        same = (other.before[:-2], other.before[-1:], other.script) == (launch.before, (RUNNER,), launch.script)
        if not same or list(other.arguments) != [*words, *launch.arguments]:
            return number
    commands = [[each for script in scripts for each in script.commands] for scripts in (before, after)]
    if len(new) != len(old) or not same_commands(*commands):
        return 0 if old else None
    return None


def same_commands(before: Sequence[tuple[str, ...]], after: Sequence[tuple[str, ...]]) -> bool:
    """Whether commands are the same, but for texts that hold the launch line."""
    after = [command for command in after if command]
    if len(before) != len(after):
        return False
    for left, right in zip(before, after, strict=True):
        if left == right or posixpath.basename(left[0]) in CARRIERS:
            continue
        differing = [pair for pair in zip(left, right, strict=False) if pair[0] != pair[1]]
        if len(left) != len(right) or not all(len(each.split()) > 1 for each, _ in differing):
            return False
    return True


def unpatch_launches(text: str, passed: re.Pattern[str]) -> str:
    """The text with launch lines as they were.

    Args:
        text: without what stands between marks.
        passed: matches the flags behind the script's word.
    """
    for match in reversed(list(RUN_AS_MODULE.finditer(text))):
        before, rest = text[: match.start()], text[match.end() :]
        word = WORD.match(rest)
        end = word.end() if word else 0
        flags = passed.match(rest, end)
        text = before + rest[:end] + rest[flags.end() if flags else end :]
    return text
