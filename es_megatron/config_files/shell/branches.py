"""Variables in branches of which the text does not tell which one runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from es_megatron.config_files.shell.expansion import Expander, Value, merged, plain, same
from es_megatron.config_files.shell.traced import joined, made, text_of, unknown
from es_megatron.config_files.shell.tree import Assignment
from es_megatron.config_files.shell.words import Word

STARTS = re.compile(r"\.py\b|torchrun|deepspeed|accelerate|\bpython|\bmsrun")
"""Of a text that may be part of a launch line."""
MOST_OTHERS = 8
"""Other values of a variable that are kept."""


@dataclass
class Brancher(Expander):
    """Variables whose value may hang on branches."""

    others: dict[str, list[Value]] = field(default_factory=dict[str, list[Value]])
    """Other values that a variable with a part of a launch line may have."""
    undecided: list[str] = field(default_factory=list[str])
    """Flags set in branches that may or may not run."""

    def either(self, bodies: Sequence[Callable[[], object]], *, sure: bool) -> bool | None:
        """Go into branches of which one runs, or none if it is not sure; put together what they set."""
        if sure and len(bodies) == 1:
            bodies[0]()
            return True
        before, ends = dict(self.variables), list[dict[str, Value]]()
        for body in bodies:
            self.variables = dict(before)
            body()
            ends.append(self.variables)
        ends += [] if sure else [before]
        self.variables = dict(before)
        for name in dict.fromkeys(name for end in ends for name in end):
            values = [end[name] for end in ends if name in end]
            if not all(same(value, before.get(name)) for value in values) or len(values) < len(ends):
                self.variables[name] = self._together(name, before.get(name), values)
        return None if bodies else True

    def _together(self, name: str, before: Value | None, values: Sequence[Value]) -> Value:
        """What a variable is after branches: options are read as if they are set, anything else is not known."""
        found = merged(values)
        if len(found) == 1:
            if not same(found[0], before):
                self._doubt(before, found[0])
            return found[0]
        commands = [value for value in found if STARTS.search(plain(value))]
        if commands:
            self.others[name] = [*self.others.get(name, []), *(each for each in commands[1:])][:MOST_OTHERS]
            for value in found:
                self._doubt(before, value)
            return commands[0]
        new = [value for value in found if not same(value, before)]
        if any(isinstance(value, list) for value in new):
            return self._arrays(before, new)
        had = before if isinstance(before, tuple) and "--" in text_of(before) else ()
        options = [value for value in new if isinstance(value, tuple) and "--" in text_of(value)]
        for value in options:
            self._doubt(had, value)
            more = text_of(value).startswith(text_of(had))
            had = value if more else joined([had, value])
        return had or made(unknown(name))

    def _arrays(self, before: Value | None, new: Sequence[Value]) -> Value:
        old = before if isinstance(before, list) else []
        items = list(old)
        for value in new:
            if isinstance(value, list):
                self._doubt(before, value)
                extends = [text_of(each) for each in value[: len(old)]] == [text_of(each) for each in old]
                items = [*items, *value[len(old) :]] if extends else list(value)
        return items

    def _doubt(self, before: Value | None, value: Value) -> None:
        had = plain(before) if before is not None else ""
        words = (plain(value).replace(had, " ") if had else plain(value)).split()
        self.undecided += [word.split("=")[0] for word in words if word.startswith("--")]

    def assign(self, each: Assignment) -> None:
        """Set a variable, and its other values where it is made of variables that have some."""
        if each.name in self.pinned:
            self.variables[each.name] = made(self.pinned[each.name])
            return
        names = [name for word in each.words for name in names_in(word) if name in self.others]
        before = self.variables.get(each.name)
        value = self._value(each, before)
        others: list[Value] = []
        for name in dict.fromkeys(names):
            kept = self.variables.get(name)
            for other in self.others[name]:
                self.variables[name] = other
                others.append(self._value(each, self.variables.get(each.name)))
            if kept is not None:
                self.variables[name] = kept
        if each.append and each.name in self.others:
            others += [self._value(each, other) for other in self.others[each.name]]
        self.variables[each.name] = value
        self.others.pop(each.name, None)
        if others:
            self.others[each.name] = merged(others)[:MOST_OTHERS]

    def _value(self, each: Assignment, before: Value | None) -> Value:
        if each.array:
            items = [item.runs for word in each.words for item in self.fields(word)]
            if not each.append:
                return items
            return [*(before if isinstance(before, list) else [before] if before else []), *items]
        text = self.text(each.words[0])
        if not each.append or before is None:
            return text
        return (joined(before) if isinstance(before, list) else before) + text


def names_in(word: Word) -> Iterator[str]:
    """Names of the variables in a word."""
    for piece in word.pieces:
        if piece.kind == "variable" and (match := re.match(r"#?([A-Za-z_]\w*)", piece.value)):
            yield match[1]
