"""Keyed permutations of [0, n) with random access: the order of one epoch of one component.

Up to 65,536 elements the permutation is explicit, sorted by random keys. Above, a mixed-radix Feistel network over
[0, a*b) with a*b just above n, and cycle walking for what falls outside (Black & Rogaway 2002). `Orders` computes
those of many epochs in one go: a meta-batch of a blend with 1,000 components has a handful of elements of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.randomness import Purpose, raw

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

Words = np.uint64 | UInt64

EXPLICIT_LIMIT = 1 << 16
EXPLICIT_BYTES = 1 << 28
"""Bytes of explicit permutations that `Orders` holds, 2 an element."""
MAX_SLOTS = 1 << 16
"""Networks that `Orders` holds, 88 bytes each."""
ROUNDS = 8
NOTHING = np.uint64(0)
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
        order = np.argsort(raw(seed, purpose, component, epoch, 0, n), kind="stable")
        self.order: npt.NDArray[np.unsignedinteger] = order.astype(np.uint16 if n <= EXPLICIT_LIMIT else np.uint64)

    def __call__(self, index: Int64) -> Int64:
        """Look the indices up."""
        return self.order[index].astype(np.int64)


class FeistelPermutation:
    """A permutation computed element by element; its state is a handful of round keys."""

    def __init__(self, n: int, seed: int, component: int, epoch: int, purpose: Purpose) -> None:
        """Choose the radices and the round keys."""
        high, low = radices(n)
        self._n, self._high, self._low = np.uint64(n), np.uint64(high), np.uint64(low)
        self._keys = raw(seed, purpose, component, epoch, 0, ROUNDS)

    def __call__(self, index: Int64) -> Int64:
        """Encrypt the indices, walking the cycle of those that fall outside."""
        value = index.astype(np.uint64).reshape(-1)
        return walk(value, self._n, self._high, self._low, self._keys).astype(np.int64).reshape(index.shape)


def radices(n: int) -> tuple[int, int]:
    """The a and b of a Feistel network over [0, n), a * b just above n."""
    high = math.isqrt(n - 1) + 1
    return high, -(-n // high)


def walk(value: UInt64, n: Words, high: Words, low: Words, keys: UInt64) -> UInt64:
    """Encrypt values of [0, n), and again those that fall outside it.

    Args:
        value: uint64[N].
        n: size of the domain, one for all or uint64[N].
        high: first radix, like `n`.
        low: second radix, like `n`.
        keys: uint64[ROUNDS] or uint64[ROUNDS, N].
    """
    value = encrypt(value, high, low, keys)
    outside = np.flatnonzero(value >= n)
    while len(outside):
        at = [part if part.ndim == 0 else part[outside] for part in (np.asarray(n), np.asarray(high), np.asarray(low))]
        value[outside] = encrypt(value[outside], at[1], at[2], keys if keys.ndim == 1 else keys[:, outside])
        outside = outside[value[outside] >= at[0]]
    return value


def encrypt(value: UInt64, high_radix: Words, low_radix: Words, keys: UInt64) -> UInt64:
    """One pass of the network over [0, high_radix * low_radix); shapes as in `walk`."""
    high, low = np.divmod(value, low_radix)
    for turn, key in enumerate(keys):
        if turn % 2 == 0:
            high += scramble(low, key) % high_radix
            high -= np.where(high >= high_radix, high_radix, NOTHING)
        else:
            low += scramble(high, key) % low_radix
            low -= np.where(low >= low_radix, low_radix, NOTHING)
    return high * low_radix + low


def scramble(value: UInt64, key: Words) -> UInt64:
    """Mix 64 bits with a key (the finalizer of SplitMix64)."""
    mixed = value ^ key
    mixed ^= mixed >> np.uint64(30)
    mixed *= MULTIPLIER_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= MULTIPLIER_2
    mixed ^= mixed >> np.uint64(31)
    return mixed


def permutation(n: int, seed: int, component: int, epoch: int, purpose: Purpose = Purpose.PERMUTE) -> Permutation:
    """The permutation of [0, n) for an epoch of a component; arguments as for `raw`."""
    kind = ExplicitPermutation if n <= EXPLICIT_LIMIT else FeistelPermutation
    return kind(n, seed, component, epoch, purpose)


class EpochOrder(NamedTuple):
    """Which permutation: that of an epoch of a component with `size` draws."""

    component: int
    epoch: int
    size: int


class Orders:
    """The permutations of the epochs that are being drawn, computed for many of them at once."""

    def __init__(self, seed: int, keys: Sequence[int]) -> None:
        """Start with none.

        Args:
            seed: of the data order.
            keys: `component_key` of each component.
        """
        self._seed, self._component_keys = seed, keys
        self._explicit: dict[EpochOrder, ExplicitPermutation] = {}
        self._bytes = 0
        self._slot: dict[EpochOrder, int] = {}
        self._table: UInt64 = np.zeros((3 + ROUNDS, 64), dtype=np.uint64)

    def __call__(self, wanted: Sequence[EpochOrder], lengths: Int64, index: Int64) -> Int64:
        """Where indices go in their epochs.

        Args:
            wanted: the G epochs.
            lengths: int64[G], how many of the indices belong to each, one after the other.
            index: int64[N], each in [0, size) of its epoch.

        Returns:
            int64[N].
        """
        ends = np.cumsum(lengths)
        found = np.empty_like(index)
        small = np.asarray([each.size <= EXPLICIT_LIMIT for each in wanted], dtype=np.bool_)
        for at in np.flatnonzero(small).tolist():
            part = slice(ends[at] - lengths[at], ends[at])
            found[part] = self._order_of(wanted[at]).order[index[part]]
        large = np.flatnonzero(~small)
        if len(large):
            slots = np.asarray([self._slot_of(wanted[at]) for at in large.tolist()], dtype=np.int64)
            every = slice(None) if len(large) == len(wanted) else np.flatnonzero(np.repeat(~small, lengths))
            found[every] = self._encrypt(slots, lengths[large], index[every])
        return found

    def _encrypt(self, slots: Int64, lengths: Int64, index: Int64) -> Int64:
        value = index.astype(np.uint64)
        if len(slots) == 1:
            n, high, low, *keys = self._table[:, slots[0]]
            return walk(value, n, high, low, np.asarray(keys)).astype(np.int64)
        each = self._table.take(np.repeat(slots, lengths), axis=1)
        return walk(value, each[0], each[1], each[2], each[3:]).astype(np.int64)

    def _order_of(self, which: EpochOrder) -> ExplicitPermutation:
        order = self._explicit.get(which)
        if order is None:
            component = self._component_keys[which.component]
            order = ExplicitPermutation(which.size, self._seed, component, which.epoch, Purpose.PERMUTE)
            while self._explicit and self._bytes + order.order.nbytes > EXPLICIT_BYTES:
                oldest = next(iter(self._explicit))
                self._bytes -= self._explicit.pop(oldest).order.nbytes
            self._explicit[which] = order
            self._bytes += order.order.nbytes
        return order

    def _slot_of(self, which: EpochOrder) -> int:
        slot = self._slot.get(which)
        if slot is None:
            slot = len(self._slot)
            if slot == self._table.shape[1]:
                wider = np.zeros((self._table.shape[0], 2 * slot), dtype=np.uint64)
                wider[:, :slot] = self._table
                self._table = wider
            keys = raw(self._seed, Purpose.PERMUTE, self._component_keys[which.component], which.epoch, 0, ROUNDS)
            self._table[:, slot] = [which.size, *radices(which.size), *keys]
            self._slot[which] = slot
        return slot

    def forget(self) -> None:
        """Drop the networks when there are many, most of them of epochs gone by."""
        if len(self._slot) > MAX_SLOTS:
            self._slot.clear()
