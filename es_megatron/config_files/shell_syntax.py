"""Bash scripts as commands, assignments and branches, each with its place in the text; nothing is run.

Covers what launch scripts are made of: quotes, continued lines, comments, arrays, `${...}`, `$((...))`, `if`, `case`,
here-documents. The rest of the language is passed over, not refused: only what leads to the launch line matters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from es_megatron.errors import ConfigError

BLANK = " \t\r\f\v"
META = BLANK + "\n;&|<>()"
ASSIGNED = re.compile(r"([A-Za-z_]\w*)(?:\[[^\]\s]*\])?(\+?)=")
DECLARES = ("export", "declare", "local", "readonly", "typeset")
KEYWORDS = (
    "if",
    "elif",
    "then",
    "else",
    "fi",
    "while",
    "until",
    "do",
    "done",
    "esac",
    "{",
    "}",
    "!",
    "time",
    "function",
)
CONTINUED = re.compile(r"\\\r?\n")
OPERATOR = re.compile(r"&&|\|\||;;&|;;|;&|\|&|[;&|()]")
REDIRECT = re.compile(r"&>>|&>|<<<|<<-|<<|>>|>\||>&|<&|<>|[<>]")


@dataclass(frozen=True)
class Piece:
    """A part of a word."""

    kind: Literal["text", "variable", "arithmetic", "substitution"]
    value: str
    """The text, or what stands between the brackets."""
    quoted: bool


@dataclass(frozen=True)
class Word:
    """A word of a command, between two offsets of the text."""

    start: int
    end: int
    pieces: tuple[Piece, ...]

    def literal(self) -> str:
        """The text if nothing in it needs expanding, else an empty string."""
        return "".join(piece.value for piece in self.pieces) if all(p.kind == "text" for p in self.pieces) else ""


@dataclass(frozen=True)
class Assignment:
    """`NAME=value`, `NAME+=value`, `NAME=(words)`."""

    name: str
    append: bool
    words: tuple[Word, ...]
    array: bool


@dataclass(frozen=True)
class Command:
    """A simple command, or assignments alone."""

    words: tuple[Word, ...]
    assignments: tuple[Assignment, ...]
    line_start: int
    """Offset of the first line of the (possibly continued) logical line."""
    joined: str
    """`&&` or `||` before it, else empty."""
    cut_at: int | None
    """Offset of a comment that ends the command though its line was continued; what follows it is not passed."""


@dataclass(frozen=True)
class Keyword:
    """A reserved word, the word of a `case`, or one of its patterns."""

    name: str
    word: Word | None = None
    pattern: str = ""


Node = Command | Keyword


def parse(text: str) -> list[Node]:
    """Split a script into commands and keywords.

    Raises:
        ConfigError: a quote or bracket is never closed; names its line.
    """
    return _ShellParser(text).run()


def parse_value(text: str) -> Word:
    """The default in `${NAME:-text}` as a word."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    escaped = text.replace('"', '\\"')
    return _ShellParser(f'"{escaped}"').read_word()


class _ShellParser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.nodes: list[Node] = []
        self.words: list[Word] = []
        self.assignments: list[Assignment] = []
        self.line_start, self.joined = 0, ""
        self.continued, self.cut_at = False, None
        self.heredocs: list[tuple[str, bool]] = []

    def run(self) -> list[Node]:
        while self.at < len(self.text):
            self._step()
        self._flush()
        return self.nodes

    def _step(self) -> None:
        text, at = self.text, self.at
        if match := CONTINUED.match(text, at):
            self.at, self.continued = match.end(), True
        elif text[at] in BLANK:
            self.at += 1
        elif text[at] == "\n":
            self._newline()
        elif text[at] == "#":
            if self.continued and self.words:
                self.cut_at = at
            self._skip_comment()
        elif self._in_test() and (match := re.compile(r"&&|\|\||=~|[()<>]").match(text, at)):
            self.words.append(Word(at, match.end(), (Piece("text", match[0], False),)))
            self.at = match.end()
        elif match := REDIRECT.match(text, at):
            self._redirect(match)
        elif match := OPERATOR.match(text, at):
            self._operator(match[0])
        else:
            self._word()
            self.continued = False

    def _in_test(self) -> bool:
        return bool(self.words) and self.words[0].literal() == "[[" and self.words[-1].literal() != "]]"

    def _flush(self, joined: str = "") -> None:
        if self.words or self.assignments:
            if self.words and self.words[0].literal() in ("for", "select") and len(self.words) > 1:
                self.nodes.append(Keyword("for", self.words[1]))
            else:
                words, assignments = tuple(self.words), tuple(self.assignments)
                self.nodes.append(Command(words, assignments, self.line_start, self.joined, self.cut_at))
        self.words, self.assignments, self.cut_at = [], [], None
        self.joined = joined

    def _newline(self) -> None:
        waits = self.joined and not self.words and not self.assignments
        if not waits:
            self._flush()
        self.at += 1
        self.continued = False
        while self.heredocs:
            self._skip_heredoc(*self.heredocs.pop(0))
        if not waits:
            self.line_start = self.at

    def _skip_comment(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _skip_heredoc(self, delimiter: str, tabs: bool) -> None:
        while self.at < len(self.text):
            end = self.text.find("\n", self.at)
            end = len(self.text) if end < 0 else end
            line = self.text[self.at : end].rstrip("\r")
            self.at = min(end + 1, len(self.text))
            if (line.lstrip("\t") if tabs else line) == delimiter:
                return

    def _redirect(self, match: re.Match[str]) -> None:
        self.at = match.end()
        if self.words and self.words[-1].end == match.start() and self.words[-1].literal().isdigit():
            self.words.pop()  # a file descriptor, as in `2>&1`
        if self.at < len(self.text) and self.text[self.at] == "(":  # <(...)
            self.at = self._closing(self.at, "(", ")") + 1
            return
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self.at += 1
        start = self.at
        target = self.read_word()
        if match[0] in ("<<", "<<-"):
            raw = self.text[start : self.at]
            self.heredocs.append((target.literal() or raw.strip("\"'"), match[0] == "<<-"))

    def _operator(self, operator: str) -> None:
        self.at += len(operator)
        if operator == "(" and self.text.startswith("(", self.at) and not self.words:  # ((...))
            self.at = self._closing(self.at, "(", ")") + 1
            self.at = self._closing_next(")")
            return
        self._flush(operator if operator in ("&&", "||") else "")
        if operator in (";;", ";&", ";;&"):
            self._pattern()

    def _closing_next(self, bracket: str) -> int:
        found = self.text.find(bracket, self.at)
        return len(self.text) if found < 0 else found + 1

    def _word(self) -> None:
        declares = bool(self.words) and self.words[0].literal() in DECLARES
        if (not self.words or declares) and (match := ASSIGNED.match(self.text, self.at)):
            self._assignment(match)
            return
        word = self.read_word()
        name = word.literal()
        if not self.words and not self.assignments and name in KEYWORDS and word.end - word.start == len(name):
            self.nodes.append(Keyword(name))
        elif not self.words and name == "case":
            self._case()
        else:
            self.words.append(word)

    def _assignment(self, match: re.Match[str]) -> None:
        self.at = match.end()
        array = self.text.startswith("(", self.at)
        words = self._array() if array else (self.read_word(),)
        self.assignments.append(Assignment(match[1], bool(match[2]), words, array))

    def _array(self) -> tuple[Word, ...]:
        opened, words = self.at, list[Word]()
        self.at += 1
        while self.at < len(self.text):
            character = self.text[self.at]
            if match := CONTINUED.match(self.text, self.at):
                self.at = match.end()
            elif character in BLANK or character == "\n":
                self.at += 1
            elif character == "#":
                self._skip_comment()
            elif character == ")":
                self.at += 1
                return tuple(words)
            elif character in META:
                self.at += 1
            else:
                words.append(self.read_word())
        raise self._unclosed(opened, "(")

    def _case(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in BLANK:
            self.at += 1
        word = self.read_word()
        found = re.compile(r"\s+in\b").match(self.text, self.at)
        if found is None:
            raise ConfigError(f"Line {self._line(word.start)}: `case` must be followed by a word and `in`. Correct it.")
        self.at = found.end()
        self.nodes.append(Keyword("case", word))
        self._pattern()

    def _pattern(self) -> None:
        """Read `pattern)` or `esac`."""
        while self.at < len(self.text) and (self.text[self.at] in BLANK + "\n(" or self.text[self.at] == "#"):
            if self.text[self.at] == "#":
                self._skip_comment()
            else:
                self.at += 1
        if re.compile(r"esac\b").match(self.text, self.at) or self.at >= len(self.text):
            self.line_start = self.at
            return
        end = self.text.find(")", self.at)
        if end < 0:
            raise self._unclosed(self.at, "case")
        self.nodes.append(Keyword("pattern", None, self.text[self.at : end].strip()))
        self.at = end + 1
        self.line_start = self.at

    def read_word(self) -> Word:
        start, pieces = self.at, list[Piece]()
        while self.at < len(self.text) and self.text[self.at] not in META:
            character = self.text[self.at]
            if match := CONTINUED.match(self.text, self.at):
                if not pieces:
                    break
                self.at = match.end()
            elif character == "\\":
                pieces.append(Piece("text", self.text[self.at + 1 : self.at + 2], True))
                self.at += 2
            elif character == "'":
                end = self._find("'", self.at + 1)
                pieces.append(Piece("text", self.text[self.at + 1 : end], True))
                self.at = end + 1
            elif character == '"':
                self._double_quoted(pieces)
            elif character in "$`":
                self._expansion(pieces, False)
            else:
                end = self.at + 1
                while end < len(self.text) and self.text[end] not in META + "\\'\"$`":
                    end += 1
                pieces.append(Piece("text", self.text[self.at : end], False))
                self.at = end
        return Word(start, self.at, tuple(pieces))

    def _double_quoted(self, pieces: list[Piece]) -> None:
        opened = self.at
        self.at += 1
        pieces.append(Piece("text", "", True))
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == '"':
                self.at += 1
                return
            if match := CONTINUED.match(self.text, self.at):
                self.at = match.end()
            elif character == "\\" and self.text[self.at + 1 : self.at + 2] in ("$", "`", '"', "\\"):
                pieces.append(Piece("text", self.text[self.at + 1], True))
                self.at += 2
            elif character in "$`":
                self._expansion(pieces, True)
            else:
                end = self.at + 1
                while end < len(self.text) and self.text[end] not in '\\"$`':
                    end += 1
                pieces.append(Piece("text", self.text[self.at : end], True))
                self.at = end
        raise self._unclosed(opened, '"')

    def _expansion(self, pieces: list[Piece], quoted: bool) -> None:
        text, at = self.text, self.at
        if text[at] == "`":
            end = self._find("`", at + 1)
            pieces.append(Piece("substitution", text[at + 1 : end], quoted))
            self.at = end + 1
        elif text.startswith("$((", at):
            end = self._closing(at + 2, "(", ")")
            pieces.append(Piece("arithmetic", text[at + 3 : end], quoted))
            self.at = min(end + 2, len(text))
        elif text.startswith("$(", at):
            end = self._closing(at + 1, "(", ")")
            pieces.append(Piece("substitution", text[at + 2 : end], quoted))
            self.at = end + 1
        elif text.startswith("${", at):
            end = self._closing(at + 1, "{", "}")
            pieces.append(Piece("variable", text[at + 2 : end], quoted))
            self.at = end + 1
        elif match := re.compile(r"\$([A-Za-z_]\w*|[0-9@*#?$!-])").match(text, at):
            pieces.append(Piece("variable", match[1], quoted))
            self.at = match.end()
        else:
            if quoted or text[at + 1 : at + 2] not in ("'", '"'):  # $'...' and $"..." are quotes
                pieces.append(Piece("text", "$", quoted))
            self.at += 1

    def _closing(self, opened: int, left: str, right: str) -> int:
        """Offset of the bracket that closes the one at `opened`; quotes hide brackets."""
        depth, at = 0, opened
        while at < len(self.text):
            character = self.text[at]
            if character == "\\":
                at += 1
            elif character == "'" and left == "(":
                at = self._find("'", at + 1)
            elif character == left:
                depth += 1
            elif character == right:
                depth -= 1
                if depth == 0:
                    return at
            at += 1
        raise self._unclosed(opened, left)

    def _find(self, character: str, start: int) -> int:
        found = self.text.find(character, start)
        if found < 0:
            raise self._unclosed(start - 1, character)
        return found

    def _line(self, offset: int) -> int:
        return self.text.count("\n", 0, offset) + 1

    def _unclosed(self, offset: int, what: str) -> ConfigError:
        return ConfigError(f"Line {self._line(offset)}: `{what}` is opened but never closed. Close it.")
