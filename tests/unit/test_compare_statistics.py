"""Intervals and verdicts of a comparison, against values worked out by hand."""

import math

import pytest

from es_megatron.bench.statistics import paired, quantile, spread


def test_interval_of_three_seeds_by_hand():
    found = paired([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    # differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t(2) = 4.3027
    assert found.mean == pytest.approx(0.2)
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert (found.seeds, found.verdict) == (3, "ties")


@pytest.mark.parametrize(
    ("arm", "reference", "verdict"),
    [
        ([1.0, 2.0, 3.0], [1.1, 2.1, 3.11], "wins"),
        ([1.1, 2.1, 3.11], [1.0, 2.0, 3.0], "loses"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "ties"),
        ([1.0, 2.0], [1.0, 2.0], "open"),
        ([1.0, 2.0, math.nan], [1.0, 2.0, 3.0], "open"),
        ([1.0, 2.0, math.inf], [1.0, 2.0, 3.0], "open"),
        ([1.0], [2.0], "open"),
        ([], [], "open"),
    ],
)
def test_verdict_is_whether_the_interval_leaves_zero_out(arm, reference, verdict):
    assert paired(arm, reference).verdict == verdict


def test_pairing_takes_the_spread_of_seeds_out():
    arm, reference = [1.01, 5.01, 9.012], [1.0, 5.0, 9.0]
    assert paired(arm, reference).verdict == "loses"
    assert spread(arm) > 3.9


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (30, 2.0423), (31, 2.0395), (60, 2.0003)]
)
def test_quantiles_are_those_of_tables(freedom, value):
    assert quantile(freedom) == pytest.approx(value, abs=2e-4)
