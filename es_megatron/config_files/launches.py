"""The lines of a script that start the training, what they pass to it, and where they can be changed."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from es_megatron.config_files.shell.commands import SHELLS, SILENT
from es_megatron.config_files.shell.expansion import Field, plain
from es_megatron.config_files.shell.interpreter import Call, Interpreter
from es_megatron.config_files.shell.traced import MARK, Place, Traced, between, made, places_of, shown, unknowns
from es_megatron.config_files.shell.tree import Statement

SCRIPT = re.compile(r"(pretrain|posttrain|train|finetune)\w*\.py")
CORE = re.compile(
    r"--(micro-batch-size|global-batch-size|num-layers|hidden-size|seq-length|train-iters|train-samples|lr-decay-style"
    r"|num-attention-heads|tensor-model-parallel-size|pipeline-model-parallel-size|data-path|use-mcore-models)\b"
)
"""Options that make a script one of Megatron's."""
RUNNER = "es_megatron.run"
PYTHON = re.compile(r"python[\d.]*")
MODULE = ("-m", "--module")
TAKES: Mapping[str, tuple[str, ...]] = {
    "python": ("-m",),
    "torchrun": MODULE,
    "torch.distributed.run": MODULE,
    "torch.distributed.launch": MODULE,
    "accelerate": MODULE,
    "dlrover-run": MODULE,
    "ft_launcher": MODULE,
    "deepspeed": ("--module",),
    "ds": ("--module",),
    "deepspeed.launcher.runner": ("--module",),
}
"""What starts a training script -> the options by which it takes a module instead."""
DIRECTIVE = re.compile(r"^#SBATCH\s+(.*)$", re.MULTILINE)
SCHEDULED = {
    "SLURM_NNODES": ("--nodes", "-N"),
    "SLURM_JOB_NUM_NODES": ("--nodes", "-N"),
    "SLURM_NTASKS": ("--ntasks", "-n"),
    "SLURM_NTASKS_PER_NODE": ("--ntasks-per-node",),
    "SLURM_GPUS_PER_NODE": ("--gpus-per-node",),
}
"""Variables that the scheduler sets -> the options of `#SBATCH` that they follow."""


class Site(NamedTuple):
    """A part of the file that makes just the word of the training script."""

    start: int
    end: int
    direct: bool
    """A word of the launch line itself, where an array that was set before can be used."""


class Reason(NamedTuple):
    """Why a launch cannot be changed."""

    what: str
    why: str
    cure: str


@dataclass(frozen=True)
class Launch:
    """One line that starts the training."""

    before: tuple[str, ...]
    """Fields up to the script: launcher, its options, environment."""
    script: str
    arguments: tuple[str, ...]
    sites: tuple[Site, ...]
    """Where the script's word can be changed, the outermost first."""
    at: int
    """An offset in the line that starts it, or that holds its script."""
    takes: tuple[str, ...]
    """Options by which its launcher takes a module; none if it is not known to."""
    cut_at: int | None = None
    """Offset of a comment that ends the command although its line was continued."""
    refused: Reason | None = None

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
    variables: Mapping[str, str]
    directives: Mapping[str, str] = field(default_factory=dict[str, str])
    """Options of `#SBATCH` lines."""
    statements: tuple[Statement, ...] = ()
    passed_over: tuple[tuple[int, str], ...] = ()
    """Other files that it reads in: the line, and the command."""
    commands: tuple[tuple[str, ...], ...] = ()
    """Fields of every command that is not a launch."""


def read_script(text: str, pinned: Mapping[str, str], name: str | None = None, runs: Traced | None = None) -> Script:
    """Find the launch lines of a bash script.

    Args:
        text: the script.
        pinned: variables whose value the user told.
        name: file name of the training script, where neither its name nor its options tell it.
        runs: where the script stands, if it is a part of another file.

    Raises:
        ConfigError: a quote or bracket is never closed.
    """
    directives: dict[str, str] = {}
    for line in DIRECTIVE.findall(text):
        for match in re.finditer(r"(--?[\w-]+)(?:[= ]\s*([^\s-]\S*))?", line):
            directives[match[1]] = match[2] or ""
    known = {
        variable: made(directives[option])
        for variable, options in SCHEDULED.items()
        for option in options
        if directives.get(option, "").isdigit()
    }
    interpreter = Interpreter(pinned=pinned, variables={**known, **{key: made(value) for key, value in pinned.items()}})
    launches: list[Launch] = []
    commands: list[tuple[str, ...]] = []
    for call in interpreter.run(text, runs):
        found = launch_of(call, name)
        if found is None:
            commands.append(tuple(each.text for each in call.fields))
        else:
            launches.append(found)
    sure = [each for each in launches if each.takes or any(CORE.search(word) for word in each.arguments)]
    unique = dict.fromkeys(sure or launches)
    return Script(
        tuple(unique),
        interpreter.assumed,
        tuple(dict.fromkeys(interpreter.undecided)),
        {key: plain(value) for key, value in interpreter.variables.items()},
        directives,
        tuple(interpreter.parser.statements) if interpreter.parser else (),
        tuple(dict.fromkeys(interpreter.passed_over)),
        tuple(commands),
    )


def launch_of(call: Call, name: str | None) -> Launch | None:
    """The launch that a command is; None if it is none."""
    texts = [each.text for each in call.fields]
    if posixpath.basename(texts[0]) in SILENT:
        return None
    for at, text in enumerate(texts):
        if not is_script(text, texts[at + 1 :], name):
            continue
        takes, known = takes_of(texts[:at])
        options = any(CORE.search(each) for each in texts[at + 1 :])
        if known or options or launcher_like(texts[:at]):
            return made_of(call, at, takes, known)
        return None
    return None


def made_of(call: Call, at: int, takes: tuple[str, ...], known: bool) -> Launch:
    """A launch whose script is one field of a command."""
    texts = [each.text for each in call.fields]
    sites = tuple(sites_of(call, at))
    arguments = tuple(texts[at + 1 :])
    refused = None
    if not known:
        refused = not_known(texts[:at], texts[at])
    elif packed := [each for each in arguments if is_packed(each)]:
        refused = Reason(
            f"`{shown(packed[0])[:40]}...`",
            "stands in quotes, so the script is given many options as one word",
            "leave out the quotes, or use an array",
        )
    elif not sites:
        refused = Reason(
            f"`{shown(texts[at])}`",
            "the file does not show where this word of the command is made",
            f"write the command into the file, or put `{takes[0]} {RUNNER}` before it by hand",
        )
    return Launch(
        (*call.around, *texts[:at]),
        texts[at],
        arguments,
        sites,
        sites[0].start if sites else offset_of(call, at),
        takes,
        call.command.cut_at if call.context.runs is None else None,
        refused,
    )


def is_packed(argument: str) -> bool:
    """Whether an argument holds several options in one quoted word."""
    words = argument.split()
    return len(words) > 1 and words[0].startswith("--") and any(each.startswith("--") for each in words[1:])


def offset_of(call: Call, at: int) -> int:
    """An offset in the file near a field, for the number of its line."""
    places = [run.trail[-1].start for run in call.fields[at].runs if run.trail]
    return places[0] if places else call.command.start if call.context.runs is None else 0


def is_script(text: str, rest: Sequence[str], name: str | None) -> bool:
    """Whether a field is the training script: by the name that the user told, or its own, or the options behind it."""
    base = posixpath.basename(text)
    if name:
        return base == posixpath.basename(name)
    if not base.endswith(".py") or base.startswith("-"):
        return False
    return SCRIPT.fullmatch(base) is not None or len({each[1] for x in rest if (each := CORE.match(x))}) > 2


def takes_of(before: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Options by which what starts a script takes a module, and whether it is known to start it."""
    for at in range(len(before) - 1, -1, -1):
        name = posixpath.basename(before[at])
        name = "python" if PYTHON.fullmatch(name) else name
        between_them = list(before[at + 1 :])
        if name == RUNNER:
            return ("-m",), True
        if name in TAKES:
            other = any(each.endswith((".py", ".sh")) or posixpath.basename(each) in SHELLS for each in between_them)
            return TAKES[name], not other and values_alone(between_them, name)
    return (), False


def values_alone(words: Sequence[str], name: str) -> bool:
    """Whether the words between a launcher and the script are options and their values."""
    if name == "accelerate":
        words = words[1:] if words[:1] == ["launch"] else words
    for previous, word in zip(("", *words), words, strict=False):
        valued = bool(previous) and (name != "python" or previous in ("-W", "-X"))
        if not word.startswith("-") and not MARK.search(word) and not valued:
            return False
    return True


def launcher_like(before: Sequence[str]) -> bool:
    """Whether the words before a script start something: an interpreter, or a value that the text does not tell."""
    names = [posixpath.basename(each) for each in before]
    return any(PYTHON.fullmatch(name) or name in TAKES for name in names) or bool(MARK.search("".join(before[:1])))


def not_known(before: Sequence[str], script: str) -> Reason:
    """What is said of a launcher that may not take a module."""
    name = posixpath.basename(script)
    words = [posixpath.basename(each) for each in before if not each.startswith("-") and "=" not in each]
    files = [f"{word} {words[at + 1]}" for at, word in enumerate(words[:-1]) if word in (*SHELLS, "python", "python3")]
    missing = [] if files else [each for word in before[:1] for each in unknowns(word)]
    if missing:
        example = f"`--set {missing[0]}='torchrun ...'`" if missing[0].isidentifier() else "`--set NAME=VALUE`"
        return Reason(
            f"`${missing[0]}`",
            f"not known from the file alone, and it starts `{shown(name)}`",
            f"give it with {example}",
        )
    takes = ", ".join(f"`{each}`" for each in list(TAKES)[:4])
    told = files[0] if files else words[0] if words else name
    return Reason(
        f"`{shown(told)}`",
        f"it starts `{shown(name)}`, and is not known to take a module in its place, as {takes} do",
        "start the script with one of those, or patch the file in which they stand",
    )


def sites_of(call: Call, at: int) -> Iterator[Site]:
    """Where a field of a command can be changed, the outermost first."""
    target: Field = call.fields[at]
    rest = [run for other, each in enumerate(call.fields) if other != at for run in each.runs]
    places: list[Place] = []
    word = target.word
    if target.alone and call.context.runs is None:
        places.append(Place(word.start, word.end))
    elif target.alone and call.context.runs is not None:
        runs = call.context.runs
        outside = [*between(runs, 0, word.start), *between(runs, word.end, len(call.context.text))]
        places += places_of(between(runs, word.start, word.end), outside)
    places += places_of(target.runs, rest)
    for number, place in enumerate(dict.fromkeys(places)):
        yield Site(place.start, place.end, call.direct and target.alone and number == 0)
