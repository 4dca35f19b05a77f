"""Rank and select of kept masks against a plain list of the kept rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.data.mask import KeptMask, select_bit


def random_rows(samples: int, density: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(samples) < density


@settings(max_examples=150, deadline=None)
@given(
    samples=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 511, 512, 513, 1024]), st.integers(1, 5000)),
    density=st.sampled_from([0.0, 0.001, 0.2, 0.8, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_mask_equals_the_list_of_kept_rows(samples, density, seed):
    kept = random_rows(samples, density, seed)
    mask = KeptMask.from_bool(kept)
    rows = np.flatnonzero(kept)
    assert mask.samples == samples
    assert mask.count == len(rows)
    np.testing.assert_array_equal(mask.to_bool(), kept)
    np.testing.assert_array_equal(mask.contains(np.arange(samples)), kept)
    order = np.random.default_rng(seed + 1).permutation(len(rows))
    selected = mask.select(order)
    assert selected.dtype == np.int64
    np.testing.assert_array_equal(selected, rows[order])
    again = KeptMask(mask.packed, samples)
    np.testing.assert_array_equal(again.select(order), rows[order])


def test_gaps_of_many_empty_blocks():
    kept = np.zeros(20_000, bool)
    places = [0, 511, 512, 9_999, 10_000, 19_999]
    kept[places] = True
    assert KeptMask.from_bool(kept).select(np.arange(6)).tolist() == places


def test_bit_k_of_byte_j_is_row_8j_plus_k():
    mask = KeptMask(np.asarray([0b0000_0101, 0b1000_0000], np.uint8), 16)
    assert mask.select(np.arange(3)).tolist() == [0, 2, 15]
    assert KeptMask.from_bool(mask.to_bool()).packed.tolist() == [5, 128]


def test_shape_is_kept_and_the_question_is_not_changed():
    mask = KeptMask.from_bool(random_rows(3000, 0.5, 1))
    ranks = np.arange(12).reshape(3, 4)
    rows = mask.select(ranks)
    assert rows.shape == (3, 4)
    np.testing.assert_array_equal(rows.reshape(-1), mask.select(np.arange(12)))
    np.testing.assert_array_equal(ranks, np.arange(12).reshape(3, 4))
    assert mask.contains(rows).all()
    assert mask.select(np.empty(0, np.int64)).shape == (0,)


@settings(max_examples=100, deadline=None)
@given(word=st.integers(1, 2**64 - 1))
def test_set_bits_of_a_word(word):
    places = [k for k in range(64) if word >> k & 1]
    words = np.full(len(places), word, np.uint64)
    assert select_bit(words, np.arange(len(places))).tolist() == places


@pytest.mark.parametrize("power", [31, pytest.param(32, marks=pytest.mark.slow)])
def test_rows_past_31_and_32_bits(power):
    edge, samples = 2**power, 2**power + 1000
    packed = np.zeros(-(-samples // 8), np.uint8)
    packed[:4] = 255
    places = [edge - 1, edge, edge + 999]
    for place in places:
        packed[place >> 3] |= 1 << (place & 7)
    mask = KeptMask(packed, samples)
    assert mask.count == 35
    assert mask.select(np.asarray([31, 32, 33, 34])).tolist() == [31, *places]
    assert mask.contains(np.asarray([edge - 2, *places])).tolist() == [False, True, True, True]


def test_ranks_past_31_bits():
    packed = np.full(2**28 + 8, 255, np.uint8)
    mask = KeptMask(packed, 2**31 + 64)
    assert mask.count == 2**31 + 64
    ranks = np.asarray([0, 2**31 - 1, 2**31, 2**31 + 63])
    np.testing.assert_array_equal(mask.select(ranks), ranks)
