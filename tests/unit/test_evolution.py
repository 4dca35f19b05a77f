"""The recurrences of eq. 2.5, in float64 and one sample at a time, against the arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.evolution import MAX_VISITS, evolve, raise_to_floor, usable_scores
from es_megatron.algorithm.selection import race

BETA = st.floats(0, 0.99)
NATS = st.floats(0, 20, width=32)


def float32(*values: float) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(NATS, NATS), min_size=1, max_size=8), beta1=BETA, beta2=BETA)
def test_weight_and_score_both_take_the_old_score(pairs, beta1, beta2):
    loss, old = float32(*[p[0] for p in pairs]), float32(*[p[1] for p in pairs])
    kept = loss.copy(), old.copy()
    weight, score = evolve(loss, old, old, beta1, beta2)
    assert weight.dtype == score.dtype == np.float32
    for i, (at, was) in enumerate(pairs):
        assert weight[i] == pytest.approx(beta1 * was + (1 - beta1) * at, rel=1e-6, abs=1e-6)
        assert score[i] == pytest.approx(beta2 * was + (1 - beta2) * at, rel=1e-6, abs=1e-6)
        # the history plus the loss difference (section 3.2 of the paper)
        assert weight[i] == pytest.approx(score[i] + (beta2 - beta1) * (at - was), rel=1e-5, abs=2e-5)
    np.testing.assert_array_equal(loss, kept[0])
    np.testing.assert_array_equal(old, kept[1])


def test_weight_uses_the_corrected_score_and_the_stored_one_is_evolved():
    weight, score = evolve(float32(4.0), float32(1.0), float32(3.0), 0.25, 0.5)
    assert weight.tolist() == [0.25 * 3 + 0.75 * 4]
    assert score.tolist() == [0.5 * 1 + 0.5 * 4]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_never_enters_a_score_nor_is_drawn(bad):
    loss, old = float32(2.0, bad, 3.0), float32(0.5, 0.25, 1.0)
    weight, score = evolve(loss, old, old, 0.2, 0.9)
    assert score[1] == old[1]
    assert weight[1] == 0
    assert np.isfinite(weight).all()
    assert np.isfinite(score).all()
    assert (weight[[0, 2]] > 0).all()
    assert (score[[0, 2]] > old[[0, 2]]).all()


def test_loss_of_zero_can_still_be_drawn():
    weight, _ = evolve(float32(0.0, 0.0), float32(0.0, 0.0), float32(0.0, 0.0), 0.2, 0.9)
    assert race(weight, np.asarray([0.5, 0.7]), 2).chosen.tolist() == [0, 1]


@settings(max_examples=100, deadline=None)
@given(losses=st.lists(NATS, min_size=1, max_size=30), beta2=st.sampled_from([0.0, 0.2, 0.8, 0.9, 0.94]))
def test_debiased_score_is_the_weighted_average_of_the_losses_alone(losses, beta2):
    start = 1 / 1000
    stored = float32(start)
    for loss in losses:
        _, stored = evolve(float32(loss), stored, stored, 0.2, beta2)
    k = len(losses)
    share = [(1 - beta2) * beta2 ** (k - 1 - j) for j in range(k)]
    average = sum(a * loss for a, loss in zip(share, losses, strict=True)) / (1 - beta2**k)
    used = usable_scores(stored, np.asarray([k], np.uint8), beta2, start, "debiased", unseen=7.0)
    assert used.dtype == np.float32
    assert used[0] == pytest.approx(average, rel=2e-5, abs=2e-5)
    paper = usable_scores(stored, np.asarray([k], np.uint8), beta2, start, "paper", unseen=7.0)
    np.testing.assert_array_equal(paper, stored)


def test_unseen_samples_count_as_the_start_or_as_the_mean_whatever_is_stored():
    stored, visits = float32(9.0, 9.0), np.asarray([0, 1], np.uint8)
    assert usable_scores(stored, visits, 0.5, 0.125, "paper", 3.0).tolist() == [0.125, 9.0]
    assert usable_scores(stored, visits, 0.5, 0.125, "debiased", 3.0).tolist() == [3.0, (9 - 0.0625) / 0.5]


def test_visits_that_saturate_leave_no_bias_and_nothing_is_negative():
    visits = np.asarray([MAX_VISITS, 1], np.uint8)
    used = usable_scores(float32(2.5, 0.0), visits, 0.9, 0.5, "debiased", 1.0)
    assert used[0] == pytest.approx(2.5, rel=1e-6)
    assert used[1] == 0.0
    assert np.iinfo(visits.dtype).max == MAX_VISITS


def test_floor_lifts_small_weights_but_not_bad_ones():
    weight = float32(0.0, 1e-6, 0.5, 3.0)
    assert raise_to_floor(weight, 0.5, mean=2.0).tolist() == [0.0, 1.0, 1.0, 3.0]
    np.testing.assert_array_equal(raise_to_floor(weight, 0.0, mean=2.0), weight)
    assert raise_to_floor(weight, 0.5, mean=2.0).dtype == np.float32
