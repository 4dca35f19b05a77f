"""Goes through a script as bash would, and gives each command that may run with what its words come out as.

Branches that the text does not decide are all gone into, each with the variables as they were before, and what they
set is put together after them. Commands that are texts (`eval`, `bash -c`, here-documents) are scripts of their own.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from es_megatron.config_files.shell.branches import STARTS, Brancher, names_in
from es_megatron.config_files.shell.commands import DECLARES, SHELLS, SILENT, script_after, trimmed
from es_megatron.config_files.shell.conditions import decide, join, matches
from es_megatron.config_files.shell.expansion import Context, Field, Value
from es_megatron.config_files.shell.grammar import Parser
from es_megatron.config_files.shell.traced import Traced, joined, made, text_of, unknown, unknowns
from es_megatron.config_files.shell.tree import (
    Block,
    Branches,
    Case,
    Command,
    Function,
    Group,
    Loop,
    Pipeline,
    Simple,
)
from es_megatron.config_files.shell.words import Piece
from es_megatron.errors import ConfigError

DEEPEST, MOST = 12, 4000
"""Scripts within scripts, and commands: a script that goes beyond is read no further."""
MOST_TURNS = 16
"""Turns of loops, one within another, that are gone through one by one."""


@dataclass(frozen=True)
class Call:
    """A command that may run."""

    fields: tuple[Field, ...]
    context: Context
    command: Simple
    direct: bool
    """Stands in the file itself, outside of functions: what is set before it can be used in it."""
    around: tuple[str, ...]
    """Words of the commands that run the script it stands in, such as `srun`."""


@dataclass
class Interpreter(Brancher):
    """The state of a script while it is read from top to bottom."""

    functions: dict[str, tuple[Command, Context]] = field(default_factory=dict[str, tuple[Command, Context]])
    calls: list[Call] = field(default_factory=list[Call])
    visited: set[str] = field(default_factory=set[str])
    """Functions that were called."""
    passed_over: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """Other files that are read in: the line, and the command."""
    files: dict[str, Traced] = field(default_factory=dict[str, Traced])
    """Files that here-documents were written to."""
    parser: Parser | None = None
    around: tuple[str, ...] = ()
    depth: int = 0
    within: int = 0
    """Functions that are open."""
    steps: int = 0
    turns: int = 1
    """Of the loops that are open."""

    def run(self, text: str, runs: Traced | None = None) -> list[Call]:
        """Read a whole script.

        Args:
            text: the script.
            runs: where it stands, if it is a part of another file.

        Raises:
            ConfigError: a quote or bracket is never closed; names its line.
        """
        self.context, self.parser = Context(text, runs), Parser(text)
        self.block(self.parser.script())
        for name in [name for name in self.functions if name not in self.visited]:
            self._function(name, None)
        return self.calls

    def block(self, statements: Block) -> bool | None:
        """Go through statements; whether the last one succeeds."""
        truth: bool | None = True
        for statement in statements:
            truth = self._and_or(statement.parts)
        return truth

    def _and_or(self, parts: Sequence[tuple[str, Pipeline]]) -> bool | None:
        truth: bool | None = True
        for joint, pipeline in parts:
            if joint and truth is (joint == "||"):
                continue
            if joint and truth is None:
                ran = list[bool | None]()
                self.either([lambda pipeline=pipeline, ran=ran: ran.append(self._pipeline(pipeline))], sure=False)
                result = ran[0]
            else:
                result = self._pipeline(pipeline)
            truth = join(truth, joint, result)
        return truth

    def _pipeline(self, pipeline: Pipeline) -> bool | None:
        result: bool | None = True
        for number, command in enumerate(pipeline.commands):
            if number and isinstance(command, Simple) and command.words and command.words[0].bare() in SHELLS:
                self._piped(pipeline.commands[number - 1])
            result = self._command(command)
        return not result if pipeline.negated and result is not None else result

    def _piped(self, command: Command) -> None:
        """`echo "..." | bash`, `cat <<EOF | bash`."""
        if isinstance(command, Simple) and command.words and command.words[0].bare() in ("echo", "cat", "printf"):
            words = [each.runs for word in command.words[1:] for each in self.fields(word)]
            bodies = [self.text(each.body) for each in command.redirects if each.body is not None]
            self.nested(joined([*words, *bodies]))

    def _command(self, command: Command) -> bool | None:
        self.steps += 1
        if self.steps > MOST:
            return None
        if isinstance(command, Simple):
            return self._simple(command)
        if isinstance(command, Group):
            return self.block(command.body)
        if isinstance(command, Function):
            self.functions[command.name] = (command.body, self.context)
            return True
        if isinstance(command, Loop):
            return self._loop(command)
        return self._branches(command) if isinstance(command, Branches) else self._case(command)

    def _loop(self, loop: Loop) -> bool | None:
        words = [each.runs for word in loop.words for each in self.fields(word)]
        known = words and not any(unknowns(text_of(word)) or set(text_of(word)) & set("*?[") for word in words)
        if loop.name and known and self.turns * len(words) <= MOST_TURNS:
            self.turns *= len(words)
            for word in words:
                self.variables[loop.name] = word
                self.block(loop.body)
            self.turns //= len(words)
            return True
        if loop.name:
            self.variables[loop.name] = made(unknown(loop.name))
        self.block(loop.condition)
        self.either([lambda: self.block(loop.body)], sure=False)
        return True

    def _branches(self, command: Branches) -> bool | None:
        return self._first((self.block(when) if when else True, body) for when, body in command.branches)

    def _case(self, command: Case) -> bool | None:
        subject = text_of(self.text(command.word))
        return self._first((matches(subject, pattern), body) for pattern, body in command.branches)

    def _first(self, branches: Iterable[tuple[bool | None, Block]]) -> bool | None:
        """Run the first body whose condition holds, and those before it whose condition is not known."""
        bodies, sure = list[Callable[[], object]](), False
        for holds, body in branches:
            if holds is not False:
                bodies.append(lambda body=body: self.block(body))
            if holds is True:
                sure = True
                break
        return self.either(bodies, sure=sure)

    def _simple(self, command: Simple) -> bool | None:
        names = [name for word in command.words for name in names_in(word)]
        result = self._once(command)
        for name in dict.fromkeys(name for name in names if name in self.others):
            kept, others = self.variables.get(name), self.others.pop(name)
            for value in others:
                self.variables[name] = value
                self._once(command)
            self.others[name] = others
            if kept is not None:
                self.variables[name] = kept
        return result

    def _once(self, command: Simple) -> bool | None:
        fields = [each for word in command.words for each in self.fields(word)]
        texts = [each.text for each in fields]
        declares = bool(command.words) and command.words[0].bare() in DECLARES
        kept = dict(self.variables) if fields and not declares and command.assignments else None
        for each in command.assignments:
            self.assign(each)
        if fields:
            if not self._built_in(fields, texts):
                direct = not self.within and self.context.runs is None
                self.calls.append(Call(tuple(fields), self.context, command, direct, self.around))
            self._documents(command, posixpath.basename(texts[0]), texts)
        if kept is not None:
            self.variables = kept
        return decide(texts, unless_test=None if texts[0] == "((" or len(texts) == 0 else True) if texts else True

    def _built_in(self, fields: Sequence[Field], texts: Sequence[str]) -> bool:
        """Do what a command does to the state; whether it only runs a script that can be gone into."""
        name = posixpath.basename(texts[0])
        if name in self.functions:
            self._function(name, [each.runs for each in fields[1:]])
            return True
        if name == "eval":
            self.nested(joined([each.runs for each in fields[1:]]), shared=True)
            return True
        if name in ("source", ".") and texts[1:] and texts[1] not in self.files and self.context.runs is None:
            line = self.context.text.count("\n", 0, fields[0].word.start) + 1
            self.passed_over.append((line, " ".join(texts[:2])))
        if name == "shift" and self.positional is not None:
            self.positional = self.positional[int(texts[1]) if texts[1:] and texts[1].isdigit() else 1 :]
        elif name == "set" and "--" in texts:
            self.positional = [each.runs for each in fields[texts.index("--") + 1 :]]
        elif name == "unset":
            for each in texts[1:]:
                self.variables.pop(each, None)
        else:
            return self._scripts(fields, texts)
        return False

    def _scripts(self, fields: Sequence[Field], texts: Sequence[str]) -> bool:
        """Go into the script that the words of a command run; whether that is all the command does."""
        for at, text in enumerate(texts):
            shell = posixpath.basename(text) in SHELLS
            if shell and (place := script_after(texts, at)) is not None:
                self.nested(fields[place].runs, [each.runs for each in fields[place + 2 :]], around=texts[:place])
                return True
            if text in self.files and (
                at == 0 or posixpath.basename(texts[at - 1]) in (*SHELLS, "sbatch", "source", ".")
            ):
                self.nested(self.files[text], around=texts[:at])
                return True
        if posixpath.basename(texts[0]) in SILENT:
            return False
        for at, each in enumerate(fields[1:], 1):
            many = len(each.text.split()) > 1 and not each.text.startswith("-")
            if many and texts[at - 1] != "-c" and STARTS.search(each.text):
                self.nested(each.runs, around=texts[:at])
        return False

    def _documents(self, command: Simple, name: str, texts: Sequence[str]) -> None:
        """Here-documents: run by a shell, written to a file, or read into a variable."""
        for redirect in command.redirects:
            body = self.text(redirect.body) if redirect.body is not None else ()
            if redirect.operator == "<<<":
                body = self.text(redirect.target)
            if not body:
                continue
            target = next((each for each in command.redirects if each.operator in (">", ">>", ">|")), None)
            if name in ("cat", "tee"):
                file = text_of(self.text(target.target)) if target else next((x for x in texts[1:] if x[:1] != "-"), "")
                self.files[file] = body
            elif name == "read":
                self.variables[texts[-1]] = body
            elif name not in ("python", "python3"):
                self.nested(body, around=texts)

    def _function(self, name: str, positional: list[Traced] | None) -> None:
        if self.depth >= DEEPEST:
            return
        self.visited.add(name)
        body, context = self.functions[name]
        kept = (self.positional, self.context)
        self.positional, self.context = positional, context
        self.depth, self.within = self.depth + 1, self.within + 1
        self._command(body)
        self.depth, self.within = self.depth - 1, self.within - 1
        self.positional, self.context = kept

    def nested(
        self,
        runs: Traced,
        positional: list[Traced] | None = None,
        *,
        shared: bool = False,
        around: Sequence[str] = (),
    ) -> None:
        """Go through a text that a command runs as a script."""
        text = text_of(runs)
        if self.depth >= DEEPEST or not text.strip():
            return
        try:
            block = Parser(text).script()
        except ConfigError:
            return  # no script after all
        kept = (self.positional, self.context, self.variables, self.others)
        outside, self.around = self.around, (*self.around, *around)
        if not shared:
            self.variables, self.others = dict(self.variables), dict(self.others)
            self.positional = positional if positional is not None else self.positional
        self.context = Context(text, runs)
        self.depth += 1
        self.block(block)
        self.depth -= 1
        self.around = outside
        self.positional, self.context = kept[:2]
        if not shared:
            self.variables, self.others = kept[2:]

    def substituted(self, piece: Piece) -> list[Traced]:
        """`$(cat <<EOF ...)` and `$(echo ...)` are known; anything else is not."""
        inner = piece.value.strip()
        if not re.match(r"(cat|echo)\s", inner) or self.depth >= DEEPEST:
            return super().substituted(piece)
        end = piece.inner + len(piece.value)
        runs = self.context.part(piece.inner, end)
        try:
            block = Parser(piece.value).script()
        except ConfigError:
            return super().substituted(piece)
        command = block[0].parts[0][1].commands[0] if len(block) == 1 and len(block[0].parts) == 1 else None
        if not isinstance(command, Simple) or len(block[0].parts[0][1].commands) > 1:
            return super().substituted(piece)
        kept, self.context = self.context, Context(piece.value, runs)
        try:
            bodies = [self.text(each.body) for each in command.redirects if each.body is not None]
            words = [each.runs for word in command.words[1:] for each in self.fields(word)]
        finally:
            self.context = kept
        if command.words[0].bare() == "cat" and (words or len(bodies) != 1):
            return super().substituted(piece)
        return [trimmed(bodies[0])] if bodies else [joined([each for each in words if text_of(each)[:1] != "-"])]


def values_of(text: str, pinned: Iterable[tuple[str, str]] = ()) -> dict[str, Value]:
    """The variables of a script at its end."""
    interpreter = dataclasses.replace(Interpreter(), pinned=dict(pinned))
    interpreter.run(text)
    return interpreter.variables
