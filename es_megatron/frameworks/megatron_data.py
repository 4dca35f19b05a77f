"""Megatron's tokenised files (`.bin` and `.idx`) as one epoch of stable rows, and the blend that a run reads.

Upstream's GPTDataset shuffles the documents of all epochs together before it packs them, so the sequence behind an
index depends on how long the run is. Here row r of a component is the window of T + 1 tokens that starts at token r * T
of the `.bin` file: a pure function of the file and of T, found without any index or cache file, and equal in every
process. Epochs, shuffling and pruning are the business of `es_megatron.data`.

The file format is upstream's (`megatron.core.datasets.indexed_dataset`), read here with numpy alone: opening is checked
(upstream asserts, or reads a truncated file as it is), and data loader workers need not import megatron.

Shapes: T sequence length, S sequences and D documents of a file.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.blend_file import read_blend_file, vocabulary
from es_megatron.frameworks.token_hash import check_ids, read_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

Sample = dict[str, torch.Tensor]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_REBUILD = "prepare or copy the component again (`es-megatron prepare`)"
_BLOCK = 1 << 20  # sequences checked at once: an index may hold 10^9
_PROBES = 16
_PROBE_BYTES = 4096


@dataclass(frozen=True)
class TokenFile:
    """What the `.idx` file says about a component, checked against the sizes of both files."""

    prefix: str
    """Path of the two files without `.bin` and `.idx`."""

    dtype: np.dtype[Any]
    """Type of a token in the `.bin` file."""

    sequences: int
    """Number S of sequences (with GPT data one per document)."""

    documents: int
    """Number D of documents."""

    tokens: int
    """Number of tokens in the `.bin` file."""

    @property
    def bin_path(self) -> Path:
        """The file of tokens."""
        return Path(f"{self.prefix}.bin")

    @property
    def idx_path(self) -> Path:
        """The file of lengths, offsets and document boundaries."""
        return Path(f"{self.prefix}.idx")

    def sequence_starts(self) -> NDArray[np.int64]:
        """Byte offset of every sequence, int64 [S], mapped from the file."""
        offset = _HEADER.size + 4 * self.sequences
        return np.memmap(self.idx_path, np.int64, "r", offset=offset, shape=(self.sequences,))

    def document_bounds(self) -> NDArray[np.int64]:
        """First sequence of every document and the end, int64 [D + 1], mapped from the file."""
        offset = _HEADER.size + 12 * self.sequences
        return np.memmap(self.idx_path, np.int64, "r", offset=offset, shape=(self.documents + 1,))


def open_token_file(prefix: str | Path) -> TokenFile:
    """Read the header of `prefix.idx` and checks both files.

    Raises:
        DataError: A file is missing, truncated, too long, of another format, or its sequences do not follow each other.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(f"`{path}` does not exist: {_REBUILD}, or correct the prefix in the blend file.")
    size = idx_path.stat().st_size
    with idx_path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or head[: len(_MAGIC)] != _MAGIC:
        raise DataError(f"`{idx_path}` must be a Megatron index (MMIDIDX), but is not one or is cut short: {_REBUILD}.")
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"`{idx_path}` must have version 1 and an integer token type, but has version {version} and type code "
            f"{code} instead: {_REBUILD}."
        )
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if size == expected + sequences and sequences:
        raise DataError(f"`{idx_path}` is a multimodal index: only text components can be trained on here.")
    if size != expected or bounds < 1:
        raise DataError(f"`{idx_path}` must have {expected} bytes by its header, but has {size} instead: {_REBUILD}.")
    dtype = np.dtype(_DTYPES[code])
    found = TokenFile(str(prefix), dtype, sequences, bounds - 1, bin_path.stat().st_size // dtype.itemsize)
    _check_contents(found)
    return found


def _check_contents(file: TokenFile) -> None:
    """Check that the sequences of the index fill the `.bin` file without a gap, from first byte to last."""
    if file.sequences == 0:
        raise DataError(f"`{file.bin_path}` has no document: leave the component out of the blend, or {_REBUILD}.")
    lengths_S = np.memmap(file.idx_path, np.int32, "r", offset=_HEADER.size, shape=(file.sequences,))
    starts_S = file.sequence_starts()
    end = 0
    for low in range(0, file.sequences, _BLOCK):
        bytes_b = lengths_S[low : low + _BLOCK].astype(np.int64) * file.dtype.itemsize
        ends_b = end + np.cumsum(bytes_b)
        if bytes_b.min() < 0:
            least = f"`{file.idx_path}` has a sequence of {lengths_S[low + int(bytes_b.argmin())]} tokens."
            raise DataError(f"{least} Documents must have fewer than 2^31: cut longer ones, and {_REBUILD}.")
        if not np.array_equal(starts_S[low : low + _BLOCK], ends_b - bytes_b):
            raise DataError(f"`{file.idx_path}` is damaged: its sequences do not follow each other. Cure: {_REBUILD}.")
        end = int(ends_b[-1])
    size = file.bin_path.stat().st_size
    if size != end:
        what = "truncated" if size < end else "longer than its index"
        raise DataError(
            f"`{file.bin_path}` is {what}: it must have {end} bytes by `{file.idx_path}`, but has {size} instead: "
            f"{_REBUILD}."
        )
    bounds = file.document_bounds()
    if bounds[0] != 0 or bounds[-1] != file.sequences:
        raise DataError(f"`{file.idx_path}` is damaged: its documents do not cover its sequences. Cure: {_REBUILD}.")


def fingerprint_token_file(file: TokenFile, seq_length: int) -> str:
    """Tell a changed component apart from the same one: 32 hexadecimal digits.

    Covers the whole `.idx` file, the size of the `.bin` file, 16 blocks of 4 KiB spread evenly over it, and the
    sequence length; not the path, so that a moved component stays the same one. The `.bin` file is not read in full: a
    change of single tokens between those blocks goes unseen.
    """
    with file.idx_path.open("rb") as index:
        return fingerprint(
            iter(lambda: index.read(1 << 20), b""), file.bin_path, file.bin_path.stat().st_size, seq_length
        )


def fingerprint(index: Iterable[bytes | memoryview], bin_path: Path, size: int, seq_length: int) -> str:
    """The fingerprint of an index, piece by piece, and the first `size` bytes of its tokens."""
    digest = hashlib.blake2b(digest_size=16, person=b"es-packing-1")
    for piece in index:
        digest.update(piece)
    digest.update(struct.pack("<QQ", size, seq_length))
    last = max(size - _PROBE_BYTES, 0)
    with bin_path.open("rb") as tokens:
        for probe in range(_PROBES):
            tokens.seek(last * probe // (_PROBES - 1))
            digest.update(tokens.read(min(_PROBE_BYTES, size)))
    return digest.hexdigest()


class OneEpochDataset(Dataset[Sample]):
    """One epoch of a component: row r holds tokens r*T .. r*T + T of its file, in file order.

    Every token but the first is a label once and every token but the last an input once; fewer than T tokens at the end
    of the file belong to no row. Picklable: workers open the file again.
    """

    def __init__(self, name: str, file: TokenFile, seq_length: int, vocab_size: int | None = None) -> None:
        """Take an opened file.

        Args:
            name: Name of the component, for messages.
            file: From `open_token_file`.
            seq_length: T, in tokens.
            vocab_size: Token ids must be below it; checked in every row that is read. None: not checked.

        Raises:
            ConfigError: `seq_length` is not positive.
            DataError: The component has fewer than T + 1 tokens.
        """
        if seq_length < 1:
            raise ConfigError(f"`seq_length` must be at least 1, but is {seq_length} instead.")
        if file.tokens <= seq_length:
            raise DataError(
                f"Component `{name}` must have at least `seq_length` + 1 = {seq_length + 1} tokens, but "
                f"`{file.bin_path}` has {file.tokens} instead: give it more text (for validation data a larger "
                f"`--validation-share`), shorten `seq_length`, or leave it out of the blend."
            )
        self.name = name
        self.file = file
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file out."""
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        """Close the file."""
        descriptor = self.__dict__.get("_descriptor")  # absent if the constructor has refused
        if descriptor is not None:
            os.close(descriptor)

    def __len__(self) -> int:
        """Return the number of rows: floor((tokens - 1) / T)."""
        return (self.file.tokens - 1) // self.seq_length

    def window(self, row: int) -> NDArray[np.int64]:
        """Read the tokens of a row, int64 [T + 1]: the inputs and one more.

        Raises:
            IndexError: `row` is not in [0, len).
            DataError: A token is not in the vocabulary, or the file can no longer be read.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"`row` must be in [0, {len(self)}) for component `{self.name}`, but is {row} instead.")
        tokens = self._read(row * self.seq_length, self.seq_length + 1)
        if self.vocab_size is not None and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            raise DataError(
                f"Token ids of component `{self.name}` must be in [0, {self.vocab_size}), but row {row} has "
                f"{tokens.min()} .. {tokens.max()} instead: the file was made with another tokenizer, or is damaged. "
                f"Correct the tokenizer of the blend file, or {_REBUILD}."
            )
        return tokens

    def _read(self, start: int, count: int) -> NDArray[np.int64]:
        """Read tokens of the file.

        Not a memory map: page faults read neighbours that nobody asked for, and one past the end of a file that was cut
        meanwhile kills the process. `pread` has no position, so forked processes may share the descriptor.
        """
        size = self.file.dtype.itemsize
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.file.bin_path, os.O_RDONLY)
            content = os.pread(self._descriptor, count * size, start * size)
        except OSError as error:
            raise DataError(
                f"`{self.file.bin_path}` cannot be read ({error}): check the disk and the mount."
            ) from error
        if len(content) < count * size:
            raise DataError(f"`{self.file.bin_path}` has become shorter since it was opened: {_REBUILD}.")
        return np.frombuffer(content, self.file.dtype).astype(np.int64)

    def __getitem__(self, row: int) -> Sample:
        """Return `tokens` and `labels` (int64 [T]), `loss_mask` (float32 [T], ones), `position_ids` (int64 [T])."""
        window = torch.from_numpy(self.window(int(row)))
        return {
            "tokens": window[:-1].clone(),
            "labels": window[1:].clone(),
            "loss_mask": torch.ones(self.seq_length, dtype=torch.float32),
            "position_ids": torch.arange(self.seq_length, dtype=torch.int64),
        }

    def documents_of(self, row: int) -> list[int]:
        """List the documents that the T + 1 tokens of a row come from, ascending."""
        if not 0 <= row < len(self):
            raise IndexError(f"`row` must be in [0, {len(self)}) for component `{self.name}`, but is {row} instead.")
        first = row * self.seq_length * self.file.dtype.itemsize
        last = first + self.seq_length * self.file.dtype.itemsize
        # "right" - 1 is the sequence that holds the byte: empty sequences share their start with the next one.
        held = np.searchsorted(self.file.sequence_starts(), np.asarray([first, last], np.int64), "right") - 1
        low, high = np.searchsorted(self.file.document_bounds(), held, "right") - 1
        return list(range(int(low), int(high) + 1))


def open_component(
    name: str, prefix: str | Path, seq_length: int, weight: float | None = None, vocab_size: int | None = None
) -> tuple[Component, OneEpochDataset]:
    """Open one component of a blend.

    Args:
        name: Name of the component.
        prefix: Path of its `.bin` and `.idx` without the suffix.
        seq_length: T, in tokens.
        weight: Its share of the draws, relative to the other components; None: its number of rows.
        vocab_size: See `OneEpochDataset`.

    Raises:
        DataError: See `open_token_file`, `OneEpochDataset` and `known_content`.
    """
    file = open_token_file(prefix)
    dataset = OneEpochDataset(name, file, seq_length, vocab_size)
    fingerprint = fingerprint_token_file(file, seq_length)
    rows, content = len(dataset), known_content(name, file, vocab_size)
    return Component(name, str(prefix), rows, float(rows if weight is None else weight), fingerprint, content), dataset


def known_content(name: str, file: TokenFile, vocab_size: int | None) -> str:
    """The hash of a `.bin` file that is kept beside it, empty if there is none.

    Raises:
        DataError: By the hash, a file has another size, or the component has ids outside the vocabulary.
    """
    known = read_hash(file)
    if known is None:
        return ""
    check_ids(name, file, known, vocab_size)
    return known.bin


class BlendedRows(Dataset[Sample]):
    """The rows of all components behind one index: a sample id of the manifest, or (component, row)."""

    def __init__(self, manifest: Manifest, datasets: Sequence[OneEpochDataset]) -> None:
        """Take the datasets in the order of the manifest's components."""
        self.manifest = manifest
        self.datasets = tuple(datasets)

    def __len__(self) -> int:
        """Return the number of samples of the blend."""
        return int(self.manifest.total)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Return the sample of an id, or of a component and its row."""
        if isinstance(key, tuple):
            component, row = key
        else:
            components, rows = self.manifest.locate(np.asarray([key], np.int64))
            component, row = int(components[0]), int(rows[0])
        return self.datasets[component][row]


@dataclass(frozen=True)
class LoadedBlend:
    """A blend file with all its components opened."""

    path: Path
    """The blend file."""

    manifest: Manifest
    """The training components."""

    datasets: tuple[OneEpochDataset, ...]
    """One per training component, in the order of the manifest."""

    validation: dict[str, OneEpochDataset]
    """By name of the component; components without validation data are left out."""

    tokenizer: Path | None
    """The sentencepiece model; None if the blend file gives `vocab_size` alone."""

    vocab_size: int
    """Number of token ids."""

    @property
    def rows(self) -> BlendedRows:
        """All training rows behind one index."""
        return BlendedRows(self.manifest, self.datasets)


def load_blend(path: str | Path, seq_length: int) -> LoadedBlend:
    """Open every component of a blend file.

    The file is YAML: `tokenizer` (a sentencepiece model) and/or `vocab_size`, and `components`, each with `name`,
    `train`, and optionally `validation` and `weight`. Paths are relative to the file, weights all given or all left out
    (then components are drawn by their sizes).

    Raises:
        ConfigError: The blend file does not say what it must.
        DataError: The blend file or a data file is missing or damaged, or a component is shorter than one sequence.
    """
    path = Path(path)
    blend = read_blend_file(path)
    tokenizer, vocab_size = vocabulary(path, blend)
    components: list[Component] = []
    datasets: list[OneEpochDataset] = []
    validation: dict[str, OneEpochDataset] = {}
    for entry in blend.components:
        component, dataset = open_component(entry.name, path.parent / entry.train, seq_length, entry.weight, vocab_size)
        components.append(component)
        datasets.append(dataset)
        if entry.validation is not None:
            file, name = open_token_file(path.parent / entry.validation), f"{entry.name} (validation)"
            known_content(name, file, vocab_size)
            validation[entry.name] = OneEpochDataset(name, file, seq_length, vocab_size)
    manifest = Manifest(tuple(components), seq_length)
    return LoadedBlend(path, manifest, tuple(datasets), validation, tokenizer, vocab_size)
