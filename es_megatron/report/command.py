"""Report on a run, finished or going on: was it worth it, what was selected, what it cost, as an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from es_megatron.checkpoint import disk
from es_megatron.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from es_megatron.report.analysis import Analysis
    from es_megatron.report.control import Side
    from es_megatron.report.drawing import Picture

FOLDER = "report"
REFERENCE = "evolved_sampling.reference.folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="`run.directory` of a run of the trainer")
    parser.add_argument(
        "--control", type=Path, metavar="RUN", help="run to compare with, laid over: plain, or uniform of the same cost"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML file; default: RUN/report/report.html")


def run_report(arguments: argparse.Namespace) -> int:
    """Write the page, and its pictures as PNG files into RUN/report; returns 0."""
    from es_megatron.report.control import headline, read_side  # imports torch

    directory: Path = arguments.run_directory
    run = read_side(directory)
    control = None if arguments.control is None else read_side(arguments.control)
    try:
        from es_megatron.report import page
        from es_megatron.report.drawing import NARROW, WIDE
        from es_megatron.report.figures import draw_run
    except ImportError as error:
        raise ConfigError(
            f"`es-megatron report` must find matplotlib and jinja2, but does not: {error}. "
            "Install `es_megatron[report]`."
        ) from error
    told, notes = headline(run, control), notes_of(run, control)
    pictures = [*draw_run(run, control), *score_pictures(directory, run.analysis, notes)]
    folder = directory / FOLDER
    output = arguments.output or folder / "report.html"
    shown = [page.Shown(each, page.png_of(each, WIDE), page.png_of(each, NARROW)) for each in pictures]
    for each in shown:
        write(folder / f"{each.picture.name}.png", each.wide)
    subtitle = (
        f"{directory.resolve()}, after {run.analysis.iteration:,} of {run.analysis.plan['iterations']:,} iterations"
    )
    title = f"Evolved Sampling: {run.name}"
    text = page.render(page.Page(title, subtitle, told, page.facts_of(run, control), notes, shown))
    write(output, text.encode("utf-8"))
    print(f"{output}: {len(pictures)} figures ({folder}/*.png)")
    print("\n".join((told.answer, *told.lines)))
    for note in notes:
        print(f"note: {note}")
    return 0


def notes_of(run: Side, control: Side | None) -> list[str]:
    """What a reader must know about the metrics of both runs."""
    notes = [*run.analysis.notes, *run.notes]
    if run.settings.get(REFERENCE):
        notes.append("What the reference losses cost (`es-megatron reference`) is not counted.")
    if control is not None:
        notes += [f"Control: {note}" for note in (*control.analysis.notes, *control.notes)]
    return notes


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
