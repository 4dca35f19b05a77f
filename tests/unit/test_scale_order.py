"""What makes the order fast at any size: many permutations and many masks at once, and orders that begin late."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.randomness import component_key
from es_megatron.data import permutation as permutation_module
from es_megatron.data.mask import KeptMask, lay_out, mask_bytes, select_of_many
from es_megatron.data.permutation import EXPLICIT_LIMIT, EpochOrder, Orders, permutation
from es_megatron.data.sampler import Sampler
from es_megatron.data.schedule import Origin, Schedule
from tests.unit.naive import make_manifest

SIZES = st.one_of(
    st.integers(1, 300), st.sampled_from([EXPLICIT_LIMIT, EXPLICIT_LIMIT + 1, 10**6, 2**31 + 5, 3_700_000_000])
)


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), SIZES), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
def test_many_permutations_at_once_are_each_the_right_one(epochs, data):
    keys = [component_key(f"c{number}") for number in range(4)]
    orders = Orders(7, keys)
    wanted = [EpochOrder(*epoch) for epoch in epochs]
    for _ in range(2):  # the second time they are known
        lengths = np.asarray([data.draw(st.integers(1, 20)) for _ in wanted])
        random = np.random.default_rng(data.draw(st.integers(0, 99)))
        index = np.concatenate([random.integers(0, e.size, n) for e, n in zip(wanted, lengths, strict=True)])
        found = orders(wanted, lengths, index)
        parts = np.split(np.arange(len(index)), np.cumsum(lengths)[:-1])
        for each, part in zip(wanted, parts, strict=True):
            alone = permutation(each.size, 7, keys[each.component], each.epoch)
            np.testing.assert_array_equal(found[part], alone(index[part]))


def test_permutations_that_are_dropped_come_back_the_same(monkeypatch):
    monkeypatch.setattr(permutation_module, "EXPLICIT_BYTES", 3000)
    monkeypatch.setattr(permutation_module, "MAX_SLOTS", 3)
    orders = Orders(1, [5, 6])
    wanted = [EpochOrder(c, e, n) for c in range(2) for e in range(4) for n in (1000, 70_000)]
    for _ in range(3):
        for each in wanted:
            index = np.arange(0, each.size, 37)
            found = orders([each], np.asarray([len(index)]), index)
            np.testing.assert_array_equal(found, permutation(each.size, 1, 5 + each.component, each.epoch)(index))
            orders.forget()
        held = sum(order.order.nbytes for order in orders._explicit.values())
        assert held <= 3000
        assert len(orders._slot) <= 4


@settings(max_examples=80, deadline=None)
@given(
    masks=st.lists(
        st.tuples(st.integers(1, 30_000), st.sampled_from([0.0005, 0.02, 0.5, 0.9, 1.0])) | st.none(),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**32),
)
def test_many_masks_at_once_tell_what_each_tells_alone(masks, seed):
    random = np.random.default_rng(seed)
    held, ranks, expected = [], [], []
    for each in masks:
        asked = random.integers(0, 50, random.integers(1, 30))
        if each is not None:
            kept = random.random(each[0]) < each[1]
            if each[1] < 0.1:  # long stretches without a kept row, past what the hints cover
                kept[: len(kept) // 2] = False
            kept[random.integers(0, len(kept))] = True
            rows = np.flatnonzero(kept)
            asked = random.integers(0, len(rows), len(asked))
            held.append(KeptMask.from_bool(kept))
            expected.append(rows[asked])
        else:
            held.append(None)
            expected.append(asked)
        ranks.append(asked)
    flat = np.concatenate(ranks)
    select_of_many(held, np.asarray([len(part) for part in ranks]), flat)
    np.testing.assert_array_equal(flat, np.concatenate(expected))


def test_a_mask_takes_little_more_than_its_bits():
    for samples in (1, 511, 512, 513, 10**6, 3_700_000_000):
        assert mask_bytes(samples) <= samples * 1.2 / 8 + 100
    buffer = np.zeros(mask_bytes(1000), np.uint8)
    assert sum(part.nbytes for part in lay_out(buffer, 1000)) == len(buffer)


def test_batches_do_not_depend_on_how_many_are_asked_for_at_once(monkeypatch):
    from es_megatron.data import sampler as sampler_module

    schedule = Schedule(make_manifest([70_000, 300, 7, 100_000]), 64, 10**6)
    positions = np.random.default_rng(0).integers(0, 10**6, 5000)
    whole = np.stack(Sampler(schedule, 3).rows(positions))
    for piece in (1 << 6, 999):
        monkeypatch.setattr(sampler_module, "PIECE", piece)
        np.testing.assert_array_equal(np.stack(Sampler(schedule, 3).rows(positions)), whole)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    meta_batch=st.integers(1, 16),
    begun=st.integers(0, 30),
    stood_for=st.integers(0, 60),
    samples=st.integers(1, 200),
    ratio=st.sampled_from([0.0, 0.2, 0.5]),
    anneal=st.sampled_from([0.0, 0.1, 0.3]),
    scored=st.sets(st.integers(0, 3)),
)
def test_an_order_that_begins_late_is_one_from_zero_with_what_is_left(
    sizes, meta_batch, begun, stood_for, samples, ratio, anneal, scored
):
    manifest = make_manifest(sizes)
    names = tuple(f"c{number}" for number in sorted(scored))
    origin = Origin(begun, stood_for, names)
    assert Origin.from_json(origin.to_json()) == origin
    late = Schedule(manifest, meta_batch, stood_for + samples, anneal=anneal, pruning_ratio=ratio, origin=origin)
    assert late.stood_for(begun) == stood_for
    if late.iterations > begun:
        assert late.stood_for(late.iterations) >= stood_for + samples > late.stood_for(late.iterations - 1)
    # what it draws is what any order draws from its beginning, but for which epochs are pruned
    fresh = Schedule(manifest, meta_batch, max(samples, 1))
    np.testing.assert_array_equal(late.blend.locate(np.arange(50))[0], fresh.blend.locate(np.arange(50))[0])
    count, first = [0] * len(sizes), {}
    length = late.iterations - begun
    for position in range(length * meta_batch):
        c = int(late.blend.locate(np.asarray([position]))[0][0])
        place = late.epochs.place(c, np.asarray([count[c]]))
        key = (c, int(place.epoch[0]))
        if key not in first:
            first[key] = begun + position // meta_batch
            begins_pruned = ratio > 0 and late.phases.evolving(first[key])
            assert bool(place.pruned[0]) == (begins_pruned and (key[1] > 0 or f"c{c}" in names))
        count[c] += 1
    begins = {key: late.epochs.start(key[0], np.asarray([key[1]])) for key in first}
    pruned = {key for key, draw in begins.items() if late.epochs.place(key[0], draw).pruned[0]}
    expected = sorted((*key, first[key]) for key in pruned)
    found = [tuple(due) for i in range(begun, late.iterations) for due in late.due(i, 3)]
    assert sorted(found) == expected


def test_an_order_that_begins_late_serves_its_own_iterations():
    manifest = make_manifest([50, 20])
    late = Sampler(Schedule(manifest, 10, 200, origin=Origin(7, 70)), 1)
    plain = Sampler(Schedule(manifest, 10, 200), 1)
    for iteration in range(5):
        np.testing.assert_array_equal(late.batch(7 + iteration).id, plain.batch(iteration).id)
        assert late.batch(7 + iteration).iteration == 7 + iteration


def test_stood_for_is_exact_with_pruning():
    # 10 rows, 8 kept: 10 draws of epoch 0, then 8 that stand for 10
    schedule = Schedule(make_manifest([10]), 2, 40, pruning_ratio=0.2)
    assert [schedule.stood_for(i) for i in range(10)] == [
        int(sum(itertools.islice(itertools.chain([Fraction(1)] * 10, itertools.repeat(Fraction(10, 8))), 2 * i)))
        for i in range(10)
    ]


@pytest.mark.slow
def test_a_thousand_components_of_a_real_run_start_within_a_second():
    import time

    shares = np.random.default_rng(0).lognormal(0, 1.5, 1000)
    sizes = np.maximum(1, (shares / shares.sum() * 3.7e9).astype(np.int64)).tolist()
    manifest = make_manifest(sizes)
    began = time.process_time()
    schedule = Schedule(manifest, 16_384, 3 * manifest.total, anneal=0.05, pruning_ratio=0.2)
    sampler = Sampler(schedule, 1)
    batch = sampler.batch(0)
    assert time.process_time() - began < 1.0
    assert len(np.unique(batch.component)) > 800
    positions = np.arange(200_000) + schedule.position(schedule.iterations // 7)
    began = time.process_time()
    sampler.rows(positions)
    assert len(positions) / (time.process_time() - began) > 500_000  # measured: several times as many
