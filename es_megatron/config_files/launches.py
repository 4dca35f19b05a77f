"""The lines of a script that start the training, what they pass to it, and where they can be changed."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from es_megatron.config_files.shell_syntax import Command, Word, parse
from es_megatron.config_files.shell_values import MARK, Field, Shell

SCRIPT = re.compile(r"(pretrain|train|finetune)\w*\.py")
LAUNCHER = re.compile(r"torchrun|python[\d.]*|deepspeed|torch\.distributed\.(run|launch)|accelerate")
RUNNER = "es_megatron.run"
HARMLESS = (
    "echo",
    "printf",
    "ls",
    "cp",
    "mv",
    "cat",
    "test",
    "[",
    "[[",
    "ln",
    "chmod",
    "md5sum",
    "grep",
    "git",
    "export",
)
DIRECTIVE = re.compile(r"^#SBATCH\s+(.*)$", re.MULTILINE)
WHITESPACE = " \t\r\n\f\v"


@dataclass(frozen=True)
class Anchor:
    """Where the word of the training script stands in the text."""

    start: int
    end: int
    inline: bool
    """It stands inside a quoted command, where an array cannot be used."""


@dataclass(frozen=True)
class Launch:
    """One line that starts the training."""

    before: tuple[str, ...]
    """Fields up to the script: launcher, its options, environment."""
    script: str
    arguments: tuple[str, ...]
    anchor: Anchor
    line_start: int
    cut_at: int | None
    """Offset of a comment that ends the command although its line was continued."""

    @property
    def launcher(self) -> str:
        """`deepspeed` where that starts the script, else `python`."""
        names = {posixpath.basename(each) for each in self.before}
        return "deepspeed" if "deepspeed" in names else "python"

    @property
    def patched(self) -> bool:
        """Whether it runs through es_megatron already."""
        return RUNNER in self.before

    def option(self, *names: str) -> str | None:
        """Value of a launcher's option, in its forms `--name value` and `--name=value`, dashes or underscores."""
        wanted = {name.replace("_", "-") for name in names}
        for at, each in enumerate(self.before):
            name, equals, value = each.partition("=")
            if name.replace("_", "-") in wanted:
                return value if equals else self.before[at + 1] if at + 1 < len(self.before) else None
        return None


@dataclass(frozen=True)
class Script:
    """A script as read."""

    launches: tuple[Launch, ...]
    assumed: Mapping[str, str]
    """Defaults taken for variables of the environment."""
    undecided: tuple[str, ...]
    """Flags set in branches that may or may not run."""
    variables: Mapping[str, object]
    directives: Mapping[str, str] = field(default_factory=dict[str, str])
    """Options of `#SBATCH` lines."""


def read_script(text: str, pinned: Mapping[str, str], name: str | None = None) -> Script:
    """Find the launch lines of a bash script.

    Args:
        text: the script.
        pinned: variables whose value the user told.
        name: file name of the training script, where it is none of `pretrain*.py`, `train*.py`, `finetune*.py`.

    Raises:
        ConfigError: a quote or bracket is never closed.
    """
    shell = Shell(pinned, dict(pinned))
    launches: list[Launch] = []
    for command, fields in shell.commands(parse(text)):
        if fields and posixpath.basename(fields[0].text) not in HARMLESS:
            launches += find_launches(text, command, fields, shell, name)
    unique = {launch.anchor: launch for launch in launches}
    directives: dict[str, str] = {}
    for line in DIRECTIVE.findall(text):
        for match in re.finditer(r"(--?[\w-]+)(?:[= ]\s*([^\s-]\S*))?", line):
            directives[match[1]] = match[2] or ""
    return Script(
        tuple(unique.values()), shell.assumed, tuple(dict.fromkeys(shell.undecided)), shell.variables, directives
    )


def is_script(text: str, name: str | None) -> bool:
    """Whether a field is the training script."""
    base = posixpath.basename(text)
    return base == name if name else SCRIPT.fullmatch(base) is not None


def launches_it(before: list[str]) -> bool:
    """Whether what stands before the script runs it, rather than names it."""
    return any(LAUNCHER.fullmatch(posixpath.basename(each)) or MARK.search(each) for each in before)


def find_launches(text: str, command: Command, fields: list[Field], shell: Shell, name: str | None) -> Iterator[Launch]:
    """Give the launch that a command is, directly or in a quoted command of its own."""
    texts = [each.text for each in fields]
    for at, each in enumerate(fields):
        if is_script(each.text, name) and launches_it(texts[:at]):
            anchor = anchor_of(text, each, shell, name)
            if anchor is not None:
                yield Launch(
                    tuple(texts[:at]), each.text, tuple(texts[at + 1 :]), anchor, command.line_start, command.cut_at
                )
            return
    for each in fields:
        if any(character in each.text for character in WHITESPACE) and ".py" in each.text:
            yield from quoted_launches(text, command, each, shell, name)


def quoted_launches(text: str, command: Command, outer: Field, shell: Shell, name: str | None) -> Iterator[Launch]:
    """Look into `bash -c "..."`, whose text is a script of its own."""
    inner = Shell(shell.pinned, dict(shell.variables))
    for _, fields in inner.commands(parse(outer.text)):
        texts = [each.text for each in fields]
        for at, each in enumerate(fields):
            if is_script(each.text, name) and launches_it(texts[:at]):
                anchor = anchor_of(text, Field(each.text, outer.word, False), shell, name)
                if anchor is not None:
                    before = (*(word for word in ["srun"] if "srun" in text), *texts[:at])
                    yield Launch(before, each.text, tuple(texts[at + 1 :]), anchor, command.line_start, command.cut_at)
                return


def anchor_of(text: str, each: Field, shell: Shell, name: str | None) -> Anchor | None:
    """Place of the script in the text: its own word, or within the quoted word or variable that holds the command."""
    if each.alone:
        return Anchor(each.word.start, each.word.end, False)
    word = each.word
    variables = [piece.value.split("[")[0] for piece in word.pieces if piece.kind == "variable"]
    held = [shell.sources[variable] for variable in variables if variable in shell.sources]
    for place in [word, *held]:
        found = within(text, place, name)
        if found is not None:
            return found
    return None


def within(text: str, word: Word, name: str | None) -> Anchor | None:
    """The script's name inside a word, from blank or quote to blank or quote."""
    pattern = re.escape(name) if name else SCRIPT.pattern
    found = re.compile(rf"[^\s\"'=;]*(?<![\w-])(?:{pattern})(?![\w.])").search(text, word.start, word.end)
    return None if found is None else Anchor(found.start(), found.end(), True)
