"""Check a config you have (script, argument list, YAML, DeepSpeed JSON), and put Evolved Sampling into a copy of it."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from es_megatron.checks.config_report import Wishes, examine, wishes_in
from es_megatron.config import EvolvedSamplingConfig, require
from es_megatron.config_files.reading import KINDS, Hints, Source, read, read_text
from es_megatron.config_patch.folder import check_folder
from es_megatron.config_patch.writing import is_patched, patch
from es_megatron.errors import ConfigError, EsError
from es_megatron.frameworks import arguments as flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "config",
        type=Path,
        help="launch script, argument list, YAML or DeepSpeed JSON; with --check also a folder of them",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="only report; exit code 1 if anything is refused")
    what.add_argument("--diff", action="store_true", help="print a unified diff instead of writing a copy")
    what.add_argument("--in-place", action="store_true", help="write into CONFIG itself")
    what.add_argument("--output", type=Path, help="where the copy goes; default: NAME.es.EXT beside CONFIG")
    parser.add_argument("--force", action="store_true", help="write over an output that was edited by hand")
    add_hints(parser)
    flags.add_arguments(parser)


def add_hints(parser: argparse.ArgumentParser) -> None:
    """Declare what a user can tell about a config beyond what stands in it."""
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks of the run, where the config does not tell")
    parser.add_argument("--passes", type=float, metavar="N", help="passes over the data, for the predicted saving")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the script, or an option of the run",
    )
    parser.add_argument(
        "--script", metavar="NAME.py", help="the training script, if not pretrain*.py, train*.py, finetune*.py"
    )
    parser.add_argument("--kind", choices=sorted(KINDS), help="what CONFIG is, if its name does not tell")


def run_patch(arguments: argparse.Namespace) -> int:
    """Report, and write unless something is refused; returns 1 if it is."""
    hints = hints_of(arguments)
    switches = flags.read_switches(arguments)
    if switches.config is None and hasattr(arguments, "es"):
        raise ConfigError("`--no-es` switches Evolved Sampling off, so there is nothing to put in. Leave it out.")
    wishes = Wishes(switches.config or EvolvedSamplingConfig(), switches.given, arguments.passes)
    if arguments.config.is_dir():
        require(arguments.check, "a folder as CONFIG", "given with `--check`", str(arguments.config))
        table, bad = check_folder(arguments.config, hints, wishes)
        print(table)
        return int(bad)
    source = read(arguments.config, hints)
    report = examine(arguments.config.name, source, wishes)
    print(report.text(), file=sys.stderr if arguments.diff else sys.stdout)
    if arguments.check or report.refused:
        return int(report.refused)
    patched = patch(source, report.proposal.config, switches)
    if arguments.diff:
        sys.stdout.write(diff_of(arguments.config.name, source.text, patched))
        return 0
    target = arguments.config if arguments.in_place else arguments.output or copy_of(arguments.config)
    if target != arguments.config and target.exists():
        if read_text(target) == patched:
            print(f"already patched: {target}")
            return 0
        if not arguments.force and not as_written(target, source, hints):
            raise ConfigError(
                f"`{target}` is there already, and is not what `patch` wrote: it was edited, or is another file. Give "
                "`--output` for another place, or `--force` to write over it."
            )
    write(target, patched, like=arguments.config)
    print(f"written: {target} (`es-megatron unpatch {target}` takes it out again)")
    return 0


def as_written(target: Path, source: Source, hints: Hints) -> bool:
    """Whether a file is a patched copy of a config as it was written, with whatever settings."""
    try:
        copy = read(target, hints)
        if not is_patched(copy):
            return False
        namespace = argparse.Namespace()
        if isinstance(copy.settings, tuple):
            namespace = flags.add_arguments(argparse.ArgumentParser()).parse_args(list(copy.settings))
        switches = flags.read_switches(namespace)
        config = wishes_in(copy, Wishes(EvolvedSamplingConfig(), frozenset())).config
        return patch(source, config, switches) == copy.text
    except EsError:
        return False


def hints_of(arguments: argparse.Namespace) -> Hints:
    """What the user told about the config.

    Raises:
        ConfigError: not NAME=VALUE, or a size out of range.
    """
    require(arguments.world_size is None or arguments.world_size >= 1, "--world-size", ">= 1", arguments.world_size)
    require(arguments.passes is None or arguments.passes > 0, "--passes", "> 0", arguments.passes)
    values: dict[str, str] = {}
    for each in arguments.set:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ConfigError(f"`--set` must be NAME=VALUE, but is {each!r} instead.")
        values[name] = value
    return Hints(values, arguments.world_size, arguments.script, arguments.kind)


def copy_of(path: Path) -> Path:
    """Where the patched copy goes by default: `train.sh` -> `train.es.sh`."""
    return path.with_name(f"{path.stem}.es{path.suffix}")


def diff_of(name: str, before: str, after: str) -> str:
    """Unified diff that `patch -p1` takes; line ends as in the file."""
    lines = difflib.unified_diff(split(before), split(after), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def split(text: str) -> list[str]:
    """Lines with their ends; nothing but a line feed ends one."""
    parts = text.split("\n")
    return [part + "\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def write(path: Path, text: str, like: Path) -> None:
    """Write a file in one move, with the permissions of another.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    partial = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            partial = Path(file.name)
            file.write(text.encode("utf-8", "surrogateescape"))
        shutil.copymode(like, partial)
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise ConfigError(
            f"`{path}` cannot be written ({error.strerror}). Choose another place with `--output`."
        ) from error
