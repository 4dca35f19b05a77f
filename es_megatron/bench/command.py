"""Compare arms at equal cost over paired seeds, as a spec says; finished runs are not run again."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import logging
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from es_megatron.bench.entries import nearest
from es_megatron.bench.recipe import Sources
from es_megatron.bench.spec import Spec, check, load_spec
from es_megatron.errors import ConfigError

DEFAULTS = {
    "arms": None,
    "cases": None,
    "seeds": None,
    "jobs": None,
    "wikitext": None,
    "corpora": None,
    "results": None,
    "table": False,
}
"""What a command that has no such option does."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add = parser.add_argument
    add("specs", type=Path, nargs="*", metavar="SPEC", help="YAML file, such as benchmarks/quality/tuning.yaml")
    add("--init", type=Path, metavar="SPEC", help="write a spec for text of your own, sized for this machine, and end")
    add("--component", action="append", default=[], metavar="NAME=PATH", help="with --init: the text, as in `prepare`")
    add("--minutes", type=float, default=30.0, help="with --init: what the comparison may take (%(default)s)")
    add("--directory", type=Path, default=Path("runs/compare"), help="of data and results (%(default)s)")
    add("--jobs", type=int, help="runs at a time, over the spec's")
    add("--arms", nargs="+", metavar="ARM", help="only these")
    add("--cases", nargs="+", metavar="CASE", help="only these")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="paired seeds, over the spec's")
    add("--wikitext", type=Path, metavar="PATH", help="training file of WikiText-2 raw, for specs that read it")
    add("--corpora", type=Path, metavar="DIR", help="folder of the files that specs name by {corpora}")
    add("--results", type=Path, metavar="DIR", help="keep finished runs in a file of each spec here, and count them")
    add("--table", action="store_true", help="run nothing: show what the finished runs say")


def run_compare(arguments: argparse.Namespace) -> int:
    """Run what is not finished yet and print the table of each spec; returns 1 if a run has failed."""
    if arguments.init is not None:
        from es_megatron.bench.init import init_spec

        print(init_spec(arguments.init, arguments.component, arguments.minutes))
        return 0
    if not arguments.specs:
        raise ConfigError("A SPEC must be given, or `--init SPEC` to write one: see docs/compare.md.")
    failed = [path for path in arguments.specs if compare_spec(path, arguments)]
    return int(bool(failed))


def compare_spec(path: Path, arguments: argparse.Namespace) -> bool:
    """Run what is not finished of one spec, as the command line says, and report; returns whether a run has failed."""
    for name in ("megatron", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from es_megatron.bench.comparison import Comparison  # imports torch
    from es_megatron.bench.kept import KeptRuns

    told = argparse.Namespace(**{**DEFAULTS, **vars(arguments)})
    whole = load_spec(path)
    spec = narrow(whole, told)
    directory: Path = told.directory / path.stem
    directory.mkdir(parents=True, exist_ok=True)
    with nullcontext() if told.table else alone(directory):
        kept = None if told.results is None else KeptRuns(told.results / f"{path.stem}.json", whole)
        sources = Sources(told.wikitext, told.corpora)
        comparison = Comparison(spec, directory, told.directory / "data", sources, kept)
        if told.table:
            comparison.find(failures=True)
        else:
            comparison.run()
        return comparison.report()


def narrow(spec: Spec, arguments: argparse.Namespace) -> Spec:
    """A spec with what the command line says instead.

    Raises:
        ConfigError: it names an arm or a case that the spec does not have, or what it says does not go together.
    """
    changes: dict[str, Any] = {}
    if arguments.arms:
        changes["arms"] = _pick(spec.arms, arguments.arms, "--arms")
        changes["references"] = tuple(name for name in spec.references if name in arguments.arms)
        changes["rates_like"] = {arm: other for arm, other in spec.rates_like.items() if arm in arguments.arms}
        changes["equal_cost"] = tuple(name for name in spec.equal_cost if name in arguments.arms)
    if arguments.cases:
        changes["cases"] = _pick(spec.cases, arguments.cases, "--cases")
    if arguments.seeds:
        changes["seeds"] = tuple(dict.fromkeys(arguments.seeds))
    if arguments.jobs is not None:
        changes["jobs"] = arguments.jobs
    narrowed = dataclasses.replace(spec, **changes)
    check(narrowed)
    return narrowed


def _pick(known: Any, names: list[str], option: str) -> dict[str, Any]:
    for name in names:
        if name not in known:
            raise ConfigError(f"`{option}` must name what the spec has, but has {name!r}. {nearest(name, known)}")
    return {name: known[name] for name in known if name in names}


@contextmanager
def alone(directory: Path) -> Generator[None]:
    """Hold a folder against a second command; `ConfigError` if there is one."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"`{directory}` is in use by another `es-megatron compare`: wait for it, or give another `--directory`."
            ) from error
        yield
