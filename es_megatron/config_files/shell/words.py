"""Words of bash: what a script is made of below its commands, each part with its place in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from es_megatron.errors import ConfigError

BLANK = " \t\r\f\v"
META = BLANK + "\n;&|<>()"
CONTINUED = re.compile(r"\\\r?\n")
PLAIN_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|[0-9@*#?$!-])")
HEX_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a word, between two offsets of the text."""

    kind: Literal["text", "variable", "arithmetic", "substitution"]
    value: str
    """The text, or what stands between the brackets."""
    quoted: bool
    start: int
    end: int
    inner: int = 0
    """Where the value begins in the text."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a command, between two offsets of the text."""

    start: int
    end: int
    pieces: tuple[Piece, ...]

    def literal(self) -> str:
        """The text if nothing in it needs expanding, else an empty string."""
        return "".join(piece.value for piece in self.pieces) if all(p.kind == "text" for p in self.pieces) else ""

    def bare(self) -> str:
        """The text of a word without quotes or expansions, else an empty string."""
        return self.literal() if all(not piece.quoted for piece in self.pieces) else ""


class Reader:
    """Reads words from a text, from an offset on."""

    def __init__(self, text: str, at: int = 0) -> None:
        self.text, self.at = text, at

    def word(self) -> Word:
        """The word that begins here; empty at a blank or an operator.

        Raises:
            ConfigError: a quote or bracket is never closed; names its line.
        """
        start, pieces, text = self.at, list[Piece](), self.text
        while self.at < len(text) and text[self.at] not in META:
            at, character = self.at, text[self.at]
            if match := CONTINUED.match(text, at):
                if not pieces:
                    break
                self.at = match.end()
            elif character == "\\":
                self.at += 2
                pieces.append(Piece("text", text[at + 1 : at + 2], True, at, min(self.at, len(text)), at + 1))
            elif character == "'":
                end = self.find("'", at + 1)
                pieces.append(Piece("text", text[at + 1 : end], True, at + 1, end, at + 1))
                self.at = end + 1
            elif character == '"':
                self._double_quoted(pieces)
            elif character in "$`":
                self.expansion(pieces, False)
            else:
                end = at + 1
                while end < len(text) and text[end] not in META + "\\'\"$`":
                    end += 1
                pieces.append(Piece("text", text[at:end], False, at, end, at))
                self.at = end
        return Word(start, self.at, tuple(pieces))

    def _double_quoted(self, pieces: list[Piece]) -> None:
        opened = self.at
        self.at += 1
        pieces.append(Piece("text", "", True, self.at, self.at, self.at))
        while self.at < len(self.text):
            if self.text[self.at] == '"':
                self.at += 1
                return
            self._quoted_part(pieces, '"')
        raise self.unclosed(opened, '"')

    def _quoted_part(self, pieces: list[Piece], closing: str, limit: int | None = None) -> None:
        """One piece of a text in which expansions are made, but nothing else; `closing` ends it."""
        text, at = self.text, self.at
        limit = len(text) if limit is None else limit
        if match := CONTINUED.match(text, at):
            self.at = match.end()
        elif text[at] == "\\" and text[at + 1 : at + 2] in ("$", "`", closing or "\\", "\\"):
            pieces.append(Piece("text", text[at + 1], True, at, at + 2, at + 1))
            self.at += 2
        elif text[at] in "$`":
            self.expansion(pieces, True)
        else:
            end = at + 1
            while end < limit and text[end] not in "\\$`" + closing:
                end += 1
            pieces.append(Piece("text", text[at:end], True, at, end, at))
            self.at = end

    def document(self, start: int, end: int, *, expand: bool, tabs: bool) -> Word:
        """The body of a here-document as a word: expansions made or not, tabs at line starts dropped or not."""
        reader, pieces = Reader(self.text, start), list[Piece]()
        while reader.at < end:
            if tabs and (reader.at == start or self.text[reader.at - 1] == "\n"):
                while reader.at < end and self.text[reader.at] == "\t":
                    reader.at += 1
            at = reader.at
            line = self.text.find("\n", at, end)
            stop = end if line < 0 else line + 1
            if not expand:
                pieces.append(Piece("text", self.text[at:stop], True, at, stop, at))
                reader.at = stop
            while reader.at < stop:
                reader._quoted_part(pieces, "", stop)
        return Word(start, end, tuple(pieces))

    def expansion(self, pieces: list[Piece], quoted: bool) -> None:
        """Read what begins with `$` or a backtick."""
        text, at = self.text, self.at
        if text[at] == "`":
            end = self.find("`", at + 1)
            pieces.append(Piece("substitution", text[at + 1 : end], quoted, at, end + 1, at + 1))
            self.at = end + 1
        elif text.startswith("$((", at):
            end = self.closing(at + 2, "(", ")")
            self.at = min(end + 2, len(text))
            pieces.append(Piece("arithmetic", text[at + 3 : end], quoted, at, self.at, at + 3))
        elif text.startswith("$(", at):
            end = self.closing(at + 1, "(", ")")
            pieces.append(Piece("substitution", text[at + 2 : end], quoted, at, end + 1, at + 2))
            self.at = end + 1
        elif text.startswith("${", at):
            end = self.closing(at + 1, "{", "}")
            pieces.append(Piece("variable", text[at + 2 : end], quoted, at, end + 1, at + 2))
            self.at = end + 1
        elif match := PLAIN_VARIABLE.match(text, at):
            pieces.append(Piece("variable", match[1], quoted, at, match.end(), at + 1))
            self.at = match.end()
        elif not quoted and text.startswith("$'", at):
            self._escaped_quote(pieces)
        else:
            if quoted or text[at + 1 : at + 2] != '"':  # $"..." is a quote
                pieces.append(Piece("text", "$", quoted, at, at + 1, at))
            self.at += 1

    def _escaped_quote(self, pieces: list[Piece]) -> None:
        """`$'...'`: a quote with escapes."""
        opened, at = self.at, self.at + 2
        pieces.append(Piece("text", "", True, at, at, at))
        while at < len(self.text):
            if self.text[at] == "'":
                self.at = at + 1
                return
            width = 2 if self.text[at] == "\\" else 1
            value = self.text[at] if width == 1 else HEX_ESCAPES.get(self.text[at + 1 : at + 2], self.text[at : at + 2])
            pieces.append(Piece("text", value, True, at, at + width, at))
            at += width
        raise self.unclosed(opened + 1, "'")

    def closing(self, opened: int, left: str, right: str) -> int:
        """Offset of the bracket that closes the one at `opened`; quotes hide brackets."""
        depth, at, text = 0, opened, self.text
        while at < len(text):
            character = text[at]
            if character == "\\":
                at += 1
            elif character == "'" and left == "(":
                at = self.find("'", at + 1)
            elif character == '"' and left == "(":
                at = self._end_of_quote(at)
            elif character == "#" and left == "(" and text[at - 1] in BLANK + "\n":
                end = text.find("\n", at)
                at = len(text) if end < 0 else end
            elif character == left:
                depth += 1
            elif character == right:
                depth -= 1
                if depth == 0:
                    return at
            at += 1
        raise self.unclosed(opened, left)

    def _end_of_quote(self, opened: int) -> int:
        """Offset of the double quote that closes the one at `opened`."""
        at = opened + 1
        while at < len(self.text):
            if self.text[at] == "\\":
                at += 1
            elif self.text[at] == '"':
                return at
            elif self.text.startswith("$(", at):
                at = self.closing(at + 1, "(", ")")
            at += 1
        raise self.unclosed(opened, '"')

    def find(self, character: str, start: int) -> int:
        """Offset of the next such character.

        Raises:
            ConfigError: there is none.
        """
        found = self.text.find(character, start)
        if found < 0:
            raise self.unclosed(start - 1, character)
        return found

    def unclosed(self, offset: int, what: str) -> ConfigError:
        """What is said of a quote or bracket without its partner."""
        line = self.text.count("\n", 0, offset) + 1
        return ConfigError(f"Line {line}: `{what}` is opened but never closed. Close it.")


def word_of(text: str, pieces: Sequence[Piece]) -> Word:
    """A word of given pieces."""
    return Word(pieces[0].start if pieces else 0, pieces[-1].end if pieces else len(text), tuple(pieces))
