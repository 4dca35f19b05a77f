"""Report on a run, finished or going on: what was selected, what it cost and saved, as an HTML page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es_megatron.checkpoint import disk
from es_megatron.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from es_megatron.report.analysis import Analysis
    from es_megatron.report.figures import Picture

FOLDER = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="`run.directory` of a run of the trainer")
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML file; default: RUN/report/report.html")


def run_report(arguments: argparse.Namespace) -> int:
    """Write the page, and its pictures as PNG files into RUN/report; returns 0."""
    from es_megatron.report.analysis import analyse  # imports torch
    from es_megatron.trainer.metrics_file import read_metrics

    directory: Path = arguments.run_directory
    analysis = analyse(read_metrics(directory))
    try:
        from es_megatron.report import page
        from es_megatron.report.figures import draw_run
    except ImportError as error:
        raise ConfigError(
            f"`es-megatron report` must find matplotlib and jinja2, but does not: {error}. "
            "Install `es_megatron[report]`."
        ) from error
    pictures, notes = draw_run(analysis), list(analysis.notes)
    at = next((n for n, picture in enumerate(pictures) if picture.name == "losses"), len(pictures) - 1) + 1
    pictures[at:at] = score_pictures(directory, analysis, notes)
    folder = directory / FOLDER
    output = arguments.output or folder / "report.html"
    figures: list[tuple[Picture, bytes]] = []
    for picture in pictures:
        png = page.png_of(picture)
        write(folder / f"{picture.name}.png", png)
        figures.append((picture, png))
    subtitle = f"{directory.resolve()}, after {analysis.iteration} of {analysis.plan['iterations']} iterations"
    facts = page.facts_of(analysis, read_summary(directory, notes))
    text = page.render(f"Evolved Sampling: {directory.resolve().name}", subtitle, facts, notes, figures)
    write(output, text.encode("utf-8"))
    print(f"{output}: {len(pictures)} figures ({folder}/*.png)")
    for note in notes:
        print(f"note: {note}")
    return 0


def score_pictures(directory: Path, analysis: Analysis, notes: list[str]) -> list[Picture]:
    """Figures of the newest complete checkpoint; says in `notes` why there are none."""
    from es_megatron.report.score_figures import draw_scores
    from es_megatron.score_files.files import ScoreFiles

    if analysis.plan["scorer"] is None:
        notes.append(f"Arm {analysis.plan['arm']} keeps no scores, so there are none to show.")
        return []
    if not (directory / "checkpoints" / "latest").is_file():
        notes.append("The scores are not known: there is no checkpoint yet (`run.save_interval` says when).")
        return []
    try:
        files = ScoreFiles(directory)
        if files.iteration is not None and files.iteration < analysis.iteration:
            notes.append(f"The scores are those of the newest checkpoint, after {files.iteration} iterations.")
        return draw_scores(files)
    except CheckpointError as error:
        notes.append(f"The scores are not shown, since the newest checkpoint cannot be read: {error}")
        return []


def read_summary(directory: Path, notes: list[str]) -> dict[str, Any] | None:
    """The summary of a run that has ended; None before."""
    try:
        return json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"summary.json cannot be read: {error}")
        return None


def write(path: Path, content: bytes) -> None:
    """Write a file in one move.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.replace_file(path, content)
    except OSError as error:
        raise ConfigError(
            f"`{path}` cannot be written ({error.strerror}). Name another file with `--output`, or free the folder."
        ) from error
