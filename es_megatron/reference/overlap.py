"""Documents that a reference trains on and that the run is validated with: they would flatter a choice by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.frameworks.blend_file import read_blend_file
from es_megatron.frameworks.megatron_data import TokenFile, open_token_file

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

FIRST = 8
"""Tokens at the beginning of a document that its key is made of, with its length."""
BLOCK = 1 << 20
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def held_out_and_trained(blend: Path, trained: Path) -> dict[str, tuple[int, int]]:
    """Which validation documents of a blend stand, token for token, in the training data of another.

    Args:
        blend: blend file whose validation files are looked at.
        trained: blend file whose training files they are looked for in.

    Returns:
        By component of the blend that shares any: how many of its validation documents, and of how many.
    """
    files = [open_token_file(trained.parent / entry.train) for entry in read_blend_file(trained).components]
    found: dict[str, tuple[int, int]] = {}
    for entry in read_blend_file(blend).components:
        if entry.validation is None:
            continue
        held_out = open_token_file(blend.parent / entry.validation)
        shared = len(set[int]().union(*(shared_documents(held_out, each) for each in files)))
        if shared:
            found[entry.name] = (shared, held_out.sequences)
    return found


def shared_documents(held_out: TokenFile, trained: TokenFile) -> set[int]:
    """Numbers of the documents of one file that stand in another one, too.

    Reads the first tokens of every document, and the whole of those that may be the same.
    """
    held_out_tokens, held_out_bounds = _tokens(held_out), _bounds(held_out)
    trained_tokens, trained_bounds = _tokens(trained), _bounds(trained)
    wanted: dict[int, list[int]] = {}
    for first, keys in _keys(held_out):
        for number, key in enumerate(keys.tolist(), first):
            wanted.setdefault(key, []).append(number)
    looked_for = np.fromiter(wanted, np.uint64, len(wanted))
    found: set[int] = set()
    for first, keys in _keys(trained):
        for at in np.flatnonzero(np.isin(keys, looked_for)).tolist():
            document = trained_tokens[trained_bounds[first + at] : trained_bounds[first + at + 1]]
            for number in wanted[int(keys[at])]:
                low, high = held_out_bounds[number : number + 2]
                if number not in found and np.array_equal(held_out_tokens[low:high], document):
                    found.add(number)
    return found


def _tokens(file: TokenFile) -> npt.NDArray[Any]:
    return np.memmap(file.bin_path, file.dtype, "r", shape=(file.tokens,))


def _bounds(file: TokenFile) -> Int64:
    """First token of every document, and the end, int64[S + 1]."""
    return np.append(file.sequence_starts() // file.dtype.itemsize, file.tokens)


def _keys(file: TokenFile) -> Iterator[tuple[int, UInt64]]:
    """Number of a block's first document, and a key of each, uint64[N]: of its length and first tokens."""
    bounds, tokens = _bounds(file), _tokens(file)
    for first in range(0, file.sequences, BLOCK):
        low, high = bounds[first : min(first + BLOCK, file.sequences)], bounds[first + 1 : first + 1 + BLOCK]
        key = (high - low).astype(np.uint64)
        for place in range(FIRST):
            at = np.minimum(low + place, np.maximum(high - 1, 0))
            key = (key ^ tokens[at].astype(np.uint64)) * MULTIPLIER
            key ^= key >> np.uint64(29)
        yield first, key
