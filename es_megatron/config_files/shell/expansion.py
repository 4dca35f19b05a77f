"""What words come out as: variables, arrays, defaults, sums; each part with its place in the file.

A value that the text does not tell (`$1`, `$(hostname)`, the environment) stays in the result as a mark with its name,
so that nothing is guessed; a default as in `${NNODES:-4}` is taken and noted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from es_megatron.config_files.shell.conditions import calculate
from es_megatron.config_files.shell.traced import (
    Place,
    Run,
    Traced,
    between,
    joined,
    made,
    split,
    text_of,
    through,
    trail_of,
    unknown,
    unknowns,
)
from es_megatron.config_files.shell.words import Piece, Reader, Word

PARAMETER = re.compile(
    r"([#!]?)([A-Za-z_]\w*|\d+|[@*#?$!-])(?:\[([^\]]*)\])?(:?[-=?+])?(.*)", re.DOTALL
)  # sign, name, index, what to do if it is not set, the rest
SLICE = re.compile(r":\s*(\d+)(?:\s*:\s*(\d+))?")

Value = Traced | list[Traced]
"""A scalar (a tuple of runs), or an array (a list of scalars)."""


@dataclass(frozen=True, slots=True)
class Field:
    """A word after expansion."""

    runs: Traced
    word: Word
    alone: bool
    """Whether its word came out as this field only."""

    @property
    def text(self) -> str:
        """The text; values that are not known as marks."""
        return text_of(self.runs)


@dataclass(frozen=True, slots=True)
class Context:
    """The text that is read: the file, or a text that was put together from it."""

    text: str
    runs: Traced | None = None
    """None for the file itself."""

    def trail(self, start: int, end: int) -> tuple[Place, ...]:
        """Where a part of it stands."""
        return (Place(start, end),) if self.runs is None else trail_of(between(self.runs, start, end))

    def part(self, start: int, end: int) -> Traced:
        """A part of it."""
        if self.runs is None:
            return (Run(self.text[start:end], (Place(start, end),)),)
        return between(self.runs, start, end)


def plain(value: Value) -> str:
    """A value as one text."""
    return text_of(value) if isinstance(value, tuple) else " ".join(text_of(each) for each in value)


@dataclass
class Expander:
    """Variables, and what words come out as with them."""

    pinned: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables that the user told, against what the script says."""
    variables: dict[str, Value] = field(default_factory=dict[str, Value])
    positional: list[Traced] | None = None
    """`$1`, `$2`, ...; None where they are not known."""
    assumed: dict[str, str] = field(default_factory=dict[str, str])
    """Defaults that were taken for variables of the environment."""
    context: Context = field(default_factory=lambda: Context(""))

    def value(self, name: str) -> Value | None:
        """A variable's value; None if it is not set in the text."""
        if name in self.pinned:
            whole = made(self.pinned[name])
            return split(whole) if name in ("@", "*") else whole
        if name in ("@", "*"):
            return self.positional
        if name == "#" and self.positional is not None:
            return made(str(len(self.positional)))
        if name.isdigit() and name != "0" and self.positional is not None:
            return self.positional[int(name) - 1] if int(name) <= len(self.positional) else ()
        return self.variables.get(name)

    def text(self, word: Word) -> Traced:
        """A word without splitting, as in an assignment."""
        return joined([each.runs for each in self.fields(word, splits=False)])

    def fields(self, word: Word, *, splits: bool = True) -> list[Field]:
        """Expand a word; one that comes out empty without quotes is no field."""
        found, current = list[list[Run]](), None
        for piece in word.pieces:
            if piece.kind == "text":
                current = [*(current or []), *self._literal(piece)]
                continue
            items = self._expand(piece)
            if piece.quoted or not splits:
                if not items and len(word.pieces) == 2:
                    return []  # "${EMPTY[@]}"
            else:
                whole = joined(items)
                raw, items = text_of(whole), split(whole)
                if raw[:1].isspace() and current is not None:
                    found.append(current)
                    current = None
            for number, item in enumerate(items):
                if number and current is not None:
                    found.append(current)
                    current = None
                current = [*(current or []), *item]
        if current is not None:
            found.append(current)
        return [Field(tuple(run for run in runs if run.text), word, len(found) == 1) for runs in found]

    def _literal(self, piece: Piece) -> Traced:
        if piece.end - piece.start == len(piece.value):
            return self.context.part(piece.start, piece.end)
        return (Run(piece.value, self.context.trail(piece.start, piece.end)),)

    def _expand(self, piece: Piece) -> list[Traced]:
        trail = self.context.trail(piece.start, piece.end)
        if piece.kind == "variable":
            return [through(each, trail) for each in self._parameter(piece)]
        if piece.kind == "arithmetic":
            result = calculate(piece.value, self._number)
            told = unknown(f"(({piece.value.strip()}))") if result is None else str(result)
            return [(Run(told, trail),)]
        return [through(each, trail) for each in self.substituted(piece)]

    def substituted(self, piece: Piece) -> list[Traced]:
        """What `$(...)` comes out as: not known, unless it is only a comment."""
        inner = piece.value.strip()
        return [] if inner.startswith("#") else [made(unknown(f"({inner})"))]

    def _number(self, name: str) -> str | None:
        value = self.value(name)
        return text_of(value) if isinstance(value, tuple) else None

    def _parameter(self, piece: Piece) -> list[Traced]:
        match = PARAMETER.fullmatch(piece.value)
        whole = made(unknown("{" + piece.value + "}"))
        if match is None:
            return [whole]
        sign, name, index, action, rest = match.groups()
        value = self.value(name)
        if name in ("@", "*"):
            index = name
        if sign == "#" and index in ("@", "*") and isinstance(value, list):
            return [made(str(len(value)))]
        if isinstance(value, list) and not sign and (cut := SLICE.fullmatch((action or "") + rest)):
            first = max(int(cut[1]) - (name in ("@", "*")), 0)
            return value[first : first + int(cut[2])] if cut[2] else value[first:]
        if sign or (rest and not action):
            told = None if value is None or unknowns(plain(value)) else changed(plain(value), rest)
            return [whole if told is None else made(told)]
        if action:
            return self._optional(name, value, action, piece, match.start(5))
        if value is None:
            return [made(unknown(name))]
        if name in self.pinned and index in ("@", "*") and isinstance(value, tuple):
            return split(value)
        return items_of(value, index, quoted=piece.quoted)

    def _optional(self, name: str, value: Value | None, action: str, piece: Piece, at: int) -> list[Traced]:
        """`${NAME:-value}` and its relatives."""
        empty = value is not None and action[0] == ":" and not plain(value)
        if action.endswith("+"):
            return [] if value is None or empty else [self._inner(piece, at)]
        if value is not None and not empty:
            return items_of(value, "@" if name == "@" else None, quoted=piece.quoted)
        if action.endswith("?"):
            return [made(unknown(name))]
        default = self._inner(piece, at)
        if value is None:
            self.assumed[name] = text_of(default)
        if action.endswith("="):
            self.variables[name] = default
        return [default]

    def _inner(self, piece: Piece, at: int) -> Traced:
        """The default in `${NAME:-default}`."""
        text = piece.value[at:]
        begin, end = piece.inner + at, piece.inner + len(piece.value)
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            begin, end = begin + 1, end - 1
        return self.text(Reader(self.context.text).document(begin, end, expand=True, tabs=False))


def items_of(value: Value, index: str | None, *, quoted: bool) -> list[Traced]:
    """The words of a variable with an index, as in `${NAME[@]}`."""
    if isinstance(value, tuple):
        return [value]
    if index in ("@", "*"):
        return list(value) if index == "@" or not quoted else [joined(value)]
    position = int(index) if index and index.isdigit() else 0
    return [value[position]] if position < len(value) else []


def changed(value: str, how: str) -> str | None:
    """A value with a part replaced or cut off, where that takes no pattern; None where it does."""
    if match := re.fullmatch(r"/(/?)([^/*?\[]+)/([^/]*)", how):
        return value.replace(match[2], match[3], -1 if match[1] else 1)
    if match := re.fullmatch(r"(%%?|##?)([^*?\[$]+)", how):
        return value.removesuffix(match[2]) if match[1][0] == "%" else value.removeprefix(match[2])
    return value.rpartition("/")[2] if how == "##*/" else None


def same(left: Value | None, right: Value | None) -> bool:
    """Whether two values have the same text."""
    if left is None or right is None or isinstance(left, tuple) != isinstance(right, tuple):
        return left is right
    return plain(left) == plain(right)


def merged(values: Sequence[Value]) -> list[Value]:
    """Values that differ in their text."""
    found: list[Value] = []
    for value in values:
        if not any(same(value, each) for each in found):
            found.append(value)
    return found
