"""Who owns which id: contiguous, whole virtual shards, the same pieces for every number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.ownership import MAX_SHARDS, owned_range, owned_shards, shard_bounds

SIZES = st.one_of(st.integers(1, 5000), st.integers(2**31 - 3, 2**31 + 3), st.integers(2**32, 2**34))


@settings(max_examples=150, deadline=None)
@given(n=SIZES, size=st.integers(1, 200))
def test_ranges_of_the_ranks_tile_the_ids_in_order(n, size):
    ranges = [owned_range(n, rank, size) for rank in range(size)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == n
    assert all(low <= high for low, high in ranges)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))


@settings(max_examples=150, deadline=None)
@given(n=SIZES)
def test_shards_depend_on_n_alone_and_are_even(n):
    bounds = shard_bounds(n)
    assert bounds.dtype == np.int64
    assert (bounds[0], bounds[-1]) == (0, n)
    lengths = np.diff(bounds)
    assert lengths.min() >= 1
    assert lengths.max() - lengths.min() <= 1
    assert len(lengths) <= MAX_SHARDS


@settings(max_examples=100, deadline=None)
@given(n=SIZES, size=st.integers(1, 70))
def test_ranks_own_whole_shards_and_no_shard_is_owned_twice(n, size):
    bounds = shard_bounds(n).tolist()
    owned: list[int] = []
    for rank in range(size):
        low, high = owned_shards(len(bounds) - 1, rank, size)
        owned += range(low, high)
        assert owned_range(n, rank, size) == (bounds[low], bounds[high])
    assert owned == list(range(len(bounds) - 1))


@pytest.mark.parametrize(("n", "size"), [(1000, 24), (3_700_000_000, 128), (244_000_000, 96)])
def test_shares_are_even_enough(n, size):
    shares = [high - low for low, high in (owned_range(n, rank, size) for rank in range(size))]
    assert min(shares) > 0
    assert max(shares) <= 2 * n / size


def test_more_ranks_than_samples_leaves_some_with_nothing():
    ranges = [owned_range(3, rank, 7) for rank in range(7)]
    assert sorted(high - low for low, high in ranges) == [0, 0, 0, 0, 1, 1, 1]
