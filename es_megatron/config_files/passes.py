"""How often a run goes through its data: told, or counted from the data files where they are at hand."""

from __future__ import annotations

from dataclasses import dataclass

from es_megatron.config_files.existing_run import ExistingRun
from es_megatron.config_files.shell.traced import unknowns
from es_megatron.errors import DataError


@dataclass(frozen=True)
class Passes:
    """Passes over the data, and where the number is from."""

    count: float
    source: str


def passes_of(run: ExistingRun, told: float | None) -> Passes:
    """Passes that a run makes over its data.

    Args:
        run: the existing run.
        told: what the user gave, which wins.
    """
    if told is not None:
        return Passes(told, "as told")
    drawn, rows = drawn_samples(run), data_rows(run)
    if drawn is None or rows is None or rows < 1:
        return Passes(1.0, "assumed: give `--passes N`")
    return Passes(float(f"{drawn / rows:.3g}"), "counted from the data files")


def drawn_samples(run: ExistingRun) -> int | None:
    """Samples that the run draws; None if not known."""
    samples, iterations = run.samples, run.number("train_iters")
    if samples is not None:
        return samples
    return None if iterations is None or run.meta_batch is None else iterations * run.meta_batch


def data_rows(run: ExistingRun) -> int | None:
    """Training samples in the files of `--data-path` or `--train-data-path`; None if they are not at hand."""
    from es_megatron.frameworks.megatron_data import open_token_file

    name = "train_data_path" if run.on("train_data_path") else "data_path"
    prefixes = [value for value in run.options.get(name, ()) if not _is_number(value)]
    length = run.number("seq_length")
    if not prefixes or length is None or length < 1 or any(unknowns(prefix) for prefix in prefixes):
        return None
    try:
        rows = sum((open_token_file(prefix).tokens - 1) // length for prefix in prefixes)
    except (DataError, OSError):
        return None
    return round(rows * (training_share(run.value("split")) if name == "data_path" else 1.0))


def training_share(split: str | None) -> float:
    """Training share of `--split 949,50,1`; 1 without it, or where it cannot be read."""
    parts = [part.strip(" '\"") for part in (split or "").replace("/", ",").split(",")]
    if not all(_is_number(part) for part in parts):
        return 1.0
    numbers = [float(part) for part in parts]
    return numbers[0] / sum(numbers) if sum(numbers) > 0 else 1.0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
