"""Texts that remember where in the file each part of them stands, however often it went through variables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

OPEN, CLOSE, HIDDEN = "\ue000", "\ue001", 0xE100
MARK = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")


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


class Place(NamedTuple):
    """A part of the file, between two offsets."""

    start: int
    end: int


class Run(NamedTuple):
    """A part of a text that comes from one place."""

    text: str
    trail: tuple[Place, ...]
    """Where it stands: its own place first, then the variable that it was put in by, and so on; empty if made up."""

    def part(self, start: int, end: int) -> Run:
        """From one offset to another; the place is cut too, where it holds just this text."""
        if start == 0 and end == len(self.text):
            return self
        trail = self.trail
        if trail and trail[0].end - trail[0].start == len(self.text):
            trail = (Place(trail[0].start + start, trail[0].start + end), *trail[1:])
        return Run(self.text[start:end], trail)


Traced = tuple[Run, ...]


def text_of(runs: Iterable[Run]) -> str:
    """The text itself."""
    return "".join(run.text for run in runs)


def made(text: str) -> Traced:
    """A text that stands nowhere in the file."""
    return (Run(text, ()),)


def through(runs: Iterable[Run], trail: Sequence[Place]) -> Traced:
    """The same text, put in by what stands at a place."""
    more = tuple(trail)
    return tuple(Run(run.text, run.trail + more) for run in runs)


def joined(parts: Sequence[Traced], separator: str = " ") -> Traced:
    """Texts with blanks between them."""
    found: list[Run] = []
    for number, part in enumerate(parts):
        found += [Run(separator, ())] if number else []
        found += part
    return tuple(found)


def between(runs: Sequence[Run], start: int, end: int) -> Traced:
    """A part of a text, from one offset to another."""
    found, at = list[Run](), 0
    for run in runs:
        low, high = max(start - at, 0), min(end - at, len(run.text))
        if low < high or (low == high == 0 and not run.text and start <= at <= end):
            found.append(run.part(low, high))
        at += len(run.text)
        if at >= end:
            break
    return tuple(found)


def trail_of(runs: Sequence[Run]) -> tuple[Place, ...]:
    """The trail of a piece of a text that is itself traced: one place if its runs stand side by side, else none."""
    runs = [run for run in runs if run.trail]
    if not runs or any(run.trail[1:] != runs[0].trail[1:] for run in runs):
        return ()
    for left, right in pairwise(runs):
        if left.trail[0].end != right.trail[0].start:
            return ()
    return (Place(runs[0].trail[0].start, runs[-1].trail[0].end), *runs[0].trail[1:])


def split(runs: Sequence[Run]) -> list[Traced]:
    """Words of a text, by its blanks."""
    text, found = text_of(runs), list[Traced]()
    for match in re.finditer(r"[^ \t\r\n\f\v]+", text):
        found.append(between(runs, match.start(), match.end()))
    return found


def places_of(runs: Sequence[Run], rest: Sequence[Run]) -> list[Place]:
    """Where a part of a text can be changed without changing the rest, the outermost place first.

    Args:
        runs: the part.
        rest: what else is made of the same text.
    """
    found: list[Place] = []
    runs = [run for run in runs if run.text]
    depth = 1
    while runs and all(len(run.trail) >= depth for run in runs):
        places = list(dict.fromkeys(run.trail[-depth] for run in runs))
        outer = [run.trail[-depth + 1] for run in runs] if depth > 1 else []
        side_by_side = all(left.end == right.start for left, right in pairwise(places))
        shared = any(place in run.trail for run in rest for place in places)
        if side_by_side and not shared and (depth == 1 or len(set(outer)) == 1):
            found.append(Place(places[0].start, places[-1].end))
        if len(places) > 1:
            break
        depth += 1
    return found
