"""Random numbers that any rank can make: a pure function of (seed, purpose, component, epoch or iteration, index).

Counter-based Philox4x64 with the seed as key; nothing is ever advanced, so nothing depends on the number of ranks.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]


class Purpose(IntEnum):
    """What a stream of numbers is for; two purposes never share one."""

    SELECT = 1
    PRUNE = 2
    PERMUTE = 3
    SHUFFLE_BATCH = 4
    SHUFFLE_MASK = 5


def component_key(name: str) -> int:
    """63-bit number of a component that depends on its name alone, so that other components may come and go."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def raw(seed: int, purpose: Purpose, component: int, time: int, start: int, count: int) -> UInt64:
    """64 random bits for each index in [start, start + count).

    Args:
        seed: the run's seed, in [0, 2^63).
        purpose: what for.
        component: `component_key` of the component, or 0 where none is meant.
        time: epoch or iteration.
        start: first index.
        count: how many.

    Returns:
        uint64[count].
    """
    counter = np.asarray([start // 4, time, component, int(purpose)], dtype=np.uint64)
    words = np.random.Philox(key=seed, counter=counter).random_raw(count + start % 4)
    return words[start % 4 :]


def uniforms(seed: int, purpose: Purpose, component: int, time: int, start: int, count: int) -> Float64:
    """Uniform numbers in the open interval (0, 1), (k + 1/2) / 2^52 with a 52-bit k; arguments as for `raw`.

    Returns:
        float64[count].
    """
    return ((raw(seed, purpose, component, time, start, count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
