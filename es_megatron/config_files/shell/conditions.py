"""Tests and sums of bash, as far as their values are known; three answers: yes, no, not known (None)."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable

from es_megatron.config_files.shell.traced import unknowns

NUMBER = re.compile(r"\s*(\d+|[-+*/%()])")
COMPARISONS = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-gt": operator.gt,
    "-ge": operator.ge,
    "-lt": operator.lt,
    "-le": operator.le,
}


def matches(subject: str, pattern: str) -> bool | None:
    """Whether a `case` pattern fits; None where the subject is not known."""
    if pattern.strip() == "*":
        return True
    if unknowns(subject):
        return None
    choices = (choice.strip().strip("\"'") for choice in pattern.split("|"))
    return any(fnmatch.fnmatchcase(subject, choice) for choice in choices)


def calculate(expression: str, value_of: Callable[[str], str | None]) -> int | None:
    """Value of `$((...))` with whole numbers, + - * / % and brackets; None where it is not known.

    Args:
        expression: what stands between the brackets.
        value_of: from a variable's name to its value.
    """
    names = re.sub(
        r"\$\{(\w+)\}|\$(\w+)|\b([A-Za-z_]\w*)\b", lambda m: f" {_scalar(value_of(m[m.lastindex or 0]))} ", expression
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


def _scalar(value: str | None) -> str:
    return value if value and value.strip() else "?"


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
