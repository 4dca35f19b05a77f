"""The samples that a pruned epoch keeps: one bit a sample, with rank and select."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

BLOCK_BYTES = 64


class KeptMask:
    """Immutable set of kept rows of a component."""

    def __init__(self, packed: UInt8, samples: int) -> None:
        """Index the bits.

        Args:
            packed: uint8[ceil(samples/8)], bit k of byte j says whether row 8j+k is kept (`numpy.packbits`, little).
            samples: rows of the component.
        """
        self.samples = samples
        self.packed = packed
        whole = np.zeros(-(-len(packed) // BLOCK_BYTES) * BLOCK_BYTES, dtype=np.uint8)
        whole[: len(packed)] = packed
        self._words = whole.view("<u8").astype(np.uint64, copy=False).reshape(-1, BLOCK_BYTES // 8)
        per_block = np.bitwise_count(self._words).sum(axis=1, dtype=np.int64)
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_block)])

    @classmethod
    def from_bool(cls, kept: Bool) -> KeptMask:
        """Pack a bool[samples]."""
        return cls(np.packbits(kept, bitorder="little"), len(kept))

    @property
    def count(self) -> int:
        """Rows kept."""
        return int(self._before[-1])

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
        flat = ranks.reshape(-1)
        block = np.searchsorted(self._before, flat, side="right") - 1
        left = flat - self._before[block]
        words = self._words[block]
        upto = np.cumsum(np.bitwise_count(words), axis=1, dtype=np.int64)
        which = (upto <= left[:, None]).sum(axis=1)
        element = np.arange(len(flat))
        word = words[element, which]
        left -= np.where(which > 0, upto[element, which - 1], 0)
        bit = select_bit(word, left)
        return (block * (BLOCK_BYTES * 8) + which * 64 + bit).reshape(ranks.shape)


def select_bit(word: npt.NDArray[np.uint64], rank: Int64) -> Int64:
    """Place of the `rank`-th set bit of each word, by halving."""
    place = np.zeros(len(word), dtype=np.int64)
    for width in (32, 16, 8, 4, 2, 1):
        low = (word >> place.astype(np.uint64)) & np.uint64((1 << width) - 1)
        count = np.bitwise_count(low).astype(np.int64)
        skip = rank >= count
        rank = np.where(skip, rank - count, rank)
        place = np.where(skip, place + width, place)
    return place
