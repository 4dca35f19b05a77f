"""Reads a config file of any kind as the runs it describes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from es_megatron.config.names import SECTION, block_in
from es_megatron.config_files import json_files, yaml_files
from es_megatron.config_files.existing_run import ALIASES, SIZES, ExistingRun, Kind, canonical, parse_options
from es_megatron.config_files.launches import Launch, Reason, Script, is_packed, read_script
from es_megatron.config_files.ranks import world_size_of
from es_megatron.config_files.shell.interpreter import Interpreter
from es_megatron.config_files.shell.traced import MARK, shown, unknowns
from es_megatron.errors import ConfigError

KINDS = {
    "script": "Megatron-LM launch script",
    "arguments": "Megatron-LM argument list",
    "yaml": "Megatron YAML",
    "deepspeed": "DeepSpeed JSON",
}


@dataclass(frozen=True)
class Hints:
    """What the user tells about a config, beyond what stands in it."""

    values: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables of a script, and options of any config, by name."""
    world_size: int | None = None
    script: str | None = None
    """Name of the training script."""
    kind: Kind | None = None


@dataclass(frozen=True)
class Source:
    """A config as read."""

    kind: Kind
    text: str
    runs: tuple[ExistingRun, ...]
    """One per launch line."""
    launches: tuple[Launch, ...] = ()
    settings: tuple[str, ...] | Mapping[str, Any] = ()
    """Settings of Evolved Sampling that stand in it already: flags of a script, or the block."""
    hints: Hints = field(default_factory=Hints)
    """With which it was read."""


def read_text(path: Path) -> str:
    """A file as it is: line ends untouched, bytes that are no UTF-8 kept.

    Raises:
        ConfigError: it does not exist or cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read ({error.strerror}). Give a script, YAML or JSON file.") from error


def kind_of(path: Path, text: str) -> Kind:
    """What a file is, by its name and its first characters."""
    start = text.lstrip("\ufeff \t\r\n")
    if path.suffix in (".yaml", ".yml"):
        return "yaml"
    if path.suffix == ".json" or start.startswith("{"):
        return "deepspeed"
    code = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return "arguments" if code and code[0].lstrip().startswith("--") and not start.startswith("#!") else "script"


def read(path: Path, hints: Hints) -> Source:
    """Read a config.

    Raises:
        ConfigError: it cannot be read, or describes no run.
    """
    text = read_text(path)
    kind = hints.kind or kind_of(path, text)
    readers = {"script": _script, "arguments": _arguments, "yaml": _yaml, "deepspeed": _deepspeed}
    try:
        return readers[kind](text, hints)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def _script(text: str, hints: Hints) -> Source:
    script = read_script(text, hints.values, hints.script)
    if not script.launches:
        raise ConfigError(
            "No line starts a training script (`torchrun ... pretrain_gpt.py`). Name yours with `--script NAME.py`; if "
            "the line stands in another file, patch that one."
        )
    runs = tuple(_run_of(text, script, launch, hints) for launch in script.launches)
    flags = tuple(each for each in script.launches[0].arguments)
    return Source("script", text, runs, script.launches, _es_flags(flags), hints)


def scripts_in(kind: Kind, text: str, hints: Hints) -> list[Script]:
    """The scripts that a file is, or holds."""
    if kind == "yaml":
        return yaml_files.scripts_in_yaml(text, hints.values, hints.script)
    return [read_script(text, hints.values, hints.script)] if kind == "script" else []


def _es_flags(arguments: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    taking = False
    for each in arguments:
        if each.startswith("--"):
            taking = each == "--es" or each.startswith(("--es-", "--no-es"))
        if taking:
            found.append(each)
    return tuple(found)


def _run_of(text: str, script: Script, launch: Launch, hints: Hints) -> ExistingRun:
    arguments = tuple(each for each in launch.arguments if unknowns(each) not in (["@"], ["*"]))
    notes = list(_script_notes(text, script, launch, arguments))
    options = parse_options([word for each in arguments for word in (each.split() if is_packed(each) else [each])])
    bare = [name for each in launch.arguments if each.startswith("\ue000") for name in unknowns(each)]
    loose = dict.fromkeys(name for each in loose_in(launch.arguments) for name in unknowns(each))
    if loose:
        names = ", ".join(f"`${name}`" for name in loose)
        notes.append(
            (names, "not set in this file, and may hold more options", "give it with `--set NAME='--flag value'`")
        )
    run = ExistingRun(
        "script",
        options,
        launch.script,
        hints.world_size or world_size_of(script, launch),
        script.assumed,
        tuple(each for each in script.undecided if canonical(each) in options),
        tuple(notes),
        refused=() if launch.refused is None else (as_finding(launch.refused),),
        unread=tuple(dict.fromkeys(bare)),
    )
    return run.replaced({name: value for name, value in hints.values.items() if canonical(name) in _KNOWN})


def as_finding(reason: Reason) -> tuple[str, str, str]:
    """What, why, cure."""
    return reason.what, reason.why, reason.cure


def loose_in(arguments: Sequence[str]) -> Iterator[str]:
    """Arguments that are not known and may be options: no part of a longer word, and no value of an option."""
    for previous, each in zip(("", *arguments), arguments, strict=False):
        if MARK.fullmatch(each) and unknowns(each)[0] not in ("@", "*") and not re.fullmatch(r"--[\w-]+", previous):
            yield each


def _script_notes(
    text: str, script: Script, launch: Launch, arguments: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    if launch.cut_at is not None:
        line = text.count("\n", 0, launch.cut_at) + 1
        yield (
            f"line {line}",
            "a comment ends the command here although the line before is continued; what follows is not passed on",
            "move the comment above the command",
        )
    if len(arguments) < len(launch.arguments):
        yield (
            "`$@`",
            "arguments given when the script is started are not seen here",
            "give what matters with `--set NAME=VALUE`",
        )
    missing = any(unknowns(each) for each in (*launch.before, *launch.arguments))
    for line, what in script.passed_over if missing else ():
        yield (
            f"line {line}",
            f"`{shown(what)}` is not followed, so what it sets is not known",
            "give it with `--set NAME=VALUE`",
        )
    if "\r\n" in text:
        yield "line ends", "bash takes the carriage returns of this file as parts of words", "`sed -i 's/\\r$//' FILE`"
    told = {name: value for name, value in script.assumed.items() if value.isdigit() and name not in _RANKS}
    if told:
        listed = ", ".join(f"{name}={value}" for name, value in told.items())
        yield f"`{listed}`", "taken from the defaults in the script", "check other values with `--set NAME=VALUE`"
    nodes = launch.option("--nnodes")
    if nodes is not None and ":" in nodes:
        yield (
            f"`--nnodes {nodes}`",
            "the number of ranks may change while it runs; the largest is read here, and b must fit each",
            "check each with `--world-size N`",
        )


_RANKS = (
    "RANK",
    "NODE_RANK",
    "SLURM_PROCID",
    "SLURM_NODEID",
    "MASTER_PORT",
    "LOCAL_RANK",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)
_KNOWN = {
    *SIZES,
    *ALIASES.values(),
    "gradient_accumulation_steps",
    "train_iters",
    "train_samples",
    "num_layers",
    "recompute_granularity",
    "num_workers",
}


def _arguments(text: str, hints: Hints) -> Source:
    interpreter = Interpreter(pinned=hints.values)
    calls = interpreter.run(text)
    fields = [each.text for call in calls for each in call.fields]
    if not fields or not fields[0].startswith("--"):
        raise ConfigError("An argument list must begin with a `--flag`. Give `--kind script` if it is a script.")
    options = parse_options(tuple(fields))
    run = ExistingRun("arguments", options, None, hints.world_size).replaced(hints.values)
    return Source("arguments", text, (run,), (), _es_flags(tuple(fields)))


def last_word(text: str) -> int:
    """Offset behind the last word of an argument list."""
    return max(each.word.end for call in Interpreter().run(text) for each in call.fields)


def _yaml(text: str, hints: Hints) -> Source:
    scripts = scripts_in("yaml", text, hints)
    if scripts:
        runs = tuple(_run_of(text, script, launch, hints) for script in scripts for launch in script.launches)
        launches = tuple(launch for script in scripts for launch in script.launches)
        return Source("yaml", text, runs, launches, _es_flags(launches[0].arguments), hints)
    content = yaml_files.load(text)
    if not isinstance(content, dict):
        raise ConfigError("It must be a mapping of settings, but is not. Give a Megatron YAML.")
    content = cast(dict[str, Any], content)
    found: yaml_files.Found = {}
    for where, name, values in yaml_files.leaves({key: value for key, value in content.items() if key != SECTION}):
        found.setdefault(canonical(name), []).append((where, values))
    options = {name: places[0][1] for name, places in found.items()}
    if "micro_batch_size" not in options and "global_batch_size" not in options:
        raise ConfigError("It has neither `micro_batch_size` nor `global_batch_size`. Give the YAML of a training run.")
    if options.get("data_impl") == ("mock",):
        options["mock_data"] = ("data_impl: mock",)
    notes = tuple(
        (
            f"`{name}`",
            "stands with different values at " + ", ".join(where for where, _ in places) + "; the first is read",
            f"give the right one with `--set {name}=VALUE`",
        )
        for name, places in found.items()
        if name in SIZES and len({values for _, values in places}) > 1
    )
    ranks = hints.world_size or yaml_files.ranks_in(found)
    run = ExistingRun("yaml", options, None, ranks, notes=notes, deepspeed=content).replaced(hints.values)
    return Source("yaml", text, (run,), (), cast(Mapping[str, Any], block_in(content, "it") or {}), hints)


def _deepspeed(text: str, hints: Hints) -> Source:
    content = json_files.load(text)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    if not isinstance(content, dict) or not any(name in content for name in (*batch, "zero_optimization")):
        raise ConfigError(f"It must be a DeepSpeed config with {', '.join(batch[:2])}, but is not. Give that file.")
    content = cast(dict[str, Any], content)
    options = {canonical(name): (str(content[name]),) for name in batch if name in content}
    if "sequence_parallel_size" in content:
        options["context_parallel_size"] = (str(content["sequence_parallel_size"]),)
    notes = tuple(
        json_files.automatic(text, name)
        for name in batch
        if content.get(name) == "auto" and not {name, canonical(name)} & {*hints.values}
    )
    run = ExistingRun("deepspeed", options, None, hints.world_size, notes=notes, deepspeed=content)
    settings = cast(Mapping[str, Any], block_in(content, "it") or {})
    return Source("deepspeed", text, (run.replaced(hints.values),), (), settings, hints)
