"""Has a component only grown at its end? Its old fingerprint can be made again from the new files, if it has.

The fingerprint covers the whole old `.idx` file, the size of the `.bin` file and blocks of it. All of those are known
where the old file is the beginning of the new one, but for the number of documents at which it ended: only a few can
have given its number of rows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.data.manifest import Component
from es_megatron.errors import DataError
from es_megatron.frameworks.megatron_data import TokenFile, fingerprint, open_token_file

COUNTS_AT = 18
"""Bytes of an `.idx` file before its numbers of sequences and of document bounds: magic, version, token type."""


def appended_check(seq_length: int) -> Callable[[Component, Component], bool]:
    """A check of two components of one name, the older one first, at a sequence length in tokens."""

    def appended(before: Component, now: Component) -> bool:
        try:
            file = open_token_file(now.prefix)
        except DataError:
            return False
        return begins_with(file, before.samples, before.fingerprint, seq_length)

    return appended


def begins_with(file: TokenFile, rows: int, known: str, seq_length: int) -> bool:
    """Whether a file begins with the documents of an older one.

    Args:
        file: the new file.
        rows: rows of the old one.
        known: fingerprint of the old one.
        seq_length: tokens of a row.
    """
    bounds = file.document_bounds()
    starts = file.sequence_starts()
    size = file.dtype.itemsize
    first = np.searchsorted(starts, (rows * seq_length + 1) * size)
    last = np.searchsorted(starts, (rows * seq_length + seq_length) * size, side="right")
    for document in range(int(np.searchsorted(bounds, first)), len(bounds)):
        sequences = int(bounds[document])
        if sequences > last or sequences >= file.sequences:
            break
        if _fingerprint_of_first(file, document, sequences, int(starts[sequences]), seq_length) == known:
            return True
    return False


def _fingerprint_of_first(file: TokenFile, documents: int, sequences: int, size: int, seq_length: int) -> str:
    """The fingerprint of a file of the first documents alone, `size` bytes of tokens."""
    with file.idx_path.open("rb") as index:
        head = index.read(COUNTS_AT) + struct.pack("<QQ", sequences, documents + 1)
    lengths = np.memmap(file.idx_path, np.int32, "r", offset=COUNTS_AT + 16, shape=(file.sequences,))
    parts: tuple[npt.NDArray[Any], ...] = (
        lengths[:sequences],
        file.sequence_starts()[:sequences],
        file.document_bounds()[: documents + 1],
    )
    return fingerprint([head, *(part.data for part in parts)], file.bin_path, size, seq_length)
