"""The blend tree against a walk that makes one draw at a time, and its exact totals."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.data.blend import MAX_DRAWS, WEIGHT_UNIT, Blend, round_weights
from es_megatron.errors import DataError
from tests.unit.naive import draws

SHARE = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.sampled_from([1.0, 1e-7, 1e6]))
SHARES = st.lists(SHARE, min_size=1, max_size=9).filter(any)


@settings(max_examples=60, deadline=None)
@given(weights=SHARES, count=st.integers(1, 150))
def test_blend_equals_the_walk_of_one_draw_at_a_time(weights, count):
    blend = Blend(weights)
    expected = list(itertools.islice(draws(round_weights(weights).tolist()), count))
    component, draw = blend.locate(np.arange(count))
    assert component.dtype == draw.dtype == np.int64
    assert component.tolist() == expected
    assert draw.tolist() == [expected[:p].count(c) for p, c in enumerate(expected)]
    for first in (0, 1, count // 2, count):
        assert blend.counts(first).tolist() == [expected[:first].count(c) for c in range(len(weights))]
    for position, (c, d) in enumerate(zip(component.tolist(), draw.tolist(), strict=True)):
        assert blend.position(c, d) == position


@settings(max_examples=100, deadline=None)
@given(weights=SHARES, position=st.one_of(st.integers(2**31 - 2, 2**31 + 2), st.integers(2**32 - 2, MAX_DRAWS - 1)))
def test_positions_past_32_bits(weights, position):
    blend = Blend(weights)
    component, draw = (int(part[0]) for part in blend.locate(np.asarray([position])))
    before, after = blend.counts(position), blend.counts(position + 1)
    assert before.sum() == position
    assert draw == before[component]
    assert np.flatnonzero(after - before).tolist() == [component]
    assert after[component] - before[component] == 1
    assert blend.position(component, draw) == position
    # each level of the tree is off by less than one draw, and later levels scale that down
    unit = round_weights(weights)
    for c, count in enumerate(before.tolist()):
        assert abs(count - position * Fraction(int(unit[c]), int(unit.sum()))) < max(1, blend.depth)


@pytest.mark.parametrize("components", [1000, 3000, 5001])
def test_totals_are_exact_and_never_negative_for_thousands_of_tiny_weights(components):
    generator = np.random.default_rng(components)
    weights = 10.0 ** generator.uniform(-14, 0, components)
    weights[generator.integers(components)] = 1e4
    blend = Blend(weights.tolist())
    checks = np.unique(
        np.concatenate([np.arange(40), generator.integers(0, MAX_DRAWS, 60), [2**31, 2**32, MAX_DRAWS - 1]])
    )
    previous, at = np.zeros(components, np.int64), 0
    for total in checks.tolist():
        counts = blend.counts(total)
        assert counts.sum() == total
        assert (counts - previous).min() >= 0
        assert (counts - previous).sum() == total - at
        previous, at = counts, total
    assert (previous > 0).all()  # a weight above 0 is drawn, however small
    for start in (0, 2**31 - 500, 2**32 - 500, MAX_DRAWS - 1000):
        positions = np.arange(start, start + 1000)
        component, draw = blend.locate(positions)
        expected = blend.counts(start).copy()
        for c, d in zip(component.tolist(), draw.tolist(), strict=True):
            assert d == expected[c]
            expected[c] += 1
        np.testing.assert_array_equal(expected, blend.counts(start + 1000))


def test_weights_that_fill_the_unit_do_not_overflow_at_the_last_position():
    blend = Blend([1.0, 1e-300, 1e-300])
    component, draw = blend.locate(np.asarray([MAX_DRAWS - 1]))
    assert component.tolist() == [0]
    assert draw.tolist() == [int(blend.counts(MAX_DRAWS - 1)[0])]
    assert blend.counts(MAX_DRAWS - 1)[0] == pytest.approx(MAX_DRAWS, rel=1e-7)


def test_weight_of_zero_is_never_drawn():
    blend = Blend([0.0, 1.0, 0.0, 3.0, 0.0])
    component, _ = blend.locate(np.arange(1000))
    assert np.bincount(component, minlength=5).tolist() == [0, 250, 0, 750, 0]
    assert blend.counts(10**10).tolist() == [0, 25 * 10**8, 0, 75 * 10**8, 0]
    with pytest.raises(DataError, match="Component 2 has weight 0"):
        blend.position(2, 0)


def test_single_component_gets_everything_in_order():
    component, draw = Blend([0.3]).locate(np.asarray([[0, 5], [2**33, 7]]))
    assert component.tolist() == [[0, 0], [0, 0]]
    assert draw.tolist() == [[0, 5], [2**33, 7]]


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0, 1e300), min_size=1, max_size=30).filter(any))
def test_rounded_weights_are_near_and_positive(weights):
    found = round_weights(weights)
    total = sum(Fraction(w) for w in weights)
    for w, units in zip(weights, found.tolist(), strict=True):
        exact = Fraction(w) / total * WEIGHT_UNIT
        assert units == 0 if w == 0 else units >= 1
        assert abs(units - exact) <= Fraction(1, 2) or (units == 1 and exact < 1)


def test_scale_of_the_weights_does_not_matter():
    a, b = Blend([0.1, 0.2, 0.7]), Blend([102.4, 204.8, 716.8])
    np.testing.assert_array_equal(a.locate(np.arange(5000))[0], b.locate(np.arange(5000))[0])
