"""The draw against its exact law, Algorithm 1 drawn one at a time, and torch; sharing out; pruning."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.pruners import kept_count
from es_megatron.algorithm.randomness import Purpose, uniforms
from es_megatron.algorithm.selection import (
    assign,
    inclusion_weights,
    owners,
    positions_of,
    race,
    race_groups,
    race_keys,
)
from es_megatron.errors import LossError
from tests.unit.naive import chi_square, draw_without_replacement, prune, subset_probabilities

WEIGHTS = [0.3, 1.0, 2.5, 0.7, 4.0]
SUBSETS = list(itertools.combinations(range(5), 2))
CHI_SQUARE_9 = 33.7  # 9 degrees of freedom, p = 1e-4; seeds are fixed
WEIGHT = st.one_of(st.just(0.0), st.floats(0.0009765625, 64, width=32))


def counts_of(chosen: list[tuple[int, ...]]) -> list[int]:
    found = Counter(chosen)
    return [found[subset] for subset in SUBSETS]


def raced(runs: int) -> list[tuple[int, ...]]:
    weight = np.asarray(WEIGHTS, np.float32)
    return [tuple(race(weight, uniforms(5, Purpose.SELECT, 0, t, 0, 5), 2).chosen.tolist()) for t in range(runs)]


def test_every_subset_comes_with_its_exact_probability():
    exact = subset_probabilities(WEIGHTS, 2)
    assert sum(exact.values()) == pytest.approx(1)
    counts = counts_of(raced(20_000))
    assert chi_square(counts, [20_000 * exact[s] for s in SUBSETS]) < CHI_SQUARE_9
    # the test can tell: it rejects a draw whose second member ignores that the first is gone
    share = np.asarray(WEIGHTS) / sum(WEIGHTS)
    wrong = np.asarray([share[a] * share[b] for a, b in SUBSETS])
    assert chi_square(counts, 20_000 * wrong / wrong.sum()) > 5 * CHI_SQUARE_9


def two_samples(first: list[int], second: list[int]) -> float:
    a, b = sum(first), sum(second)
    expected = [((x + y) * a / (a + b), (x + y) * b / (a + b)) for x, y in zip(first, second, strict=True)]
    return chi_square(first, [e for e, _ in expected]) + chi_square(second, [e for _, e in expected])


def test_frequencies_equal_those_of_algorithm_1_drawn_one_at_a_time():
    generator = np.random.default_rng(11)
    naive = [tuple(draw_without_replacement(WEIGHTS, 2, generator)) for _ in range(20_000)]
    assert two_samples(counts_of(raced(20_000)), counts_of(naive)) < CHI_SQUARE_9


def test_frequencies_equal_those_of_torch_multinomial():
    generator = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(torch.tensor(WEIGHTS).expand(100_000, 5), 2, generator=generator).sort(dim=1).values
    assert two_samples(counts_of(raced(20_000)), counts_of([tuple(pair) for pair in drawn.tolist()])) < CHI_SQUARE_9


@settings(max_examples=200, deadline=None)
@given(weight=st.lists(WEIGHT, min_size=1, max_size=12), seed=st.integers(0, 2**32), data=st.data())
def test_race_keeps_the_smallest_keys_and_names_the_smallest_that_lost(weight, seed, data):
    drawable = sum(w > 0 for w in weight)
    count = data.draw(st.integers(0, drawable))
    uniform = uniforms(seed, Purpose.SELECT, 0, 0, 0, len(weight))
    keys = [-math.log(u) / w if w else math.inf for u, w in zip(uniform, weight, strict=True)]
    ranked = sorted(range(len(weight)), key=lambda i: (keys[i], i))
    outcome = race(np.asarray(weight, np.float32), uniform, count)
    assert outcome.chosen.dtype == np.int64
    assert outcome.chosen.tolist() == sorted(ranked[:count])
    assert all(weight[i] > 0 for i in outcome.chosen)
    tau = keys[ranked[count]] if count < len(weight) else math.inf
    assert outcome.runner_up == pytest.approx(tau, rel=1e-12)


def test_equal_keys_go_to_the_lower_position():
    assert race(np.ones(6), np.full(6, 0.5), 3).chosen.tolist() == [0, 1, 2]
    # -log(u) / w is the same number here, up to no rounding at all
    assert race(np.asarray([1.0, 2.0]), np.asarray([0.5, 0.25]), 1).chosen.tolist() == [0]


def test_choice_does_not_depend_on_the_unit_of_the_weights():
    uniform = uniforms(1, Purpose.SELECT, 0, 0, 0, 64)
    weight = np.linspace(0.1, 5, 64, dtype=np.float32)
    np.testing.assert_array_equal(race(weight, uniform, 16).chosen, race(weight * 1024, uniform, 16).chosen)


def test_tiny_weights_have_finite_keys():
    tiny = np.full(4, np.finfo(np.float32).tiny, np.float32)
    assert np.isfinite(race_keys(tiny, np.full(4, 2.0**-53))).all()


def test_too_few_finite_losses_are_an_error_that_says_how_many():
    with pytest.raises(LossError, match=r"At least 3 .* but 2 of 4"):
        race(np.asarray([1, 0, 0, 1.0]), np.full(4, 0.5), 3)
    assert race(np.asarray([1, 0, 0, 1.0]), np.full(4, 0.5), 2).chosen.tolist() == [0, 3]


@settings(max_examples=100, deadline=None)
@given(groups=st.integers(1, 6), size=st.integers(1, 4), seed=st.integers(0, 2**32), data=st.data())
def test_groups_race_by_their_mean_weight(groups, size, seed, data):
    weight = data.draw(st.lists(WEIGHT, min_size=groups * size, max_size=groups * size))
    uniform = uniforms(seed, Purpose.SELECT, 0, 0, 0, groups * size)
    keys: dict[int, float] = {}
    for g in range(groups):
        members = weight[g * size : (g + 1) * size]
        if min(members) > 0:
            keys[g] = -math.log(uniform[g]) / (sum(members) / size)
    count = data.draw(st.integers(0, len(keys)))
    winners = sorted(sorted(keys, key=lambda g: (keys[g], g))[:count])
    expected = [g * size + k for g in winners for k in range(size)]
    assert race_groups(np.asarray(weight, np.float32), uniform, count * size, size).tolist() == expected
    if len(keys) < groups:
        with pytest.raises(LossError):
            race_groups(np.asarray(weight, np.float32), uniform, (len(keys) + 1) * size, size)


def test_mean_of_a_group_counts_and_not_its_largest_weight():
    weight = np.asarray([1, 1, 1, 9, 4, 4, 4, 4, 2, 2, 2, 2.0])
    assert race_groups(weight, np.full(12, 0.5), 4, 4).tolist() == [4, 5, 6, 7]
    assert race_groups(weight, np.full(12, 0.5), 8, 4).tolist() == list(range(8))


def test_inclusion_probabilities_by_integration():
    """For fixed other keys, the integral over u_i of 1[i chosen] / pi_i is 1: what makes the estimate unbiased."""
    weight, count, grid = np.asarray([0.5, 1.0, 3.0, 1.5]), 2, 2000
    others = np.asarray([0.3, 0.8, 0.55, 0.4])
    for i in range(4):
        total, largest = 0.0, 0.0
        for point in (np.arange(grid) + 0.5) / grid:
            uniform = others.copy()
            uniform[i] = point
            outcome = race(weight, uniform, count)
            if i in outcome.chosen:
                factor = inclusion_weights(weight, outcome, count)[outcome.chosen.tolist().index(i)]
                total += factor * len(weight) / count / grid
                largest = max(largest, factor * len(weight) / count)
        assert total == pytest.approx(1, abs=1.01 * largest / grid)


def test_inclusion_weights_make_the_mean_unbiased_by_simulation():
    weight = np.asarray([0.2, 0.5, 1.0, 1.0, 2.0, 4.0])
    value = np.asarray([1.0, 2.0, 3.0, 3.0, 5.0, 9.0])
    runs, count = 20_000, 4
    estimates, plain = np.empty(runs), np.empty(runs)
    for t in range(runs):
        outcome = race(weight, uniforms(2, Purpose.SELECT, 0, t, 0, 6), count)
        estimates[t] = (inclusion_weights(weight, outcome, count) * value[outcome.chosen]).mean()
        plain[t] = value[outcome.chosen].mean()
    error = estimates.std() / math.sqrt(runs)
    assert error < 0.05
    assert abs(estimates.mean() - value.mean()) < 4 * error
    assert abs(plain.mean() - value.mean()) > 20 * error  # without the weights it is far off


def test_inclusion_weights_are_one_where_everything_is_chosen():
    outcome = race(np.asarray([0.1, 2.0, 3.0]), np.asarray([0.2, 0.5, 0.9]), 3)
    assert inclusion_weights(np.asarray([0.1, 2.0, 3.0]), outcome, 3).tolist() == [1, 1, 1]


@settings(max_examples=200, deadline=None)
@given(
    ranks=st.integers(1, 6),
    micro=st.integers(1, 3),
    micros=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_sharing_out_is_even_complete_and_moves_no_more_than_it_must(ranks, micro, micros, seed, data):
    meta_batch = ranks * micro * micros
    share = data.draw(st.integers(1, micro * micros))
    chosen = np.sort(np.random.default_rng(seed).permutation(meta_batch)[: share * ranks])
    owner = owners(ranks, meta_batch, micro)
    parts = assign(chosen, owner, ranks)
    assert [len(part) for part in parts] == [share] * ranks
    assert sorted(np.concatenate(parts).tolist()) == chosen.tolist()
    assert all((np.diff(part) > 0).all() for part in parts)
    moved = sum(int((owner[part] != rank).sum()) for rank, part in enumerate(parts))
    own = [int((owner[chosen] == rank).sum()) for rank in range(ranks)]
    assert moved == sum(max(0, count - share) for count in own)


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(1, 5), micro=st.integers(1, 4), micros=st.integers(1, 4))
def test_positions_of_a_rank_are_those_of_upstreams_sampler(ranks, micro, micros):
    meta_batch = ranks * micro * micros
    expected: list[list[int]] = [[] for _ in range(ranks)]
    pending: list[int] = []
    for position in range(meta_batch):  # it fills micro * ranks positions, then hands each rank its run
        pending.append(position)
        if len(pending) == micro * ranks:
            for rank in range(ranks):
                expected[rank] += pending[rank * micro : (rank + 1) * micro]
            pending = []
    for rank in range(ranks):
        positions = positions_of(rank, ranks, meta_batch, micro)
        assert positions.tolist() == expected[rank]
        assert (owners(ranks, meta_batch, micro)[positions] == rank).all()


@settings(max_examples=200, deadline=None)
@given(
    samples=st.one_of(st.integers(1, 5000), st.integers(2**31, 2**34)),
    thousandths=st.integers(0, 999),
)
def test_kept_count_is_the_ceiling_for_the_decimal_that_was_written(samples, thousandths):
    exact = math.ceil((1 - Fraction(thousandths, 1000)) * samples)
    assert kept_count(samples, thousandths / 1000) == exact
    assert 1 <= exact <= samples


def test_kept_count_does_not_fall_for_the_rounding_of_floats():
    assert math.ceil((1 - 0.9) * 10) == 1
    assert math.ceil((1 - 0.1) * 10) == 9
    assert kept_count(10, 0.2) == 8
    assert kept_count(1000, 0.7) == 300  # (1 - 0.7) * 1000 is 300.00000000000006
    assert kept_count(7, 1e-5) == 7
    assert kept_count(5, 0) == 5


def test_pruning_keeps_subsets_with_their_exact_probability():
    exact = subset_probabilities(WEIGHTS, 2)
    weight = np.asarray(WEIGHTS, np.float32)
    kept = [
        tuple(np.flatnonzero(prune(weight, uniforms(8, Purpose.PRUNE, 1, epoch, 0, 5), 2)).tolist())
        for epoch in range(20_000)
    ]
    assert chi_square(counts_of(kept), [20_000 * exact[s] for s in SUBSETS]) < CHI_SQUARE_9


def test_pruning_ties_go_to_the_lower_row():
    assert prune(np.ones(5), np.full(5, 0.25), 3).tolist() == [True, True, True, False, False]
