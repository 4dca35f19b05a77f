"""Length of a run and edges of its epochs against a simulation that counts draws one at a time."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.phases import Phases
from es_megatron.data.blend import MAX_DRAWS, round_weights
from es_megatron.data.schedule import Schedule
from es_megatron.errors import ConfigError
from tests.unit.naive import Draw, draws, epochs, make_manifest


class Run(NamedTuple):
    """What a schedule was asked for, and what it is."""

    sizes: list[int]
    weights: list[float]
    ratio: float
    anneal: float
    imported: bool
    schedule: Schedule

    def simulate(self, extra: int = 0) -> list[Draw]:
        """Every draw of the run, from the question and the phases alone."""
        schedule = self.schedule
        components = draws(round_weights(self.weights).tolist())
        evolving = schedule.phases.evolving
        first = 0 if self.imported else 1
        walk = epochs(self.sizes, components, schedule.meta_batch, self.ratio, evolving, first)
        return list(itertools.islice(walk, schedule.iterations * schedule.meta_batch + extra))


@st.composite
def runs(draw: st.DrawFn) -> Run:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    weights = draw(st.lists(st.sampled_from([0.25, 1.0, 1.7, 3.0]), min_size=len(sizes), max_size=len(sizes)))
    ratio = draw(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.8]))
    anneal = draw(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5]))
    imported = draw(st.booleans())
    schedule = Schedule(
        make_manifest(sizes, weights),
        meta_batch=draw(st.integers(1, 16)),
        train_samples=draw(st.integers(1, 5 * sum(sizes))),
        anneal=anneal,
        pruning_ratio=ratio,
        scores_imported=imported,
    )
    return Run(sizes, weights, ratio, anneal, imported, schedule)


@settings(max_examples=80, deadline=None)
@given(run=runs())
def test_every_draw_stands_where_counting_puts_it(run):
    expected = run.simulate()
    component, draw = run.schedule.blend.locate(np.arange(len(expected)))
    place = run.schedule.epochs.place(component, draw)
    assert component.tolist() == [d.component for d in expected]
    assert place.epoch.tolist() == [d.epoch for d in expected]
    assert place.index.tolist() == [d.index for d in expected]
    assert place.pruned.tolist() == [d.pruned for d in expected]
    for c, number, d in zip(component.tolist(), draw.tolist(), expected, strict=True):
        assert int(run.schedule.epochs.start(c, d.epoch)) == number - d.index


@settings(max_examples=80, deadline=None)
@given(run=runs())
def test_run_ends_exactly_when_it_stands_for_train_samples(run):
    schedule = run.schedule
    stood_for, ended = Fraction(0), None
    expected = run.simulate()
    for position, d in enumerate(expected, start=1):
        stood_for += d.stands_for
        if ended is None and position % schedule.meta_batch == 0 and stood_for >= schedule.train_samples:
            ended = position // schedule.meta_batch
    assert ended == schedule.iterations
    if run.ratio == 0:
        assert ended == math.ceil(schedule.train_samples / schedule.meta_batch)
    passes = [
        sum((d.stands_for for d in expected if d.component == c), Fraction(0)) / size
        for c, size in enumerate(run.sizes)
    ]
    assert schedule.passes().tolist() == pytest.approx([float(p) for p in passes], rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(run=runs())
def test_both_ends_anneal_for_their_share_also_where_length_and_phases_do_not_agree(run):
    schedule = run.schedule
    planned = schedule.phases.iterations
    assert schedule.phases == Phases(planned, run.anneal)
    assert planned <= schedule.iterations
    ends = math.ceil(Fraction(str(run.anneal)) * planned)
    for iteration in range(schedule.iterations):
        if iteration < ends or iteration >= schedule.iterations - ends:
            assert not schedule.phases.evolving(iteration)


def test_run_whose_length_and_phases_never_agree_ends_on_time_and_anneals_a_little_longer():
    def iterations_needed(phases: Phases) -> int:
        stood_for = Fraction(0)
        for position, d in enumerate(epochs([100], itertools.repeat(0), 10, 0.2, phases.evolving), start=1):
            stood_for += d.stands_for
            if position % 10 == 0 and stood_for >= 900:
                return position // 10
        raise AssertionError

    needed = {length: iterations_needed(Phases(length, 0.1)) for length in range(60, 91)}
    assert all(length != needed[length] for length in needed)
    schedule = Schedule(make_manifest([100]), 10, 900, anneal=0.1, pruning_ratio=0.2)
    assert schedule.iterations == needed[schedule.phases.iterations] == 76
    assert (schedule.phases.start, schedule.iterations - schedule.phases.stop) == (8, 10)  # a tenth is 8


@settings(max_examples=80, deadline=None)
@given(run=runs(), lag=st.integers(1, 9))
def test_each_pruned_epoch_is_due_once_and_in_time(run, lag):
    schedule = run.schedule
    expected = {
        (d.component, d.epoch, position // schedule.meta_batch)
        for position, d in enumerate(run.simulate())
        if d.pruned and d.index == 0
    }
    found = []
    for iteration in range(schedule.iterations):
        for due in schedule.due(iteration, lag):
            assert iteration == max(0, due.first_iteration - lag)
            found.append(tuple(due))
    assert sorted(found) == sorted(expected)


def test_epoch_edges_of_a_small_run_by_hand():
    # 10 rows, 4 passes, meta-batches of 5, r = 0.2; the plain run has 8 iterations. Epoch 0 takes iterations 0-1, then
    # 8 draws an epoch: 10, 18, 26 and done at 34 draws, so 7 iterations
    schedule = Schedule(make_manifest([10]), 5, 40, pruning_ratio=0.2)
    assert schedule.iterations == 7
    assert schedule.epochs.start(0, np.arange(5)).tolist() == [0, 10, 18, 26, 34]
    assert schedule.due(0, 2) == [(0, 1, 2)]
    assert [schedule.due(i, 2) for i in range(1, 7)] == [[(0, 2, 3)], [], [(0, 3, 5)], [(0, 4, 6)], [], []]
    assert schedule.passes(2).tolist() == [1.0]
    assert schedule.passes(3).tolist() == pytest.approx([1 + 5 / 8])


def test_epoch_zero_is_pruned_only_with_imported_scores():
    plain = Schedule(make_manifest([10]), 5, 40, pruning_ratio=0.2)
    imported = Schedule(make_manifest([10]), 5, 40, pruning_ratio=0.2, scores_imported=True)
    assert not plain.epochs.place(0, np.arange(10)).pruned.any()
    assert imported.epochs.place(0, np.arange(10)).pruned.all()
    assert imported.due(0, 1)[0] == (0, 0, 0)
    annealed = Schedule(make_manifest([10]), 5, 400, pruning_ratio=0.2, scores_imported=True, anneal=0.1)
    assert not annealed.epochs.place(0, np.arange(10)).pruned.any()  # it begins in the opening annealing


def test_part_draws_of_many_components_add_up():
    # 300 components stand at fractions of a draw; rounding each of them down would cost whole iterations
    sizes = [7 + c % 13 for c in range(300)]
    schedule = Schedule(make_manifest(sizes), 8, 5 * sum(sizes), pruning_ratio=0.3)
    stood_for, ended = Fraction(0), 0
    walk = epochs(sizes, draws(round_weights(sizes).tolist()), 8, 0.3, schedule.phases.evolving)
    for position, d in enumerate(walk, start=1):
        stood_for += d.stands_for
        if position % 8 == 0 and stood_for >= schedule.train_samples:
            ended = position // 8
            break
    assert schedule.iterations == ended


def test_thirds_of_a_draw_that_make_a_whole_one_are_not_lost():
    # 3 components of 4 rows, of which 3 are kept: after 12 draws each further one stands for 4/3, three of them for 4
    schedule = Schedule(make_manifest([4, 4, 4]), 3, 16, pruning_ratio=0.25)
    assert schedule.blend.counts(15).tolist() == [5, 5, 5]
    assert schedule.iterations == 5


@pytest.mark.parametrize("samples", [2**31 + 5, 3_700_000_000, 5_000_000_000])
@pytest.mark.parametrize("tenths", [15, 19, 22, 29])
def test_run_over_a_component_past_32_bits(samples, tenths):
    # index * n passes int64 above 3.04 G samples
    if samples * tenths // 10 > MAX_DRAWS - 20_000:
        samples = 2**31 + 5
    train = samples * tenths // 10
    schedule = Schedule(make_manifest([samples]), 16_384, train, pruning_ratio=0.2)
    kept = math.ceil(Fraction(4, 5) * samples)
    needed = samples + Fraction(train - samples) * kept / samples
    assert schedule.iterations == math.ceil(needed / 16_384)
    half = (samples + kept * 9 // 10) // 16_384
    expected = 1 + (half * 16_384 - samples) / kept
    assert schedule.passes(half)[0] == pytest.approx(expected, rel=1e-9)
    if tenths == 15:
        due = [due for i in range(samples // 16_384 - 12, samples // 16_384 + 3) for due in schedule.due(i, 4)]
        assert due == [(0, 1, samples // 16_384)]


def test_thousands_of_components_start_at_once_and_are_due_in_time():
    sizes = np.random.default_rng(0).integers(1, 3_000_000, 2000).tolist()
    schedule = Schedule(make_manifest(sizes), 16_384, 3 * sum(sizes), anneal=0.05, pruning_ratio=0.2)
    draws_off = np.abs(schedule.passes() - 3) * sizes
    # the tree is off by its depth, weights by half of 2^-28 of 9e9 draws, the last meta-batch by its share; over 0.8
    allowed = (11 + 17 + 16_384 * np.asarray(sizes) / sum(sizes)) / 0.8
    assert (draws_off <= allowed).all()
    first = schedule.iterations // 2
    found = [due for i in range(first, first + 3) for due in schedule.due(i, 8)]
    for component, epoch, iteration in found:
        draw = int(schedule.epochs.start(component, epoch))
        assert schedule.blend.counts(iteration * 16_384)[component] <= draw
        assert schedule.blend.counts((iteration + 1) * 16_384)[component] > draw
        assert first + 8 <= iteration <= first + 10


def test_run_past_what_positions_reach_is_refused():
    with pytest.raises(ConfigError, match=r"`train_samples` must be below 17179868160 .* but is 17179869184"):
        Schedule(make_manifest([10]), 1024, MAX_DRAWS)
    last = Schedule(make_manifest([10]), 1024, MAX_DRAWS - 1025)
    assert last.iterations == 2**24 - 1


def test_no_pruning_means_nothing_is_due():
    schedule = Schedule(make_manifest([3, 5]), 4, 100)
    assert all(schedule.due(i, 3) == [] for i in range(schedule.iterations))
    assert not schedule.epochs.place(np.zeros(100, int), np.arange(100)).pruned.any()
    assert schedule.epochs.place(0, np.arange(100)).epoch.tolist() == [d // 3 for d in range(100)]
