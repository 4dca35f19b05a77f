"""Keyed permutations of [0, n) with random access: the order of one epoch of one component.

Up to 65,536 elements the permutation is explicit, sorted by random keys. Above, a mixed-radix Feistel network over
[0, a*b) with a*b just above n, and cycle walking for what falls outside (Black & Rogaway 2002).
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.randomness import Purpose, raw

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

EXPLICIT_LIMIT = 1 << 16
ROUNDS = 8
MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


class Permutation(Protocol):
    """A bijection of [0, n)."""

    def __call__(self, index: Int64) -> Int64:
        """Where each index goes, int64 like `index`."""
        ...


class ExplicitPermutation:
    """A permutation held as an array."""

    def __init__(self, n: int, seed: int, component: int, epoch: int, purpose: Purpose) -> None:
        """Sort [0, n) by random keys."""
        self._order = np.argsort(raw(seed, purpose, component, epoch, 0, n), kind="stable").astype(np.int64)

    def __call__(self, index: Int64) -> Int64:
        """Look the indices up."""
        return self._order[index]


class FeistelPermutation:
    """A permutation computed element by element; its state is a handful of round keys."""

    def __init__(self, n: int, seed: int, component: int, epoch: int, purpose: Purpose) -> None:
        """Choose the radices and the round keys."""
        self._n = n
        self._high = np.uint64(math.isqrt(n - 1) + 1)
        self._low = np.uint64(-(-n // int(self._high)))
        self._keys = raw(seed, purpose, component, epoch, 0, ROUNDS)

    def __call__(self, index: Int64) -> Int64:
        """Encrypt the indices, walking the cycle of those that fall outside."""
        value = self._encrypt(index.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(value >= self._n)
        while len(outside):
            value[outside] = self._encrypt(value[outside])
            outside = outside[value[outside] >= self._n]
        return value.astype(np.int64).reshape(index.shape)

    def _encrypt(self, value: UInt64) -> UInt64:
        high, low = np.divmod(value, self._low)
        for turn, key in enumerate(self._keys):
            if turn % 2 == 0:
                high = (high + scramble(low, key) % self._high) % self._high
            else:
                low = (low + scramble(high, key) % self._low) % self._low
        return high * self._low + low


def scramble(value: UInt64, key: np.uint64) -> UInt64:
    """Mix 64 bits with a key (the finalizer of SplitMix64)."""
    mixed = value ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * MULTIPLIER_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * MULTIPLIER_2
    return mixed ^ (mixed >> np.uint64(31))


def permutation(n: int, seed: int, component: int, epoch: int, purpose: Purpose = Purpose.PERMUTE) -> Permutation:
    """The permutation of [0, n) for an epoch of a component; arguments as for `raw`."""
    kind = ExplicitPermutation if n <= EXPLICIT_LIMIT else FeistelPermutation
    return kind(n, seed, component, epoch, purpose)
