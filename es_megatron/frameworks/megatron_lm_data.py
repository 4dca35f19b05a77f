"""The training data a Megatron-LM run was given on its command line, as one-epoch components.

What a sample holds besides its tokens (masks, position ids, padding) is upstream's business and differs between its
versions, so upstream's own dataset makes it: a copy of it that is told which tokens to take. Which files, weights and
documents the training split has is computed here, since the length of the run depends on it long before upstream builds
its datasets, and compared with those once they are there.

Shapes: T sequence length.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.megatron_data import (
    OneEpochDataset,
    TokenFile,
    fingerprint_token_file,
    known_content,
    open_token_file,
)

Sample = dict[str, Tensor]


class DataPathEntry(NamedTuple):
    """One entry of `--data-path` or `--train-data-path`."""

    prefix: str
    weight: float | None


class SplitRows(OneEpochDataset):
    """One epoch of the training split of a component: windows of T + 1 tokens over its first documents."""

    def __init__(
        self, name: str, file: TokenFile, seq_length: int, sequences: int, vocab_size: int | None = None
    ) -> None:
        """Take an opened file and how many of its sequences (documents) the training split has.

        Raises:
            DataError: the split has fewer than T + 1 tokens.
        """
        super().__init__(name, file, seq_length, vocab_size)
        self.sequences = sequences
        """Sequences of the split, which are the first of the file."""
        ends = (
            *file.sequence_starts()[self.sequences : self.sequences + 1].tolist(),
            file.tokens * file.dtype.itemsize,
        )
        self._tokens = int(ends[0]) // file.dtype.itemsize
        if self._tokens <= seq_length:
            raise DataError(
                f"The training split of `{file.prefix}` must have at least {seq_length + 1} tokens, but has "
                f"{self._tokens} instead: give it more text, a larger first number in `--split`, or leave it out."
            )

    def __len__(self) -> int:
        """Return the number of rows: floor((tokens - 1) / T)."""
        return (self._tokens - 1) // self.seq_length

    def component(self, weight: float | None) -> Component:
        """This split as a component of a manifest; without a weight it is drawn by its size."""
        mark = fingerprint_token_file(self.file, self.seq_length)
        if self.sequences < self.file.sequences:
            mark = f"{mark}-{self.sequences}"
        drawn = float(len(self)) if weight is None else weight
        content = known_content(self.name, self.file, self.vocab_size)
        return Component(self.name, self.file.prefix, len(self), drawn, mark, content)


class Sources(NamedTuple):
    """The training data on a command line."""

    files: list[DataPathEntry]
    training_part: Callable[[int], int]
    """How many of a file's sequences are for training."""


def read_sources(args: Namespace) -> Sources:
    """Find the training files, their weights, and the part of each that is for training.

    Args:
        args: Megatron's.

    Raises:
        ConfigError: no files, or the same file twice.
    """
    from megatron.training.utils import get_blend_and_blend_per_split  # pyright: ignore[reportMissingImports]

    blend, per_split = get_blend_and_blend_per_split(args)
    chosen: Any = blend if blend is not None else (per_split or [None])[0]
    if chosen is None:
        raise ConfigError("`--data-path` or `--train-data-path` must be given with Evolved Sampling, but neither is.")
    share = 1.0 if blend is None else training_share(args.split)
    return Sources(weigh_sources(*chosen), lambda sequences: round(share * sequences))


def weigh_sources(prefixes: Sequence[str], weights: Sequence[float] | None) -> list[DataPathEntry]:
    """Pair files with their weights.

    Raises:
        ConfigError: the same file twice.
    """
    if len(set(prefixes)) < len(prefixes):
        twice = next(prefix for prefix in prefixes if prefixes.count(prefix) > 1)
        raise ConfigError(f"`{twice}` stands more than once in the data paths: add its weights up and give it once.")
    return [DataPathEntry(str(p), w) for p, w in zip(prefixes, weights or [None] * len(prefixes), strict=True)]


def training_share(split: str) -> float:
    """Share of the first number in `--split`, such as `969,30,1`.

    Raises:
        ConfigError: it is nothing.
    """
    parts = [float(part) for part in split.replace("/", ",").split(",")]
    if sum(parts) <= 0 or parts[0] <= 0:
        raise ConfigError(f"`--split` must give the training data a share above 0, but is {split!r} instead.")
    return parts[0] / sum(parts)


def name_sources(prefixes: Sequence[str]) -> list[str]:
    """Short unique names: the last part of each path, or the whole path where those are not unique."""
    short = [Path(prefix).name for prefix in prefixes]
    return [name if short.count(name) == 1 else prefix for name, prefix in zip(short, prefixes, strict=True)]


def open_rows(sources: Sources, seq_length: int, vocab_size: int | None = None) -> tuple[Manifest, list[SplitRows]]:
    """Open every training component.

    Raises:
        DataError: see `open_token_file`, `SplitRows` and `known_content`.
    """
    files = [open_token_file(source.prefix) for source in sources.files]
    rows = [
        SplitRows(name, file, seq_length, sources.training_part(file.sequences), vocab_size)
        for name, file in zip(name_sources([source.prefix for source in sources.files]), files, strict=True)
    ]
    components = [each.component(source.weight) for each, source in zip(rows, sources.files, strict=True)]
    return Manifest(tuple(components), seq_length), rows


class ComponentRows:
    """Training samples by id, from the rows of each component."""

    def __init__(self, manifest: Manifest, parts: Sequence[Any]) -> None:
        """Take what gives the samples of each component by row."""
        self._manifest, self._parts = manifest, tuple(parts)

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._manifest.total)

    def __getitem__(self, sample_id: int) -> Sample:
        """Read one sample."""
        components, rows = self._manifest.locate(np.asarray([sample_id], np.int64))
        return self._parts[int(components[0])][int(rows[0])]


def upstream_parts(dataset: Any) -> list[Any]:
    """The datasets of the components: of a blended dataset, or the only one.

    Raises:
        ConfigError: another kind of dataset.
    """
    parts: list[Any] = list(getattr(dataset, "datasets", [dataset]))
    for part in parts:
        if type(part).__name__ != "GPTDataset":
            raise ConfigError(
                f"Training data must be of upstream's `GPTDataset` with Evolved Sampling, but is of "
                f"`{type(part).__name__}` instead. Leave out the flag that chooses it, or run with --no-es."
            )
    return parts


def check_parts(ours: Sequence[tuple[Any, ...]], theirs: Sequence[tuple[Any, ...]]) -> None:
    """Compare the documents that we train on with upstream's.

    Raises:
        DataError: they differ.
    """
    if list(ours) != list(theirs):
        raise DataError(
            f"Upstream's training split (documents of each file) is {list(theirs)}, but {list(ours)} was expected. "
            "Give the files by `--data-path` with `--split`, or by `--train-data-path`."
        )


def make_samples(manifest: Manifest, rows: Sequence[SplitRows], dataset: Any) -> ComponentRows:
    """Check upstream's datasets against ours, and tell copies of them which tokens to take.

    Args:
        manifest: the components.
        rows: of each component.
        dataset: upstream's training dataset, `GPTDataset` or a `BlendedDataset` of those.

    Raises:
        ConfigError: another kind of dataset.
        DataError: upstream takes other files or documents than we do.
    """
    parts = upstream_parts(dataset)
    theirs = [(str(part.dataset_path), int(part.indices[0]), int(part.indices[-1]) + 1) for part in parts]
    check_parts([(each.file.prefix, 0, each.sequences) for each in rows], theirs)
    return ComponentRows(manifest, [take_rows(part, each) for part, each in zip(parts, rows, strict=True)])


def lengths_of(rows: OneEpochDataset, row: int) -> list[int]:
    """List how many of the T + 1 tokens of a row each of its sequences has, in order (GPT data: one a document)."""
    size, starts = rows.file.dtype.itemsize, rows.file.sequence_starts()
    first, last = (row * rows.seq_length * size, (row + 1) * rows.seq_length * size)
    low, high = np.searchsorted(starts, [first, last], "right")
    lengths = np.diff(np.append(starts[low:high], last + size), prepend=first) // size
    return lengths[lengths > 0].tolist()


class RowLookup:
    """Stands where upstream's dataset looks up the tokens of a sample."""

    def __init__(self, rows: SplitRows, answers: int, *, packed: bool = False) -> None:
        """Remember what upstream's own function returns.

        Args:
            rows: of the component.
            answers: how many things: tokens, documents and, since 0.19, how many tokens each document has.
            packed: whether those are looked at.
        """
        self._rows, self._answers, self._packed = rows, answers, packed

    def __call__(self, row: int) -> tuple[Any, ...]:
        """Tokens of a row, int64 [T + 1], and what else upstream expects beside them."""
        tokens: npt.NDArray[np.int64] = self._rows.window(row)
        lengths = lengths_of(self._rows, row) if self._packed else [len(tokens)]
        return (tokens, np.zeros(0, np.int64), lengths)[: self._answers]


def take_rows(dataset: Any, rows: SplitRows) -> Any:
    """Copy upstream's dataset; item r of the copy is made from row r."""
    view = copy.copy(dataset)
    answers = len(dataset._query_document_sample_shuffle_indices(0))
    packed = bool(getattr(dataset.config, "inter_document_masking", False))
    view._query_document_sample_shuffle_indices = RowLookup(rows, answers, packed=packed)
    # Older versions cache one mask and write into it where a label is the padding id: a sample would depend on those
    # read before it.
    view.masks_and_position_ids_are_cacheable = False
    return view


class UnreadLoader:
    """Stands in Megatron's training loop for a loader; samples come from a loader of our own."""

    def __init__(self, length: int = 1) -> None:
        """Be as long as the dataset whose place it takes."""
        self._length = length

    def __len__(self) -> int:
        """Return the length of the dataset."""
        return self._length

    def __iter__(self) -> UnreadLoader:
        """Be the iterator, too."""
        return self

    def __next__(self) -> Any:
        """Refuse to be read.

        Raises:
            ConfigError: always; something reads training data that the patches do not reach.
        """
        raise ConfigError(
            "Training data is read outside the forward-backward schedule, where Evolved Sampling cannot provide it. "
            "Leave out the flag that does so, or run with --no-es."
        )
