"""What the words of a script come out as, as far as the text alone tells: variables, arrays, decided branches.

A value that the text does not tell (`$1`, `$(hostname)`, the environment) stays in the result as a mark with its name,
so that nothing is guessed; a default as in `${NNODES:-4}` is taken and noted.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from es_megatron.config_files.shell_syntax import Assignment, Command, Keyword, Node, Piece, Word, parse_value

OPEN, CLOSE, HIDDEN = "\ue000", "\ue001", 0xE100
MARK = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")
PARAMETER = re.compile(r"([#!]?)([A-Za-z_]\w*|\d+|[@*#?$!-])(?:\[([^\]]*)\])?(:?[-=?+])?(.*)", re.DOTALL)
NUMBER = re.compile(r"\s*(\d+|[-+*/%()])")
COMPARISONS = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-gt": operator.gt,
    "-ge": operator.ge,
    "-lt": operator.lt,
    "-le": operator.le,
}

Value = str | list[str]


def unknown(name: str) -> str:
    """A mark that stands for a value the text does not tell; a shell would take it for one word."""
    word = re.sub(r"[^\w]", lambda match: chr(HIDDEN + ord(match[0]) % 256), name)
    return f"{OPEN}{word}{CLOSE}"


def _name(mark: str) -> str:
    return "".join(chr(ord(each) - HIDDEN) if HIDDEN <= ord(each) < HIDDEN + 256 else each for each in mark)


def unknowns(text: str) -> list[str]:
    """Names of the values that are missing in a text."""
    return [_name(mark) for mark in MARK.findall(text)]


def shown(text: str) -> str:
    """A text for people: marks as `$NAME`."""
    return MARK.sub(lambda match: f"${_name(match[1])}", text)


@dataclass
class Branch:
    """An open `if`, `case` or loop."""

    active: bool | None
    """None: the text does not tell whether it runs."""
    done: bool | None = False
    """Whether an earlier branch of the same statement ran."""
    subject: str = ""
    condition: bool = False
    """Between `if` and `then`."""


@dataclass(frozen=True)
class Field:
    """A word after expansion."""

    text: str
    word: Word
    alone: bool
    """Whether its word came out as this field only."""


@dataclass
class Shell:
    """The state of a script while it is read from top to bottom."""

    pinned: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables that the user told, against what the script says."""
    variables: dict[str, Value] = field(default_factory=dict[str, Value])
    sources: dict[str, Word] = field(default_factory=dict[str, Word])
    """The word that a scalar was last set from."""
    assumed: dict[str, str] = field(default_factory=dict[str, str])
    """Defaults that were taken for variables of the environment."""
    undecided: list[str] = field(default_factory=list[str])
    """Flags appended in branches that may or may not run."""
    branches: list[Branch] = field(default_factory=list[Branch])

    def commands(self, nodes: list[Node]) -> Iterator[tuple[Command, list[Field]]]:
        """Go through a script, and give each command that may run with its fields."""
        truth: bool | None = True
        negated = False
        for node in nodes:
            if isinstance(node, Keyword):
                negated = node.name == "!"
                self._keyword(node)
                continue
            if self._state() is False:
                continue
            testing = bool(self.branches) and self.branches[-1].condition
            skipped = bool(node.joined) and truth is (node.joined == "||")
            if not skipped:
                doubtful = bool(node.joined) and truth is None
                fields = [each for word in node.words for each in self.fields(word)]
                self._assign(node, doubtful)
                result = (
                    decide([each.text for each in fields], unless_test=None if testing else True) if fields else True
                )
                result = not result if negated and result is not None else result
                truth = join(truth, node.joined, result)
                yield node, fields
            negated = False
            if testing:
                self.branches[-1].active = truth

    def _state(self) -> bool | None:
        states = [branch.active for branch in self.branches if not branch.condition]
        return False if False in states else None if None in states else True

    def _keyword(self, node: Keyword) -> None:
        name = node.name
        if name in ("if", "while", "until", "for", "case"):
            loop = name in ("while", "until", "for")
            subject = self.text(node.word) if name == "case" and node.word else ""
            self.branches.append(Branch(None if loop else name == "if", subject=subject, condition=name == "if"))
            if name == "for" and node.word:
                self.variables[node.word.literal()] = unknown(node.word.literal())
        elif not self.branches:
            return
        elif name in ("fi", "done", "esac"):
            self.branches.pop()
        elif name == "then":
            self._enter(self.branches[-1], self.branches[-1].active)
        elif name == "elif":
            self.branches[-1].condition, self.branches[-1].active = True, True
        elif name == "else":
            self._enter(self.branches[-1], True)
        elif name == "pattern":
            self._enter(self.branches[-1], matches(self.branches[-1].subject, node.pattern))

    def _enter(self, branch: Branch, holds: bool | None) -> None:
        branch.condition = False
        if branch.done is True:
            branch.active = False
        else:
            branch.active = None if branch.done is None and holds else holds
            branch.done = True if holds and branch.done is False else None if holds is not False else branch.done

    def _assign(self, node: Command, doubtful: bool) -> None:
        sure = self._state() is True and not doubtful
        for each in node.assignments:
            if each.name in self.pinned:
                self.variables[each.name] = self.pinned[each.name]
                continue
            before = self.variables.get(each.name)
            value = self._value(each, before)
            if not sure and isinstance(value, list):
                old = before if isinstance(before, list) else []
                self.undecided += [item.split("=")[0] for item in value[len(old) :] if item.startswith("--")]
            elif not sure and isinstance(value, str) and value != before:
                value = self._merged(each.name, before, value)
            self.variables[each.name] = value
            if not each.array:
                self.sources[each.name] = each.words[0]

    def _merged(self, name: str, before: Value | None, value: str) -> str:
        """A scalar that may or may not be set: options are read as if they are, anything else is not known."""
        had = before if isinstance(before, str) and "--" in before else ""
        if "--" in value:
            self.undecided += [item.split("=")[0] for item in value.removeprefix(had).split() if item.startswith("--")]
            return value if value.startswith(had) else f"{had} {value}"
        return had or unknown(name)

    def _value(self, each: Assignment, before: Value | None) -> Value:
        if each.array:
            items = [item.text for word in each.words for item in self.fields(word)]
            if not each.append:
                return items
            return (before if isinstance(before, list) else [before] if before else []) + items
        text = self.text(each.words[0])
        old = (" ".join(before) if isinstance(before, list) else before or "") if each.append else ""
        return old + text

    def text(self, word: Word) -> str:
        """A word without splitting, as in an assignment."""
        return " ".join(each.text for each in self.fields(word, split=False))

    def fields(self, word: Word, *, split: bool = True) -> list[Field]:
        """Expand a word; one that comes out empty without quotes is no field."""
        found: list[str] = []
        current: str | None = None
        for piece in word.pieces:
            items = self._expand(piece)
            if piece.quoted or piece.kind == "text" or not split:
                if not items and len(word.pieces) == 2:
                    return []  # "${EMPTY[@]}"
            else:
                raw = " ".join(items)
                items = raw.split()
                if raw[:1].isspace() and current is not None:
                    found.append(current)
                    current = None
            for number, item in enumerate(items):
                if number and current is not None:
                    found.append(current)
                    current = None
                current = (current or "") + item
        if current is not None:
            found.append(current)
        return [Field(text, word, len(found) == 1) for text in found]

    def _expand(self, piece: Piece) -> list[str]:
        if piece.kind == "text":
            return [piece.value]
        if piece.kind == "arithmetic":
            result = calculate(piece.value, self)
            return [unknown(f"(({piece.value.strip()}))") if result is None else str(result)]
        if piece.kind == "substitution":
            inner = piece.value.strip()
            return [] if inner.startswith("#") else [unknown(f"({inner})")]
        return self._parameter(piece)

    def _parameter(self, piece: Piece) -> list[str]:
        match = PARAMETER.fullmatch(piece.value)
        if match is None:
            return [unknown("{" + piece.value + "}")]
        sign, name, index, action, rest = match.groups()
        value = self.pinned.get(name, self.variables.get(name))
        if sign == "#" and isinstance(value, list) and index in ("@", "*"):
            return [str(len(value))]
        if sign or (rest and not action):
            return [unknown("{" + piece.value + "}")]
        if action and action.endswith("+"):
            return [self._inner(rest)] if value is not None else []
        if value is None and action and action[-1] in "-=":
            if action[-1] == "=":
                self.variables[name] = self._inner(rest)
            self.assumed[name] = self._inner(rest)
            return [self.assumed[name]]
        if value is None or (action and action[0] == ":" and action[-1] in "-=" and value == ""):
            return [unknown(name)] if value is None else [self._inner(rest)]
        if isinstance(value, str):
            return [value]
        if index in ("@", "*"):
            return list(value) if index == "@" or not piece.quoted else [" ".join(value)]
        position = int(index) if index and index.isdigit() else 0
        return [value[position]] if position < len(value) else []

    def _inner(self, text: str) -> str:
        return self.text(parse_value(text))


def matches(subject: str, pattern: str) -> bool | None:
    """Whether a `case` pattern fits; None where the subject is not known."""
    if unknowns(subject):
        return None
    choices = (choice.strip().strip("\"'") for choice in pattern.split("|"))
    return any(fnmatch.fnmatchcase(subject, choice) for choice in choices)


def calculate(expression: str, shell: Shell) -> int | None:
    """Value of `$((...))` with whole numbers, + - * / % and brackets; None where it is not known."""
    names = re.sub(
        r"\$\{(\w+)\}|\$(\w+)|\b([A-Za-z_]\w*)\b", lambda m: f" {_scalar(m[m.lastindex or 0], shell)} ", expression
    )
    tokens, at = list[str](), 0
    names = names.strip()
    while at < len(names):
        match = NUMBER.match(names, at)
        if match is None:
            return None
        tokens.append(match[1])
        at = match.end()
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return value if not rest else None


def _scalar(name: str, shell: Shell) -> str:
    value = shell.pinned.get(name, shell.variables.get(name, "?"))
    return value if isinstance(value, str) and value.strip() else "?"


def _sum(tokens: list[str]) -> tuple[int, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign = tokens[0]
        other, tokens = _product(tokens[1:])
        value = value + other if sign == "+" else value - other
    return value, tokens


def _product(tokens: list[str]) -> tuple[int, list[str]]:
    value, tokens = _atom(tokens)
    while tokens and tokens[0] in "*/%":
        sign = tokens[0]
        other, tokens = _atom(tokens[1:])
        value = value * other if sign == "*" else value // other if sign == "/" else value % other
    return value, tokens


def _atom(tokens: list[str]) -> tuple[int, list[str]]:
    if tokens[0] == "-":
        value, rest = _atom(tokens[1:])
        return -value, rest
    if tokens[0] == "(":
        value, rest = _sum(tokens[1:])
        if rest[0] != ")":
            raise ValueError(rest[0])
        return value, rest[1:]
    return int(tokens[0]), tokens[1:]


def join(before: bool | None, joint: str, result: bool | None) -> bool | None:
    """Outcome of `before && result` or `before || result`; None is not known."""
    if joint == "&&":
        return False if False in (before, result) else None if None in (before, result) else True
    if joint == "||":
        return True if True in (before, result) else None if None in (before, result) else False
    return result


def decide(words: list[str], *, unless_test: bool | None) -> bool | None:
    """Whether a `[`, `[[` or `test` command holds; None where it is not known, `unless_test` for any other command."""
    if words[0] not in ("[", "[[", "test"):
        return {"true": True, "false": False}.get(words[0], unless_test)
    inner = words[1:-1] if words[0] != "test" else words[1:]
    for joint, same in (("||", "||"), ("-o", "||"), ("&&", "&&"), ("-a", "&&")):
        if joint in inner:
            at = inner.index(joint)
            left, right = (decide(["test", *part], unless_test=None) for part in (inner[:at], inner[at + 1 :]))
            return join(left, same, right)
    if inner[:1] == ["!"]:
        result = decide(["test", *inner[1:]], unless_test=None)
        return None if result is None else not result
    if any(unknowns(word) for word in inner):
        return None
    if len(inner) == 2 and inner[0] in ("-z", "-n"):
        return (inner[1] == "") is (inner[0] == "-z")
    if len(inner) == 3:
        return compare(*inner)
    return None


def compare(left: str, sign: str, right: str) -> bool | None:
    """`[ left sign right ]` for texts and whole numbers; None for the rest, such as files."""
    if sign in ("=", "==", "!="):
        return fnmatch.fnmatchcase(left, right) is (sign != "!=")
    if sign not in COMPARISONS or not (left.lstrip("-").isdigit() and right.lstrip("-").isdigit()):
        return None
    return COMPARISONS[sign](int(left), int(right))
