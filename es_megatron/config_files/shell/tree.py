"""What a script of bash is, as a tree."""

from __future__ import annotations

from dataclasses import dataclass

from es_megatron.config_files.shell.words import Word


@dataclass(frozen=True, slots=True)
class Assignment:
    """`NAME=value`, `NAME+=value`, `NAME=(words)`."""

    name: str
    append: bool
    words: tuple[Word, ...]
    array: bool


@dataclass(slots=True)
class Redirect:
    """`> file`, `<<EOF`, `<<< word`."""

    operator: str
    target: Word
    body: Word | None = None
    """Of a here-document."""


@dataclass(frozen=True, slots=True)
class Simple:
    """A simple command, or assignments alone."""

    words: tuple[Word, ...]
    assignments: tuple[Assignment, ...]
    redirects: tuple[Redirect, ...]
    start: int
    cut_at: int | None = None
    """Offset of a comment that ends the command though its line was continued; what follows it is not passed."""


@dataclass(frozen=True, slots=True)
class Branches:
    """`if`: conditions with their bodies; the last condition is empty for `else`."""

    branches: tuple[tuple[Block, Block], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """`case`: the patterns with their bodies."""

    word: Word
    branches: tuple[tuple[str, Block], ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """`for`, `select`, `while`, `until`."""

    name: str
    """Of the variable; empty for `while` and `until`."""
    words: tuple[Word, ...]
    condition: Block
    body: Block


@dataclass(frozen=True, slots=True)
class Function:
    """A definition."""

    name: str
    body: Command


@dataclass(frozen=True, slots=True)
class Group:
    """`{ ...; }` or `( ... )`."""

    body: Block


Command = Simple | Branches | Case | Loop | Function | Group


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Commands joined by `|`."""

    negated: bool
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """Pipelines joined by `&&` and `||`, between two offsets of the text."""

    start: int
    end: int
    parts: tuple[tuple[str, Pipeline], ...]
    """What joins it to the one before (empty for the first), and the pipeline."""


Block = tuple[Statement, ...]
