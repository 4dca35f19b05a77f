"""Meta-batches against a walk of the run that counts draws, and what makes them the same everywhere."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.selection import positions_of
from es_megatron.data.blend import round_weights
from es_megatron.data.mask import KeptMask
from es_megatron.data.sampler import Sampler
from es_megatron.data.schedule import Schedule
from es_megatron.errors import ConfigError
from tests.unit.naive import draws, epochs, make_manifest


def random_mask(schedule: Schedule, component: int, epoch: int, ratio: float) -> KeptMask:
    size = int(schedule.manifest.sizes[component])
    count = math.ceil((1 - Fraction(str(ratio))) * size)
    kept = np.zeros(size, bool)
    kept[np.random.default_rng([component, epoch]).permutation(size)[:count]] = True
    return KeptMask.from_bool(kept)


def give_masks(sampler: Sampler, ratio: float) -> None:
    """Every mask of the run, decided at random."""
    schedule = sampler.schedule
    for iteration in range(schedule.iterations):
        for due in schedule.due(iteration, 1):
            mask = random_mask(schedule, due.component, due.epoch, ratio)
            sampler.masks[due.component, due.epoch] = mask


def make_sampler(sizes=(23, 1, 70, 41), weights=(1.0, 0.2, 2.0, 2.5), seed=5, ratio=0.3, passes=4) -> Sampler:
    schedule = Schedule(make_manifest(sizes, weights), 12, passes * sum(sizes), anneal=0.1, pruning_ratio=ratio)
    sampler = Sampler(schedule, seed)
    give_masks(sampler, ratio)
    return sampler


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    ratio=st.sampled_from([0.0, 0.2, 0.5]),
    meta_batch=st.integers(1, 60),  # components smaller than a meta-batch are legal
    anneal=st.sampled_from([0.0, 0.1]),
    data=st.data(),
)
def test_every_kept_row_exactly_once_an_epoch_over_epochs_and_rank_counts(sizes, seed, ratio, meta_batch, anneal, data):
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=len(sizes), max_size=len(sizes)))
    schedule = Schedule(make_manifest(sizes, weights), meta_batch, 4 * sum(sizes), anneal=anneal, pruning_ratio=ratio)
    sampler = Sampler(schedule, seed)
    give_masks(sampler, ratio)
    walk = epochs(sizes, draws(round_weights(weights).tolist()), meta_batch, ratio, schedule.phases.evolving)
    expected = list(itertools.islice(walk, schedule.iterations * meta_batch))
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    position = 0
    for iteration in range(schedule.iterations):
        ranks = (
            data.draw(st.sampled_from([d for d in (1, 2, 3, 4) if meta_batch % d == 0])) if iteration % 5 == 0 else 1
        )
        batch = [np.full(meta_batch, -1) for _ in range(3)]
        for rank in range(ranks):  # each rank asks for its own positions alone
            own = positions_of(rank, ranks, meta_batch, 1)
            for whole, part in zip(batch, sampler.rows(position + own), strict=True):
                whole[own] = part
        for c, epoch, row in zip(*(part.tolist() for part in batch), strict=True):
            assert (c, epoch) == (expected[position].component, expected[position].epoch)
            assert len(rows[c, epoch]) == expected[position].index
            rows[c, epoch].append(row)
            position += 1
    pruned = {(d.component, d.epoch) for d in expected if d.pruned}
    assert set(sampler.masks) == pruned
    for (c, epoch), found in rows.items():
        allowed = np.flatnonzero(sampler.masks[c, epoch].to_bool()) if (c, epoch) in pruned else np.arange(sizes[c])
        assert len(set(found)) == len(found)
        assert set(found) <= set(allowed.tolist())
        if (c, epoch + 1) in rows:  # the epoch was drawn to its end
            assert sorted(found) == allowed.tolist()


def test_batches_are_the_same_for_every_split_and_order_of_positions():
    sampler = make_sampler()
    schedule = sampler.schedule
    size = schedule.meta_batch
    whole = [sampler.batch(i) for i in range(schedule.iterations)]
    assert {int(b.epoch.max()) for b in whole} >= {0, 1, 2}
    for ranks, micro in ((1, 4), (2, 1), (2, 3), (3, 2), (4, 3), (12, 1)):
        fresh = make_sampler()
        for batch in reversed(whole):
            for rank in range(ranks):
                own = positions_of(rank, ranks, size, micro)
                component, epoch, row = fresh.rows(batch.iteration * size + own)
                np.testing.assert_array_equal(component, batch.component[own])
                np.testing.assert_array_equal(epoch, batch.epoch[own])
                np.testing.assert_array_equal(row, batch.row[own])
    everything = np.random.default_rng(0).permutation(schedule.iterations * size)
    found = np.stack(sampler.rows(everything))
    expected = np.stack([np.concatenate([getattr(b, k) for b in whole]) for k in ("component", "epoch", "row")])
    np.testing.assert_array_equal(found, expected[:, everything])


def test_no_positions_are_no_rows():
    assert [part.shape for part in make_sampler().rows(np.empty(0, np.int64))] == [(0,)] * 3


def test_ids_are_offset_plus_row():
    sampler = make_sampler()
    batch = sampler.batch(7)
    assert batch.iteration == 7
    offsets = [0, 23, 24, 94]
    expected = [offsets[c] + row for c, row in zip(batch.component.tolist(), batch.row.tolist(), strict=True)]
    assert batch.id.tolist() == expected
    assert batch.id.dtype == np.int64


def test_epochs_and_seeds_have_their_own_order():
    def order(sampler: Sampler, epoch: int) -> list[int]:
        component, drawn, row = sampler.rows(np.arange(sampler.schedule.iterations * 12))
        return row[(component == 2) & (drawn == epoch)].tolist()

    plain = make_sampler(ratio=0.0)
    assert sorted(order(plain, 0)) == sorted(order(plain, 1)) == list(range(70))
    assert order(plain, 0) != order(plain, 1)
    assert order(plain, 0) != order(make_sampler(ratio=0.0, seed=6), 0)
    assert order(plain, 0) == order(make_sampler(ratio=0.0), 0)
    pruned = make_sampler(ratio=0.3)
    assert (2, 1) in pruned.masks
    assert order(pruned, 1) != sorted(order(pruned, 1))
    assert order(pruned, 1) != order(make_sampler(ratio=0.3, seed=6), 1)  # of the same kept rows


def test_components_of_equal_size_do_not_share_an_order():
    sampler = Sampler(Schedule(make_manifest([500, 500]), 10, 1000), 1)
    component, _, row = sampler.rows(np.arange(1000))
    assert (row[component == 0] == row[component == 1]).sum() < 10


def test_order_of_a_component_does_not_depend_on_its_neighbours():
    alone = Sampler(Schedule(make_manifest([300]), 10, 300), 1).rows(np.arange(300))[2]
    component, epoch, row = Sampler(Schedule(make_manifest([300, 77]), 10, 900), 1).rows(np.arange(900))
    np.testing.assert_array_equal(row[(component == 0) & (epoch == 0)], alone)


def test_missing_mask_names_epoch_component_and_cure():
    sampler = make_sampler()
    (component, epoch), _ = sampler.masks.popitem()
    first = sampler.schedule.blend.position(component, int(sampler.schedule.epochs.start(component, epoch)))
    with pytest.raises(ConfigError, match=rf"Epoch {epoch} of component `c{component}` .*`mask_lag`"):
        sampler.batch(first // sampler.schedule.meta_batch)
    sampler.rows(np.arange(first))  # up to there nothing is missing


def test_masks_are_forgotten_when_their_epoch_is_over_and_not_before():
    whole, sampler = make_sampler(), make_sampler()
    schedule = sampler.schedule
    held = len(sampler.masks)
    for iteration in range(schedule.iterations):
        sampler.forget(iteration)
        np.testing.assert_array_equal(sampler.batch(iteration).id, whole.batch(iteration).id)
        seen = schedule.blend.counts(iteration * schedule.meta_batch)
        for component, epoch in whole.masks:
            over = schedule.epochs.start(component, epoch + 1) <= seen[component]
            assert ((component, epoch) in sampler.masks) == (not over)
    assert len(sampler.masks) < held


@pytest.mark.parametrize("samples", [2**31 + 11, 2**32 + 15, 3_700_000_000])
def test_identity_past_32_bits(samples):
    sampler = Sampler(Schedule(make_manifest([1000, samples, 50]), 4096, 2 * samples), 3)
    assert sampler.manifest.total == samples + 1050
    last = sampler.schedule.iterations - 1
    batches = [sampler.batch(i) for i in (last // 2 - 1, last // 3, last)]
    ids = np.concatenate([batch.id for batch in batches])
    assert len(np.unique(ids)) > 0.999 * len(ids)
    assert (ids > 2**31).any()
    assert ids.max() < sampler.manifest.total
    assert ids.min() >= 0
    component, row = sampler.manifest.locate(ids)
    np.testing.assert_array_equal(component, np.concatenate([batch.component for batch in batches]))
    np.testing.assert_array_equal(row, np.concatenate([batch.row for batch in batches]))


def test_epoch_edge_of_a_component_past_32_bits():
    samples = 2**32 + 15
    sampler = Sampler(Schedule(make_manifest([samples]), 1000, 2 * samples), 3)
    component, epoch, row = sampler.rows(np.arange(samples - 5000, samples + 5000))
    assert epoch.tolist() == [0] * 5000 + [1] * 5000
    assert not component.any()
    assert len(np.unique(row[:5000])) == len(np.unique(row[5000:])) == 5000


def test_order_is_the_one_of_the_first_release():
    """A checkpoint holds a position, not an order: the order may never change under it."""
    small = make_sampler(ratio=0.0).batch(30)
    big = Sampler(Schedule(make_manifest([100_000, 3_700_000_000]), 4, 10**9), 7).batch(2**27)
    assert small.id.tolist() == [14, 86, 113, 112, 52, 6, 127, 26, 123, 54, 12, 109]
    assert big.id.tolist() == [1_217_146_026, 2_353_503_486, 2_633_275_732, 2_605_045_413]
