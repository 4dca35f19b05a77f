"""The exact m-th smallest race key across ranks, without gathering keys.

Positive doubles sort like their bit patterns, so a key is handled as a uint64. One blockwise pass over the scores makes
every key once: a sampled bracket, the same on all ranks, tells most keys from the threshold at sight, and only the few
inside the bracket are kept. A radix search over their bits, one all-reduced histogram per 16 bits, then finds the
threshold exactly. A bracket that missed is widened and the pass repeated; it never changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from es_megatron.rank_grid import RankGrid

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
UInt64 = npt.NDArray[np.uint64]
Places = npt.NDArray[np.unsignedinteger]

RADIX_BITS = 16
FEWEST_SAMPLES, MOST_SAMPLES = 1 << 14, 1 << 18
BRACKET_SIGMAS = 6.0
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)

Blocks = Callable[[], Iterable[Float64]]
"""Makes the race keys of this rank's samples in order of id, block by block; may be called again."""


def sample_count(total: int) -> int:
    """How many keys to sample of `total`: the bracket then holds 1% of a large component, and costs little memory."""
    return min(total, max(FEWEST_SAMPLES, min(MOST_SAMPLES, total // 256)))


def find_bracket(sample: Float64, share: float) -> tuple[np.uint64, np.uint64]:
    """Bits between which the quantile `share` of the keys lies, almost surely.

    Args:
        sample: float64[...], a sample of the keys of all ranks.
        share: quantile in [0, 1].

    Returns:
        Inclusive bounds.
    """
    if len(sample) == 0:
        return np.uint64(0), ALL
    ordered = np.sort(sample).view(np.uint64)
    margin = BRACKET_SIGMAS * np.sqrt(len(sample) * share * (1 - share)) + 2
    low, high = int(share * len(sample) - margin), int(share * len(sample) + margin)
    return (
        ordered[low] if low >= 0 else np.uint64(0),
        ordered[high] if high < len(ordered) else ALL,
    )


def split_by_bracket(
    blocks: Iterable[Float64], low: np.uint64, high: np.uint64, kept: UInt8, lead: int
) -> tuple[int, Places, UInt64]:
    """One pass: mark what is surely kept, put aside what lies in the bracket.

    Args:
        blocks: race keys, in order.
        low: lower bound of the bracket, inclusive.
        high: upper bound, inclusive.
        kept: uint8[ceil((lead + local)/8)], overwritten: packed bits, 1 below the bracket.
        lead: bits before the first key's.

    Returns:
        How many lie below; the bits of those that lie inside; their keys.
    """
    at, below = lead, 0
    kind = np.uint32 if 8 * len(kept) <= 1 << 32 else np.uint64
    places: list[Places] = [np.zeros(0, kind)]
    inside: list[UInt64] = [np.zeros(0, np.uint64)]
    kept[:] = 0
    for block in blocks:
        bits = block.view(np.uint64)
        under = bits < low
        below += int(np.count_nonzero(under))
        packed = np.packbits(np.concatenate([np.zeros(at % 8, np.bool_), under]), bitorder="little")
        kept[at // 8 : at // 8 + len(packed)] |= packed
        within = bits <= high
        within ^= under
        found = np.flatnonzero(within)
        inside.append(bits[found])
        places.append((found + at).astype(kind))
        at += len(bits)
    return below, np.concatenate(places), np.concatenate(inside)


def radix_select(bits: UInt64, rank: int, grid: RankGrid) -> tuple[np.uint64, int]:
    """The `rank`-th smallest (from 0) of all ranks' values, and how many are below it."""
    prefix, below = 0, 0
    active = bits
    for shift in range(64 - RADIX_BITS, -1, -RADIX_BITS):
        digit = (active >> np.uint64(shift)) & np.uint64((1 << RADIX_BITS) - 1)
        upto = np.cumsum(grid.sum_over_dp(np.bincount(digit.astype(np.int64), minlength=1 << RADIX_BITS)))
        found = int(np.searchsorted(upto, rank - below, side="right"))
        below += int(upto[found - 1]) if found else 0
        prefix = prefix << RADIX_BITS | found
        active = active[digit == found]
    return np.uint64(prefix), below


def mark_kept(
    make_blocks: Blocks, local: int, total: int, count: int, sample: Float64, grid: RankGrid, lead: int = 0
) -> UInt8:
    """Keep the `count` smallest keys of all data-parallel ranks; ties go to the lower id.

    Args:
        make_blocks: race keys of this rank's samples in order of id.
        local: how many this rank has.
        total: how many all ranks have.
        count: how many to keep, in [0, total].
        sample: float64[...], the same sample of keys on every rank.
        grid: the ranks; ids rise with the data-parallel rank.
        lead: empty bits to leave before the first, in [0, 8).

    Returns:
        uint8[ceil((lead + local)/8)], packed bits (`numpy.packbits`, little), 1 for kept.
    """
    kept = np.zeros(-(-(lead + local) // 8), dtype=np.uint8)
    if count in (0, total):
        if count:
            kept[:] = 0xFF
            _trim(kept, lead, local)
        return kept
    low, high = find_bracket(sample, count / total)
    while True:
        below, places, inside = split_by_bracket(make_blocks(), low, high, kept, lead)
        sums = grid.sum_over_dp(np.asarray([below, len(inside)], dtype=np.int64))
        if sums[0] < count <= sums[0] + sums[1]:
            break
        low, high = (np.uint64(0), high) if sums[0] >= count else (low, ALL)
    key, under = radix_select(inside, count - 1 - int(sums[0]), grid)
    _set(kept, places[inside < key])
    tied = places[inside == key]
    ties = np.zeros(grid.dp_size, dtype=np.int64)
    ties[grid.dp_rank] = len(tied)
    ties = grid.sum_over_dp(ties)
    left = count - int(sums[0]) - under - int(ties[: grid.dp_rank].sum())
    _set(kept, tied[: max(0, left)])
    return kept


def _set(packed: UInt8, bits: Places) -> None:
    """Set bits, given in rising order."""
    byte, bit = bits >> 3, np.left_shift(1, bits & 7, dtype=np.uint8, casting="unsafe")
    if len(byte):
        starts = np.flatnonzero(np.concatenate([[True], byte[1:] != byte[:-1]]))
        packed[byte[starts]] |= np.bitwise_or.reduceat(bit, starts)


def _trim(packed: UInt8, lead: int, local: int) -> None:
    """Clear the bits before `lead` and from `lead + local` on."""
    if len(packed):
        packed[0] &= 0xFF << lead & 0xFF
        packed[-1] &= 0xFF >> -(lead + local) % 8
