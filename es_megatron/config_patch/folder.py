"""Checks every config in a folder, and prints one table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from es_megatron.checks.config_report import Report, Wishes, examine
from es_megatron.config_files.launches import SCRIPT
from es_megatron.config_files.reading import Hints, read, read_text
from es_megatron.config_patch.writing import is_patched, patch
from es_megatron.errors import ConfigError, EsError

SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch", ".pbs", ".lsf", ".yaml", ".yml", ".json")
LARGEST = 1_000_000
"""Bytes; what is larger is data, not a config."""
VERDICTS = ("proposed", "patched", "refused", "not understood")


@dataclass(frozen=True)
class Row:
    """One config, as found."""

    name: str
    verdict: str
    """One of `VERDICTS`; empty for a file that is no config of a training run."""
    recognised: str
    """What it was read as; empty if it was not."""
    told: str
    """What is proposed, or why not."""


def configs_in(folder: Path) -> Iterator[Path]:
    """Files that may be configs, by name, hidden ones left out."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(names):
            path = Path(where) / name
            if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST:
                yield path


def row_of(path: Path, name: str, hints: Hints, wishes: Wishes) -> Row:
    """What is said of one file."""
    try:
        source = read(path, hints)
        report = examine(name, source, wishes)
        recognised = source.kind
        if is_patched(source):
            return Row(name, "refused" if report.refused else "patched", recognised, told_of(report))
        if not report.refused:
            patch(source, report.proposal.config)
        return Row(name, "refused" if report.refused else "proposed", recognised, told_of(report))
    except EsError as error:
        text = str(error).removeprefix(f"{path.name}: ")
        return Row(name, "not understood" if trains(path) else "", "", text)


def told_of(report: Report) -> str:
    """The plan of a report, or its reasons to refuse."""
    reasons = [f"{finding.what}: {finding.told}" for finding in report.findings if finding.blocks]
    return "; ".join(reasons) if reasons else report.proposal.lines()[0].removeprefix("plan: ")


def trains(path: Path) -> bool:
    """Whether a file that could not be read names a training script or the sizes of a run."""
    try:
        text = read_text(path)
    except ConfigError:
        return True
    if path.suffix == ".json":
        return re.search(r'"(train_batch_size|train_micro_batch_size_per_gpu|zero_optimization)"', text) is not None
    script = re.search(rf"\b{SCRIPT.pattern}", text) is not None and re.search(r"--[a-z]", text) is not None
    return (
        script or re.search(r"^\s*[\"']?(micro_batch_size|global_batch_size)[\"']?\s*:", text, re.MULTILINE) is not None
    )


def check_folder(folder: Path, hints: Hints, wishes: Wishes) -> tuple[str, bool]:
    """The table, and whether anything in it is refused or not understood.

    Raises:
        ConfigError: there is no file that may be a config.
    """
    rows = [row_of(path, str(path.relative_to(folder)), hints, wishes) for path in configs_in(folder)]
    if not rows:
        raise ConfigError(
            f"`{folder}` holds no config ({', '.join(SUFFIXES)}). Give the folder of your launch scripts."
        )
    configs = [row for row in rows if row.verdict]
    width = max((len(row.name) for row in configs), default=0)
    lines = [f"{row.verdict:<15} {row.recognised:<9} {row.name:<{width}}  {row.told}" for row in configs]
    counts = [f"{sum(row.verdict == each for row in configs)} {each}" for each in VERDICTS]
    counts.append(f"{len(rows) - len(configs)} others, in which no training run was found")
    return "\n".join([*lines, ", ".join(counts)]), any(row.verdict in VERDICTS[2:] for row in configs)
