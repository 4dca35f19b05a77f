"""Annealing at both ends, by exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.phases import Phases


@settings(max_examples=300, deadline=None)
@given(iterations=st.integers(0, 3000), thousandths=st.integers(0, 500))
def test_first_and_last_share_of_iterations_anneal(iterations, thousandths):
    phases = Phases(iterations, thousandths / 1000)
    ends = math.ceil(Fraction(thousandths, 1000) * iterations)
    for i in {
        0,
        1,
        ends - 1,
        ends,
        ends + 1,
        iterations // 2,
        iterations - ends - 1,
        iterations - ends,
        iterations - 1,
    }:
        if 0 <= i < iterations:
            assert phases.evolving(i) == (ends <= i < iterations - ends), i
    assert not phases.evolving(iterations)
    assert not phases.evolving(-1)
    assert 0 <= phases.start <= phases.stop <= max(iterations, phases.start)


@pytest.mark.parametrize(
    ("iterations", "anneal", "expected"),
    [
        (100, 0.05, range(5, 95)),
        (101, 0.05, range(6, 95)),  # rounded up at both ends
        (100, 0.07, range(7, 93)),  # 0.07 * 100 is 7.000000000000001 in floats
        (60, 0.0, range(60)),
        (7, 0.5, range(0)),
        (8, 0.5, range(0)),
        (1, 0.05, range(0)),
        (226_000_000, 0.05, range(11_300_000, 214_700_000)),
    ],
)
def test_edges(iterations, anneal, expected):
    phases = Phases(iterations, anneal)
    assert len(range(phases.start, phases.stop)) == len(expected)
    if len(expected):
        assert (phases.start, phases.stop) == (expected.start, expected.stop)
