"""Which data-parallel rank owns the score of a sample.

The id range [0, n) is cut into *virtual shards* by a rule that knows n alone, and a rank owns whole virtual shards. So
a checkpoint holds the same pieces whatever the number of ranks, and moving to another number of ranks moves pieces.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

MAX_SHARDS = 1024
MIN_SHARD_SAMPLES = 1 << 16
SMALL_SHARDS = 64


def shard_bounds(n: int) -> Int64:
    """Cut [0, n) into virtual shards.

    Small stores are still cut in up to `SMALL_SHARDS` pieces, so that every rank of a small cluster owns some.

    Args:
        n: samples of the whole blend.

    Returns:
        int64[V+1], rising from 0 to n.
    """
    shards = max(1, min(MAX_SHARDS, max(n // MIN_SHARD_SAMPLES, min(n, SMALL_SHARDS))))
    return np.asarray([n * v // shards for v in range(shards + 1)], dtype=np.int64)


def owned_shards(shards: int, rank: int, size: int) -> tuple[int, int]:
    """Half-open range of virtual shards that data-parallel rank `rank` of `size` owns; may be empty."""
    return shards * rank // size, shards * (rank + 1) // size


def owned_range(n: int, rank: int, size: int) -> tuple[int, int]:
    """Half-open range of sample ids that data-parallel rank `rank` of `size` owns; may be empty."""
    bounds = shard_bounds(n)
    low, high = owned_shards(len(bounds) - 1, rank, size)
    return int(bounds[low]), int(bounds[high])
