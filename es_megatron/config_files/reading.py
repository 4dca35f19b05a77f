"""Reads a config file of any kind as the runs it describes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from es_megatron.config.names import SECTION, block_in
from es_megatron.config_files.existing_run import ALIASES, SIZES, ExistingRun, Kind, canonical, parse_options
from es_megatron.config_files.launches import Launch, Script, read_script
from es_megatron.config_files.ranks import world_size_of
from es_megatron.config_files.shell.interpreter import Interpreter
from es_megatron.config_files.shell.traced import unknown, unknowns
from es_megatron.errors import ConfigError

KINDS = {
    "script": "Megatron-LM launch script",
    "arguments": "Megatron-LM argument list",
    "yaml": "Megatron YAML",
    "deepspeed": "DeepSpeed JSON",
}
INTERPOLATED = re.compile(r"\$\{([^}]*)\}")


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
    if path.suffix == ".json" or start.startswith("{"):
        return "deepspeed"
    if path.suffix in (".yaml", ".yml"):
        return "yaml"
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
    options = parse_options(arguments)
    bare = [name for each in launch.arguments if each.startswith("\ue000") for name in unknowns(each)]
    named = [name for name in bare if name not in ("@", "*")]
    if named and len(options) < 5:
        names = ", ".join(f"`${name}`" for name in named)
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
        refused=(tuple(launch.refused),) if launch.refused else (),
        unread=tuple(dict.fromkeys(bare)),
    )
    return run.replaced({name: value for name, value in hints.values.items() if canonical(name) in _KNOWN})


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
    try:
        content: object = yaml.safe_load(text.lstrip("\ufeff"))
    except yaml.YAMLError as error:
        raise ConfigError(f"It must be YAML with one document, but is not: {error}. Correct it.") from error
    if not isinstance(content, dict):
        raise ConfigError("It must be a mapping of settings, but is not. Give a Megatron YAML.")
    content = cast(dict[str, Any], content)
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for where, name, values in _leaves({key: value for key, value in content.items() if key != SECTION}, ""):
        found.setdefault(canonical(name), []).append((where, values))
    options = {name: places[0][1] for name, places in found.items()}
    if "micro_batch_size" not in options and "global_batch_size" not in options:
        raise ConfigError("It has neither `micro_batch_size` nor `global_batch_size`. Give the YAML of a training run.")
    notes = tuple(
        (
            f"`{name}`",
            "stands with different values at " + ", ".join(where for where, _ in places) + "; the first is read",
            f"give the right one with `--set {name}=VALUE`",
        )
        for name, places in found.items()
        if name in SIZES and len({values for _, values in places}) > 1
    )
    run = ExistingRun("yaml", options, None, hints.world_size, notes=notes).replaced(hints.values)
    return Source("yaml", text, (run,), (), cast(Mapping[str, Any], block_in(content, "it") or {}))


def _leaves(mapping: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for key, value in mapping.items():
        place = f"{where}{key}"
        if isinstance(value, dict):
            yield from _leaves(cast(dict[str, Any], value), place + ".")
        elif isinstance(value, list):
            yield place, str(key), tuple(_plain(item) for item in cast(list[Any], value))
        else:
            yield place, str(key), (_plain(value),)


def _plain(value: object) -> str:
    return INTERPOLATED.sub(lambda match: unknown(match[1]), "null" if value is None else str(value))


def _deepspeed(text: str, hints: Hints) -> Source:
    try:
        content: object = json.loads(text.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"It must be JSON, but is not: {error}. Correct it.") from error
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    if not isinstance(content, dict) or not any(name in content for name in (*batch, "zero_optimization")):
        raise ConfigError(f"It must be a DeepSpeed config with {', '.join(batch[:2])}, but is not. Give that file.")
    content = cast(dict[str, Any], content)
    options = {canonical(name): (str(content[name]),) for name in batch if name in content}
    if "sequence_parallel_size" in content:
        options["context_parallel_size"] = (str(content["sequence_parallel_size"]),)
    run = ExistingRun("deepspeed", options, None, hints.world_size, deepspeed=content).replaced(hints.values)
    return Source("deepspeed", text, (run,), (), cast(Mapping[str, Any], block_in(content, "it") or {}))
