"""Look at the scores of a run, export them, import others to begin with, compare two checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from es_megatron.errors import DataError
from es_megatron.score_files.files import AGES, QUANTILES, ScoreFiles, compare, describe

SCORES_OF = "an es_state folder, a checkpoint, or the folder of a run (its newest checkpoint)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    actions = parser.add_subparsers(dest="action", required=True)
    info = actions.add_parser("info", help="distribution, age and coverage of the scores of each component")
    info.add_argument("scores", type=Path, help=SCORES_OF)
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(act=_info)
    export = actions.add_parser("export", help="write scores as a Parquet table")
    export.add_argument("scores", type=Path, help=SCORES_OF)
    export.add_argument("output", type=Path, help="Parquet file to make")
    export.add_argument("--blend", type=Path, help="blend file of the run, to tell the documents that rows span")
    export.set_defaults(act=_export)
    imports = actions.add_parser("import", help="make scores to begin a run with (`scores.initial`) of a Parquet table")
    imports.add_argument(
        "table", type=Path, help="Parquet file with columns component, row, score and, if known, visits"
    )
    imports.add_argument("output", type=Path, help="folder to make")
    imports.add_argument("--blend", type=Path, required=True, help="blend file of the run that will begin with them")
    imports.add_argument("--seq-length", type=int, required=True, help="tokens of a row in that run")
    imports.set_defaults(act=_import)
    diff = actions.add_parser("diff", help="compare two checkpoints row by row; exit code 1 if they differ")
    diff.add_argument("first", type=Path, help=SCORES_OF)
    diff.add_argument("second", type=Path, help="another one")
    diff.add_argument("--json", action="store_true", help="print JSON")
    diff.set_defaults(act=_diff)


def run_scores(arguments: argparse.Namespace) -> int:
    """Do what is asked; returns 0, or 1 where `diff` finds a difference."""
    return int(arguments.act(arguments))


def _info(arguments: argparse.Namespace) -> int:
    files = ScoreFiles(arguments.scores)
    found = [describe(files, number) for number in range(len(files.manifest.components))]
    if arguments.json:
        rows = [{**dataclasses.asdict(each), "coverage": each.coverage} for each in found]
        print_json({"folder": str(files.folder), "iteration": files.iteration, "components": rows})
        return 0
    print(f"{files.folder}: scores of {files.manifest.total} samples, {_when(files)}")
    quantiles = [f"p{round(100 * q)}" for q in QUANTILES]
    ages = [str(first) if first == last else f"{first}-{last}" for first, last in AGES]
    table = [["component", "samples", "coverage", "mean", "sd", *quantiles, "max", "visits"]]
    table += [
        [d.component, str(d.samples), f"{d.coverage:.2%}"]
        + [f"{value:.4g}" for value in (d.mean, d.deviation, *d.quantiles, d.highest, d.visits)]
        for d in found
    ]
    print(aligned(table))
    print("age: share of samples by the visits they have had (255: or more)")
    print(aligned([["component", "0", *ages], *([d.component, *_shares(d.coverage, d.ages)] for d in found)]))
    for mask in files.state.get("engine", {}).get("decided", []):
        component, epoch, iteration = mask
        name = files.manifest.components[component].name
        print(f"kept samples of epoch {epoch} of `{name}` were decided by the scores before iteration {iteration}")
    return 0


def _when(files: ScoreFiles) -> str:
    return "imported" if files.iteration is None else f"after {files.iteration} iterations"


def _export(arguments: argparse.Namespace) -> int:
    from es_megatron.score_files.parquet import export

    files = ScoreFiles(arguments.scores)
    blend = None
    if arguments.blend is not None:
        from es_megatron.frameworks.megatron_data import load_blend

        blend = load_blend(arguments.blend, files.manifest.seq_length)
    rows = export(files, arguments.output, blend)
    print(f"{arguments.output}: {rows} rows, {arguments.output.stat().st_size} bytes")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from es_megatron.frameworks.megatron_data import load_blend
    from es_megatron.score_files.parquet import import_scores

    if arguments.output.exists():
        raise DataError(f"`{arguments.output}` exists already. Name another folder, or remove it.")
    manifest = load_blend(arguments.blend, arguments.seq_length).manifest
    counts = import_scores(arguments.table, manifest, arguments.output)
    for component in manifest.components:
        count = counts[component.name]
        print(
            f"{component.name}: {count} of {component.samples} samples have a score ({count / component.samples:.2%})"
        )
    print(f"Begin a run with `evolved_sampling.scores.initial={arguments.output}` (`--es-scores-initial` elsewhere).")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    first, second = ScoreFiles(arguments.first), ScoreFiles(arguments.second)
    blends = [{c.name: c for c in files.manifest.components} for files in (first, second)]
    shared = [name for name in blends[0] if name in blends[1]]
    found = [compare(first, second, name) for name in shared]
    only = [[name for name in one if name not in other] for one, other in (blends, blends[::-1])]
    other_text = [name for name in shared if blends[0][name].fingerprint != blends[1][name].fingerprint]
    same = not (any(only) or other_text or any(each.changed for each in found))
    if arguments.json:
        rows = [dataclasses.asdict(each) for each in found]
        told = {"same": same, "only_first": only[0], "only_second": only[1], "other_files": other_text}
        print_json({**told, "components": rows})
        return int(not same)
    print(f"{first.folder} ({_when(first)}) and {second.folder} ({_when(second)})")
    for names, which in zip(only, ("first", "second"), strict=True):
        for name in names:
            print(f"`{name}` is in the {which} only")
    for name in other_text:
        print(f"`{name}` has other files: its rows are compared by number and may be other text")
    table = [["component", "rows", "changed", "seen in both", "mean change", "mean distance", "correlation"]]
    table += [
        [d.component, str(d.samples), str(d.changed), str(d.both_seen)]
        + [f"{value:.4g}" for value in (d.mean_change, d.mean_distance, d.correlation)]
        for d in found
    ]
    print(aligned(table))
    print("the scores are the same" if same else "the scores differ")
    return int(not same)


def _shares(coverage: float, ages: tuple[float, ...]) -> list[str]:
    return [f"{share:.2%}" for share in (1 - coverage, *ages)]


def aligned(table: list[list[str]]) -> str:
    """Columns under each other, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


def print_json(document: dict[str, Any]) -> None:
    """JSON knows no nan: what has no value is null."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cleaned(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [cleaned(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(cleaned(document), indent=1))
