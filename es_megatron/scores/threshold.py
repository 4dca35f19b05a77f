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

from es_megatron.parallel import Replica

Bool = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

RADIX_BITS = 16
SAMPLES_PER_RANK = 1 << 14
BRACKET_SIGMAS = 6.0
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)

Blocks = Callable[[], Iterable[Float64]]
"""Makes the race keys of this rank's samples in order of id, block by block; may be called again."""


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
    blocks: Iterable[Float64], low: np.uint64, high: np.uint64, kept: Bool
) -> tuple[int, Int64, UInt64]:
    """One pass: mark what is surely kept, put aside what lies in the bracket.

    Args:
        blocks: race keys, in order.
        low: lower bound of the bracket, inclusive.
        high: upper bound, inclusive.
        kept: bool[local], overwritten: true below the bracket.

    Returns:
        How many lie below; the places within this rank that lie inside; their keys' bits.
    """
    start, below = 0, 0
    places: list[Int64] = [np.zeros(0, np.int64)]
    inside: list[UInt64] = [np.zeros(0, np.uint64)]
    for block in blocks:
        bits = block.view(np.uint64)
        under = bits < low
        kept[start : start + len(bits)] = under
        below += int(np.count_nonzero(under))
        at = np.flatnonzero((bits <= high) & ~under)
        places.append(at + start)
        inside.append(bits[at])
        start += len(bits)
    return below, np.concatenate(places), np.concatenate(inside)


def radix_select(bits: UInt64, rank: int, replica: Replica) -> tuple[np.uint64, int]:
    """The `rank`-th smallest (from 0) of all ranks' values, and how many are below it."""
    prefix, below = 0, 0
    active = bits
    for shift in range(64 - RADIX_BITS, -1, -RADIX_BITS):
        digit = (active >> np.uint64(shift)) & np.uint64((1 << RADIX_BITS) - 1)
        upto = np.cumsum(replica.sum_over_dp(np.bincount(digit.astype(np.int64), minlength=1 << RADIX_BITS)))
        found = int(np.searchsorted(upto, rank - below, side="right"))
        below += int(upto[found - 1]) if found else 0
        prefix = prefix << RADIX_BITS | found
        active = active[digit == found]
    return np.uint64(prefix), below


def mark_kept(make_blocks: Blocks, local: int, total: int, count: int, sample: Float64, replica: Replica) -> Bool:
    """Keep the `count` smallest keys of all data-parallel ranks; ties go to the lower id.

    Args:
        make_blocks: race keys of this rank's samples in order of id.
        local: how many this rank has.
        total: how many all ranks have.
        count: how many to keep, in [0, total].
        sample: float64[...], the same sample of keys on every rank.
        replica: the ranks; ids rise with the data-parallel rank.

    Returns:
        bool[local], true for kept.
    """
    if count in (0, total):
        return np.full(local, count > 0, dtype=np.bool_)
    kept = np.empty(local, dtype=np.bool_)
    low, high = find_bracket(sample, count / total)
    while True:
        below, places, inside = split_by_bracket(make_blocks(), low, high, kept)
        sums = replica.sum_over_dp(np.asarray([below, len(inside)], dtype=np.int64))
        if sums[0] < count <= sums[0] + sums[1]:
            break
        low, high = (np.uint64(0), high) if sums[0] >= count else (low, ALL)
    key, under = radix_select(inside, count - 1 - int(sums[0]), replica)
    kept[places[inside < key]] = True
    tied = places[inside == key]
    ties = np.zeros(replica.dp_size, dtype=np.int64)
    ties[replica.dp_rank] = len(tied)
    ties = replica.sum_over_dp(ties)
    left = count - int(sums[0]) - under - int(ties[: replica.dp_rank].sum())
    kept[tied[: max(0, left)]] = True
    return kept
