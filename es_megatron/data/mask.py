"""The samples that a pruned epoch keeps: one bit a sample, with rank and select.

Bits stand in blocks of 512. `before` counts the bits set before each block, and a hint for every 512th rank says in
which block it is, so that a query looks at two or three counts whatever the size. Blocks, counts and hints take 1.15
bits a sample together, in one buffer that the ranks of a node may share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]

BLOCK_WORDS = 8
BLOCK_BYTES = 8 * BLOCK_WORDS
BLOCK_BITS = 8 * BLOCK_BYTES
HINT_SHIFT = 9
PIECE = 1 << 15
"""Queries answered at a time, so that what they need in between stays in the cache."""
INDEX_BLOCKS = 1 << 16
"""Blocks counted at a time."""
AHEAD = np.arange(4)
"""Blocks looked at from the hint on: with every 512th rank hinted, a rank is nearly always in one of these."""


def bit_of_ranks() -> UInt8:
    """Place of the k-th set bit of each byte, uint8[256 * 8] at 8 * byte + k."""
    table = np.zeros((256, 8), dtype=np.uint8)
    for byte in range(256):
        places = [bit for bit in range(8) if byte >> bit & 1]
        table[byte, : len(places)] = places
    return table.reshape(-1)


BIT_OF_RANK = bit_of_ranks()
BYTES_1 = np.uint64(0x0101010101010101)
BYTES_80 = np.uint64(0x8080808080808080)
LANES_1 = np.uint64(0x0001000100010001)
LANES_80 = np.uint64(0x8000800080008000)


class MaskArrays(NamedTuple):
    """What a mask is made of."""

    words: UInt64
    """uint64[blocks, 8], little endian: bit k of word j says whether row 64 j + k is kept."""
    before: Int64
    """int64[blocks + 1]: rows kept before each block."""
    hints: UInt32
    """uint32[samples // 512 + 2]: block that holds rank 512 k; the last block from the number of kept rows on."""


def mask_bytes(samples: int) -> int:
    """Size of the buffer that holds a mask."""
    blocks = -(-samples // BLOCK_BITS)
    return blocks * BLOCK_BYTES + (blocks + 1) * 8 + ((samples >> HINT_SHIFT) + 2) * 4


def lay_out(buffer: UInt8, samples: int) -> MaskArrays:
    """Views of a buffer of `mask_bytes` bytes."""
    blocks = -(-samples // BLOCK_BITS)
    counts = blocks * BLOCK_BYTES
    hints = counts + (blocks + 1) * 8
    return MaskArrays(
        buffer[:counts].view("<u8").reshape(blocks, BLOCK_WORDS),
        buffer[counts:hints].view(np.int64),
        buffer[hints:].view(np.uint32),
    )


def fill_index(arrays: MaskArrays) -> None:
    """Count the bits of a mask whose words are written."""
    words, before, hints = arrays
    before[0] = 0
    for start in range(0, len(words), INDEX_BLOCKS):
        part = np.bitwise_count(words[start : start + INDEX_BLOCKS])
        np.cumsum(part.sum(axis=1, dtype=np.int64), out=before[start + 1 : start + 1 + len(part)])
        before[start + 1 : start + 1 + len(part)] += before[start]
    last = max(0, len(words) - 1)
    for start in range(0, len(hints), INDEX_BLOCKS):
        ranks = np.arange(start, min(start + INDEX_BLOCKS, len(hints)), dtype=np.int64) << HINT_SHIFT
        found = np.searchsorted(before, ranks, side="right") - 1
        hints[start : start + len(ranks)] = np.minimum(found, last)


class KeptMask:
    """Immutable set of kept rows of a component."""

    def __init__(self, packed: UInt8, samples: int) -> None:
        """Index the bits, which are copied.

        Args:
            packed: uint8[ceil(samples/8)], bit k of byte j says whether row 8j+k is kept (`numpy.packbits`, little).
            samples: rows of the component.
        """
        buffer = np.zeros(mask_bytes(samples), dtype=np.uint8)
        buffer[: len(packed)] = packed
        arrays = lay_out(buffer, samples)
        fill_index(arrays)
        self._take(arrays, samples)

    @classmethod
    def of_buffer(cls, buffer: UInt8, samples: int) -> KeptMask:
        """A mask in a buffer of `mask_bytes` bytes that `fill_index` has indexed; nothing is copied."""
        mask = cls.__new__(cls)
        mask._take(lay_out(buffer, samples), samples)
        return mask

    @classmethod
    def from_bool(cls, kept: Bool) -> KeptMask:
        """Pack a bool[samples]."""
        return cls(np.packbits(kept, bitorder="little"), len(kept))

    def _take(self, arrays: MaskArrays, samples: int) -> None:
        self.samples = samples
        self.arrays = arrays
        self.packed: UInt8 = arrays.words.reshape(-1).view(np.uint8)[: -(-samples // 8)]
        """Kept bits, as `__init__` takes them."""
        self.count = int(arrays.before[-1])
        """Rows kept."""

    def to_bool(self) -> Bool:
        """Unpack to bool[samples]."""
        return np.unpackbits(self.packed, bitorder="little", count=self.samples).astype(np.bool_)

    def contains(self, rows: Int64) -> Bool:
        """Whether each row is kept, bool like `rows`."""
        return (self.packed[rows >> 3] >> (rows & 7).astype(np.uint8) & 1).astype(np.bool_)

    def select(self, ranks: Int64) -> Int64:
        """Row of the k-th kept sample for each k.

        Args:
            ranks: int64[...], each in [0, count).

        Returns:
            int64 like `ranks`.
        """
        rows = ranks.reshape(-1).copy()
        for start in range(0, len(rows), PIECE):
            piece = rows[start : start + PIECE]
            select_of_many([self], np.asarray([len(piece)]), piece)
        return rows.reshape(ranks.shape)

    def find_blocks(self, ranks: Int64) -> Int64:
        """Block that holds each rank, int64[N], by halving what lies between two hints."""
        _, before, hints = self.arrays
        hint = ranks >> HINT_SHIFT
        low = hints.take(hint).astype(np.int64)
        width = hints.take(hint + 1).astype(np.int64) - low
        while (step := (width + 1) >> 1).any():
            ahead = before.take(low + step) <= ranks
            ahead &= step > 0
            low += np.where(ahead, step, 0)
            width = np.where(ahead, width - step, np.maximum(step - 1, 0))
        return low


def select_of_many(masks: Sequence[KeptMask | None], lengths: Int64, ranks: Int64) -> None:
    """Turn ranks into rows, in place, for many masks at once.

    A meta-batch of a blend with 1,000 components asks each mask for a handful: only the three reads are done mask by
    mask (hint, counts, words), the arithmetic in one go.

    Args:
        masks: G of them; None leaves its ranks as they are.
        lengths: int64[G], how many ranks belong to each, one after the other.
        ranks: int64[N], overwritten.
    """
    used = np.asarray([mask is not None for mask in masks], dtype=np.bool_)
    if not used.any():
        return
    at: slice | Int64 = slice(None) if used.all() else np.flatnonzero(np.repeat(used, lengths))
    rank = ranks[at].copy()
    held = [mask for mask in masks if mask is not None]
    ends = np.cumsum(lengths[used]).tolist()
    parts = [(mask, slice(start, end)) for mask, start, end in zip(held, [0, *ends], ends, strict=False)]
    low, hint = np.empty(len(rank), np.uint32), rank >> HINT_SHIFT
    for mask, part in parts:
        mask.arrays.hints.take(hint[part], out=low[part], mode="clip")
    block = low.astype(np.int64)
    ahead = block[:, None] + AHEAD
    before = np.empty((len(rank), len(AHEAD)), np.int64)
    for mask, part in parts:
        mask.arrays.before.take(ahead[part], out=before[part], mode="clip")  # past the end: all of them, so never <=
    steps = (before[:, 1:] <= rank[:, None]).sum(axis=1)
    block += steps
    rank -= before.reshape(-1).take(np.arange(len(rank)) * len(AHEAD) + steps)
    far = np.flatnonzero(steps == len(AHEAD) - 1)  # a stretch with hardly any kept rows: perhaps further on
    for mask, part in parts if len(far) else []:
        where = far[slice(*np.searchsorted(far, (part.start, part.stop)))]
        asked = ranks[at][where]
        block[where] = mask.find_blocks(asked)
        rank[where] = asked - mask.arrays.before.take(block[where])
    words = np.empty((len(rank), BLOCK_WORDS), np.uint64)
    for mask, part in parts:
        mask.arrays.words.take(block[part], axis=0, out=words[part], mode="clip")
    ranks[at] = block * BLOCK_BITS + select_in_blocks(words, rank)


def select_in_blocks(words: UInt64, ranks: Int64) -> Int64:
    """Place of the `rank`-th set bit of each block of 512.

    Args:
        words: uint64[N, 8].
        ranks: int64[N], each below the number of bits set.

    Returns:
        int64[N] in [0, 512).
    """
    # Prefix sums over four words at a time: a multiplication adds 16-bit lanes up, and they hold at most 256.
    sums = np.bitwise_count(words).astype("<u2").view("<u8") * LANES_1
    rank = ranks.astype(np.uint64)
    first_half = sums[:, 0] >> np.uint64(48)
    late = rank >= first_half
    rank -= np.where(late, first_half, np.uint64(0))
    upto = np.where(late, sums[:, 1], sums[:, 0])
    which = np.bitwise_count((((rank * LANES_1) | LANES_80) - upto) & LANES_80)  # lanes with a sum <= rank
    rank -= ((upto << np.uint64(16)) >> (which.astype(np.uint64) << np.uint64(4))) & np.uint64(0xFFFF)
    number = (which + np.where(late, np.uint8(4), np.uint8(0))).astype(np.int64)
    word = words.reshape(-1).take(np.arange(len(words)) * BLOCK_WORDS + number)
    return (number << 6) + select_bit(word, rank)


def select_bit(word: UInt64, rank: npt.NDArray[np.integer]) -> Int64:
    """Place of the `rank`-th set bit of each word, each rank below the number of its bits."""
    left = rank.astype(np.uint64)
    upto = np.bitwise_count(word.astype("<u8").view(np.uint8)).view("<u8") * BYTES_1  # prefix sums of bytes, <= 64
    which = np.bitwise_count((((left * BYTES_1) | BYTES_80) - upto) & BYTES_80).astype(np.uint64) << np.uint64(3)
    left -= ((upto << np.uint64(8)) >> which) & np.uint64(0xFF)
    byte = (word >> which) & np.uint64(0xFF)
    return which.astype(np.int64) + BIT_OF_RANK.take(((byte << np.uint64(3)) | left).astype(np.int64))
