"""Keyed permutations: bijections, even, and different for every epoch."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.randomness import Purpose
from es_megatron.data.permutation import (
    EXPLICIT_LIMIT,
    ExplicitPermutation,
    FeistelPermutation,
    permutation,
)
from tests.unit.naive import chi_square

KINDS = [ExplicitPermutation, FeistelPermutation]


def order_of(kind, n, *, seed=1, component=2, epoch=3, purpose=Purpose.PERMUTE):
    return kind(n, seed, component, epoch, purpose)(np.arange(n, dtype=np.int64))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 50))
def test_every_element_once(kind, n, seed, epoch):
    found = order_of(kind, n, seed=seed, epoch=epoch)
    assert found.dtype == np.int64
    assert np.sort(found).tolist() == list(range(n))


@pytest.mark.parametrize("n", [EXPLICIT_LIMIT, EXPLICIT_LIMIT + 1, 300_007, 2**20])
def test_every_element_once_on_both_sides_of_the_limit(n):
    make = permutation(n, 5, 6, 7)
    assert isinstance(make, ExplicitPermutation if n <= EXPLICIT_LIMIT else FeistelPermutation)
    seen = np.zeros(n, np.int64)
    np.add.at(seen, make(np.arange(n, dtype=np.int64)), 1)
    assert (seen == 1).all()


@pytest.mark.parametrize("n", [2**31 - 1, 2**31 + 11, 2**32 + 1, 3_700_000_000, 2**34 - 5])
def test_no_element_twice_past_32_bits(n):
    index = np.unique(np.random.default_rng(n).integers(0, n, 100_000))
    index = np.concatenate([index, np.asarray([n - 1])]) if index[-1] != n - 1 else index
    found = permutation(n, 5, 6, 7)(index)
    assert found.min() >= 0
    assert found.max() < n
    assert len(np.unique(found)) == len(index)
    assert found.max() > 0.99 * n
    table = np.histogram2d(index / n, found / n, bins=16, range=[[0, 1], [0, 1]])[0].reshape(-1)
    assert chi_square(table, np.full(256, len(index) / 256)) < 370


@pytest.mark.parametrize("kind", KINDS)
def test_piece_by_piece_and_in_any_shape_equals_the_whole(kind):
    make = kind(5000, 1, 2, 3, Purpose.PERMUTE)
    whole = make(np.arange(5000))
    mixed = np.random.default_rng(0).permutation(5000).reshape(50, 100)
    np.testing.assert_array_equal(make(mixed), whole[mixed])
    assert [int(make(np.asarray([i]))[0]) for i in range(0, 5000, 499)] == whole[::499].tolist()
    assert make(np.empty(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_question_is_not_changed(kind):
    index = np.arange(3000)
    kind(3000, 1, 2, 3, Purpose.PERMUTE)(index)
    np.testing.assert_array_equal(index, np.arange(3000))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"seed": 2}, {"component": 3}, {"epoch": 4}, {"purpose": Purpose.SHUFFLE_MASK}])
def test_each_of_seed_component_epoch_and_purpose_gives_another_order(kind, change):
    first, second = order_of(kind, 4000), order_of(kind, 4000, **change)
    assert (first == second).sum() < 12  # one fixed point is expected
    np.testing.assert_array_equal(first, order_of(kind, 4000))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [5, 6, 9])
def test_ordered_pairs_come_equally_often(kind, n):
    runs = 200 * n * (n - 1)
    pairs = Counter(
        tuple(kind(n, seed, 0, 0, Purpose.PERMUTE)(np.asarray([0, n - 1])).tolist()) for seed in range(runs)
    )
    cells = list(itertools.permutations(range(n), 2))
    freedom = len(cells) - 1
    assert chi_square([pairs[cell] for cell in cells], [200] * len(cells)) < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("kind", "n"), [(ExplicitPermutation, 60_000), (FeistelPermutation, 1_000_003)])
def test_order_looks_random(kind, n):
    found = order_of(kind, n)
    index = np.arange(n)
    table = np.histogram2d(index, found, bins=32, range=[[0, n], [0, n]])[0].reshape(-1)
    # rows and columns are fixed, so 31 * 31 degrees of freedom
    assert 961 - 220 < chi_square(table, np.full(1024, n / 1024)) < 961 + 220
    steps = np.diff(found)
    assert abs((steps > 0).mean() - 0.5) < 5 * 0.29 / np.sqrt(n)  # ascents have variance (n + 1) / 12
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / np.sqrt(n)
