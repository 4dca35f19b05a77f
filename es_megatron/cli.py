"""The `es-megatron` command: its subcommands are imported when they are asked for, so that help comes at once."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from typing_extensions import override

import es_megatron
from es_megatron.errors import ConfigError, EsError


class Command(NamedTuple):
    """A subcommand, not imported yet."""

    module: str
    """Below `es_megatron`: has `add_arguments`, and a docstring whose first line is the help."""
    function: str
    examples: tuple[str, ...]
    """Arguments that stand after its name."""


GROUPS: Mapping[str, Mapping[str, Command]] = {
    "a run of your own": {
        "prepare": Command(
            "prepare.command",
            "run_prepare",
            ("--output data --component books='books/*.jsonl.gz' --component code=src/ --vocab-size 16000",),
        ),
        "hash": Command(
            "prepare.hashing", "run_hash", ("--blend data/blend.yaml", "corpora/books_text_document --renew")
        ),
        "plan": Command(
            "forecast.command",
            "run_plan",
            ("--config configs/small.yaml --world-size 2", "--config run.yaml training.passes=3 --json"),
        ),
        "pretrain": Command(
            "trainer.command",
            "run_pretrain",
            (
                "--config configs/small.yaml data.blend=data/blend.yaml training.lr=3e-4",
                "--config run.yaml --print-config",
            ),
        ),
        "report": Command("report.command", "run_report", ("runs/pretrain", "runs/es --control runs/plain")),
        "spike": Command(
            "spikes.command", "run_spike", ("runs/pretrain --iteration 4210", "runs/pretrain --iteration 4210 --text")
        ),
        "skip": Command(
            "spikes.skip", "run_skip", ("runs/pretrain books:17 code:40-45", "runs/pretrain --documents books:3")
        ),
        "settings": Command(
            "settings_page.command",
            "run_settings",
            ("training.lr selection.keep_ratio", "--schema > settings.schema.json"),
        ),
    },
    "a run that you have already": {
        "run": Command("run", "run_script", ("pretrain_gpt.py --num-layers 12 --es-pruning-ratio 0.2",)),
        "patch": Command(
            "config_patch.command", "run_patch", ("train.sh --diff", "ds_config.json --world-size 8 --check")
        ),
        "unpatch": Command("config_patch.undo", "run_unpatch", ("train.es.sh",)),
    },
    "many machines": {
        "launch": Command(
            "launch.command",
            "run_launch",
            (
                "--config launch/cluster.yaml --dry-run",
                "--config launch/cluster.yaml -- pretrain --config run.yaml training.lr=1e-4",
            ),
        ),
        "preflight": Command("checks.preflight", "run_preflight", ("--config run.yaml",)),
        "doctor": Command("checks.doctor", "run_doctor", ("", "--config train.sh --blend data/blend.yaml")),
    },
    "scores and references": {
        "scores": Command(
            "score_files.command",
            "run_scores",
            (
                "info runs/pretrain",
                "export runs/pretrain scores.parquet",
                "import scores.parquet warm --blend data/blend.yaml --seq-length 2048",
            ),
        ),
        "reference": Command(
            "reference.command",
            "run_reference",
            (
                "train --blend data/blend.yaml --seq-length 2048 --output reference",
                "score --model reference --blend data/blend.yaml --output reference-losses",
            ),
        ),
    },
    "measuring": {
        "demo": Command("bench.demo", "run_demo", ("", "--seeds 1 2 --jobs 1")),
        "compare": Command(
            "bench.command",
            "run_compare",
            ("benchmarks/quality/tuning.yaml", "benchmarks/quality/tuning.yaml --seeds 1 2 --table"),
        ),
    },
}
"""Subcommands by what they are for."""

COMMANDS: Mapping[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest option where it does not know one."""

    @override
    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride] - its overloads say the same
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}. {self._hint(unknown[0])}".rstrip())
        return found

    def _hint(self, word: str) -> str:
        option = word.partition("=")[0]
        near = difflib.get_close_matches(option, list(self.options()), n=1, cutoff=0.7)
        if near:
            return f"Did you mean `{near[0]}`?"
        if not any(action.dest == "overrides" for action in self._actions):
            return ""
        from es_megatron.config.hints import hint_for
        from es_megatron.trainer.settings import PretrainSettings

        name = option.lstrip("-").rpartition(".")[2]
        hint = hint_for(name, PretrainSettings, PretrainSettings)
        return f"Settings are given as section.key=value, such as training.lr=0.001. {hint}"

    def options(self) -> Iterator[str]:
        """Every option, those of subcommands too; old names that are hidden are left out."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
                for each in action.choices.values():
                    yield from each.options()
            elif action.help is not argparse.SUPPRESS:
                yield from action.option_strings


class TopParser(Parser):
    """The parser that knows the names of subcommands alone; it reads their first lines when help is asked for."""

    @override
    def format_help(self) -> str:
        self.epilog = listing()
        return super().format_help()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; a user's mistake prints one line and returns 2."""
    top = TopParser(
        prog="es-megatron",
        usage="es-megatron [--help] [--version] COMMAND ...",
        description=(es_megatron.__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"es_megatron {es_megatron.__version__}")
    top.add_argument("command", metavar="COMMAND", help="one of those below; COMMAND --help tells more")
    top.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = top.parse_args(arguments)
    if chosen.command not in COMMANDS:
        _unknown(top, chosen.command)
    parser, act = parser_of(chosen.command)
    parsed = parser.parse_args(chosen.rest)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever the locale: a name that it cannot spell ends no command
        with suppress(OSError):  # it is closed
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return int(act(parsed))
    except EsError as error:
        with suppress(OSError, ValueError):  # of a log on a full disk, or a closed one: the exit code says it, too
            print(f"es-megatron {chosen.command}: error: {error}", file=sys.stderr, flush=True)
        return 2


def parser_of(name: str) -> tuple[Parser, Any]:
    """The parser of a subcommand, which is imported, and the function that runs it."""
    command = COMMANDS[name]
    module = importlib.import_module(f"es_megatron.{command.module}")
    shown = "\n".join(f"  es-megatron {name} {each}".rstrip() for each in command.examples)
    parser = Parser(
        prog=f"es-megatron {name}",
        description=(module.__doc__ or "").splitlines()[0],
        epilog=f"examples:\n{shown}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser, getattr(module, command.function)


def listing() -> str:
    """Every subcommand with its first line of help, in groups."""
    lines: list[str] = []
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"] if lines else [f"{title}:"]
        lines += [f"  {name:<10} {summary(command)}" for name, command in commands.items()]
    lines += ["", "exit codes: 0 done, 1 something was found or has failed, 2 a mistake that the last line names,"]
    return "\n".join([*lines, "3 a run that was stopped before its end and has saved (docs/running.md)"])


def summary(command: Command) -> str:
    """First line of a module's docstring, read without importing it."""
    spec = importlib.util.find_spec(f"es_megatron.{command.module}")
    if spec is None or spec.origin is None:
        raise ConfigError(f"`es_megatron.{command.module}` is missing. Install es_megatron again.")
    told = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return told.partition("\n")[0]


def _unknown(parser: Parser, name: str) -> NoReturn:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"There are: {', '.join(COMMANDS)}."
    parser.error(f"unknown command: {name}. {hint}")


if __name__ == "__main__":
    sys.exit(main())
