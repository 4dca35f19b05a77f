"""Name the rows behind a loss spike: what was trained just before it, with losses, scores and documents."""

from __future__ import annotations

import argparse
import math
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es_megatron.core.bad_losses import mean_of_finite
from es_megatron.errors import ConfigError, DataError, EsError

if TYPE_CHECKING:
    from es_megatron.data.manifest import Manifest
    from es_megatron.spikes.run_files import RunFiles, Trained

WINDOW = 50
"""Iterations, or stretches of them, that medians are taken of."""
SHOWN_TOKENS = 32
SHOWN_LETTERS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="`run.directory`, or the folder of `--save`")
    parser.add_argument(
        "--iteration",
        type=int,
        required=True,
        metavar="N",
        help="as the audit counts: from 0 in `pretrain`, whose log line N + 1 is the first with it; else from 1",
    )
    parser.add_argument(
        "--before", type=int, default=3, metavar="K", help="iterations before it to look at; default: 3"
    )
    parser.add_argument("--top", type=int, default=8, metavar="M", help="rows to name; default: 8")
    parser.add_argument("--audit", type=Path, metavar="FILE", help="default: RUN/audit.jsonl")
    parser.add_argument("--text", action="store_true", help="show how each row begins, as text if there is a tokenizer")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_spike(arguments: argparse.Namespace) -> int:
    """Print what is found, and the command that leaves the rows out; returns 0."""
    from es_megatron.score_files.command import print_json
    from es_megatron.spikes.run_files import AUDIT, RunFiles, read_audit

    for name, least in (("iteration", 0), ("before", 0), ("top", 1)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"`--{name}` must be >= {least}, but is {getattr(arguments, name)} instead.")
    run, last = RunFiles(arguments.run_directory), arguments.iteration
    first, file = max(0, last - arguments.before), arguments.audit or run.path / AUDIT
    trained = read_audit(file, first - WINDOW, last) if arguments.audit or file.is_file() else {}
    found, manifest = rows_of(run, trained, first, last)
    found["curve"] = curve_of(run, trained, first, last)
    found["rows"] = [with_words(run, manifest, row, text=arguments.text) for row in found["rows"][: arguments.top]]
    words = dict.fromkeys(f"{row['component']}:{row['row']}" for row in found["rows"])
    found["command"] = shlex.join(["es-megatron", "skip", str(run.path), *words])
    if arguments.json:
        print_json(found)
    else:
        print(described(found, run))
    return 0


def rows_of(run: RunFiles, trained: dict[int, Trained], first: int, last: int) -> tuple[dict[str, Any], Manifest]:
    """Rows that iterations trained, or drew where no audit tells more, with what checkpoints know of them.

    Returns:
        `what` they are, `order` (by what), `checkpoints` before and after, and `rows`, those first that stand out most;
        and the blend that they are of.
    """
    from es_megatron.spikes.run_files import drawn_rows, history_at

    known = [(number, each) for number, each in trained.items() if number >= first] if last in trained else []
    what = f"rows trained in iterations {first} to {last}"
    if known:
        ids = np.concatenate([each.ids for _, each in known])
        loss = np.concatenate([each.loss for _, each in known]).astype(float)
        numbers = [number for number, each in known for _ in each.ids]
    else:
        ids = drawn_rows(run, last)
        loss, numbers = np.full(len(ids), np.nan), [last] * len(ids)
        what = f"rows drawn in iteration {last} (which of them were trained `run.audit=true` would have told)"
    around = dict(zip(("before", "after"), run.around(last), strict=True))
    manifest = run.manifest(around["before"] if around["after"] is None else around["after"])
    if ids.max() >= manifest.total:
        raise DataError(f"Iteration {last} must be of the blend of the checkpoints around it, but has other rows.")
    component, row = manifest.locate(ids)
    table: dict[str, list[Any]] = {
        "component": [manifest.components[each].name for each in component.tolist()],
        "row": row.tolist(),
        "iteration": numbers,
        "loss": loss.tolist(),
    }
    for when, checkpoint in around.items():
        if checkpoint is None:
            table |= {f"history {when}": [math.nan] * len(ids), f"visits {when}": [None] * len(ids)}
        else:
            score, visits = history_at(run.checkpoints[checkpoint], manifest, ids)
            table |= {f"history {when}": score.tolist(), f"visits {when}": visits.tolist()}
    order = next(
        (name for name in ("loss", "history after") if not all(map(math.isnan, table[name]))), "history before"
    )
    rows = [dict(zip(table, each, strict=True)) for each in zip(*table.values(), strict=True)]
    rows.sort(key=lambda each: math.inf if math.isnan(each[order]) else -each[order])
    names = {when: None if each is None else run.checkpoints[each].name for when, each in around.items()}
    return {"what": what, "order": order, "checkpoints": names, "rows": rows}, manifest


def curve_of(run: RunFiles, trained: dict[int, Trained], first: int, last: int) -> list[dict[str, Any]]:
    """Loss and gradient norm of the iterations from `first` on, beside the medians of what was before.

    Those of the audit; of the stretches of the metrics file where it does not tell losses.
    """
    from es_megatron.trainer.metrics_file import read_metrics

    points = [(number, number, mean_of_finite(each.loss), each.norm) for number, each in trained.items()]
    if all(math.isnan(point[2]) for point in points) and run.settings is not None:
        with suppress(DataError):  # not there
            points = [
                (
                    each.iteration - each.iterations,
                    each.iteration - 1,
                    known(each.lm_loss if each.chosen_loss is None else each.chosen_loss),
                    known(each.grad_norm),
                )
                for each in read_metrics(run.path).stretches
                if each.iteration - each.iterations <= last
            ]
    past = [point for point in points if point[1] < first][-WINDOW:]
    usual_loss, usual_norm = (median([point[at] for point in past]) for at in (2, 3))
    return [
        {
            "iterations": str(low) if low == high else f"{low}-{high}",
            "loss": loss,
            "x usual loss": loss / usual_loss if usual_loss else math.nan,
            "gradient norm": norm,
            "x usual norm": norm / usual_norm if usual_norm else math.nan,
        }
        for low, high, loss, norm in points
        if high >= first
    ]


def median(values: list[float]) -> float:
    """Of those that are known."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else math.nan


def known(value: float | None) -> float:
    """Nan for what is not known."""
    return math.nan if value is None else value


def with_words(run: RunFiles, manifest: Manifest, row: dict[str, Any], *, text: bool) -> dict[str, Any]:
    """A row with its documents and, if asked for, how it begins, where its files are there."""
    from es_megatron.frameworks.blend_file import read_blend_file, vocabulary
    from es_megatron.prepare.tokenizer import load_tokenizer, read_tokenizer
    from es_megatron.spikes.run_files import dataset_of

    dataset = dataset_of(manifest, row["component"])
    row["documents"] = None if dataset is None else dataset.documents_of(row["row"])
    if dataset is None or not text:
        return row
    tokens: list[int] = dataset.window(row["row"])[:SHOWN_TOKENS].tolist()
    row["text"] = f"tokens {' '.join(map(str, tokens))}"
    if run.settings is not None:
        blend = run.settings.data.blend
        try:
            path, _ = vocabulary(blend, read_blend_file(blend))
        except EsError:  # the blend file is gone
            return row
        if path is not None:
            model = load_tokenizer(read_tokenizer(path), str(path))
            row["text"] = repr(str(model.DecodeIds(tokens))[:SHOWN_LETTERS])
    return row


def described(found: dict[str, Any], run: RunFiles) -> str:
    """The findings as text."""
    from es_megatron.score_files.command import aligned

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return f"{value[0]}-{value[-1]}" if len(value) > 1 else str(value[0])
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.4g}"
        return "-" if value is None else str(value)

    def table(rows: list[dict[str, Any]]) -> list[str]:
        names = [name for name in rows[0] if name not in ("component", "text")]
        cells = [[shown(row[name]) for name in names] for row in rows]
        for cell, row in zip(cells, rows, strict=True):
            cell[0] = f"{row['component']}:{cell[0]}" if "component" in row else cell[0]
        lines = aligned([names, *cells]).split("\n")
        return [
            lines[0],
            *(
                f"{line}\n    {row['text']}" if "text" in row else line
                for line, row in zip(lines[1:], rows, strict=True)
            ),
        ]

    before, after = found["checkpoints"].values()
    lines = [*(table(found["curve"]) if found["curve"] else []), "", f"{found['what']}, by {found['order']}:"]
    lines += [
        *table(found["rows"]),
        "",
        "To leave them out of what is drawn from the next start on:",
        f"    {found['command']}",
    ]
    lines.append(f"The newest checkpoint before is {before or 'none'}, the oldest after {after or 'none'}.")
    if run.settings is not None and before is not None and after is not None:
        pointer = shlex.quote(str(run.path / "checkpoints" / "latest"))
        lines += ["To go back to the one before:", f"    echo {before} > {pointer}"]
    return "\n".join(lines)
