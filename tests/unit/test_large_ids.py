"""Properties at the size of a real run: ids, rows and positions past 2^31 and 2^32, thousands of tiny components."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.ownership import owned_range
from es_megatron.algorithm.randomness import Purpose, raw
from es_megatron.algorithm.selection import positions_of
from es_megatron.data.blend import MAX_DRAWS, Blend
from es_megatron.data.permutation import ROUNDS, FeistelPermutation, radices, scramble
from es_megatron.data.sampler import Sampler
from es_megatron.data.schedule import Schedule
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import Lookup, ScoreStore
from tests.es_config import es_config
from tests.unit.naive import make_manifest

POWERS = (2**31, 2**32)
LARGE = st.one_of(*(st.integers(power - 3, power + 3) for power in POWERS), st.integers(POWERS[0], MAX_DRAWS // 3))
SEED = st.integers(0, 2**63 - 1)


def near_powers(n: int, data: st.DataObject, count: int = 300) -> np.ndarray:
    """Distinct numbers below n: at both ends, around 2^31 and 2^32, and anywhere."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    around = [np.arange(middle - 20, middle + 20) for middle in (20, *POWERS, n - 20)]
    found = np.unique(np.concatenate([*around, random.integers(0, n, count)]))
    return found[(found >= 0) & (found < n)]


def undo(value: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The way back through the network of `FeistelPermutation`, one element at a time and in whole numbers."""
    high_radix, low_radix = radices(n)
    found: list[int] = []
    for start in value.tolist():
        at = start
        while True:
            high, low = divmod(at, low_radix)
            for turn in reversed(range(ROUNDS)):
                key = keys[turn : turn + 1]
                if turn % 2 == 0:
                    high = (high - int(scramble(np.asarray([low], np.uint64), key)[0])) % high_radix
                else:
                    low = (low - int(scramble(np.asarray([high], np.uint64), key)[0])) % low_radix
            at = high * low_radix + low
            if at < n:
                break
        found.append(at)
    return np.asarray(found, np.int64)


@settings(max_examples=30, deadline=None)
@given(n=st.one_of(st.integers(1, 400), LARGE), seed=SEED, epoch=st.integers(0, 99), data=st.data())
def test_a_permutation_has_an_inverse_so_it_is_a_bijection(n, seed, epoch, data):
    index = near_powers(n, data, 40)
    found = FeistelPermutation(n, seed, 5, epoch, Purpose.PERMUTE)(index)
    assert found.min() >= 0
    assert found.max() < n
    np.testing.assert_array_equal(undo(found, n, raw(seed, Purpose.PERMUTE, 5, epoch, 0, ROUNDS)), index)


@settings(max_examples=25, deadline=None)
@given(
    components=st.integers(1000, 6000),
    smallest=st.integers(-300, -3),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_totals_of_thousands_of_tiny_weights_are_exact_and_never_negative(components, smallest, seed, data):
    random = np.random.default_rng(seed)
    weights = 10.0 ** random.uniform(smallest, 0, components)
    weights[random.random(components) < 0.1] = 0.0
    weights[random.integers(components)] = data.draw(st.sampled_from([1e-3, 1.0, 1e6]))
    blend = Blend(weights.tolist())
    totals = data.draw(st.lists(st.integers(0, MAX_DRAWS - 1), min_size=1, max_size=12))
    totals = sorted({0, *totals, *(power + step for power in POWERS for step in (-1, 0, 1)), MAX_DRAWS - 1})
    before = np.zeros(components, np.int64)
    for total in totals:
        counts = blend.counts(total)
        assert counts.sum() == total
        assert (counts >= before).all()
        assert not counts[weights == 0].any()
        before = counts
    start = data.draw(st.sampled_from(totals[:-1]))
    component, draw = blend.locate(np.arange(start, start + 500))
    running = blend.counts(start).copy()
    for c, d in zip(component.tolist(), draw.tolist(), strict=True):
        assert d == running[c]
        running[c] += 1
    np.testing.assert_array_equal(running, blend.counts(start + 500))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.one_of(LARGE, st.integers(1, 5000)), min_size=1, max_size=4), seed=SEED, data=st.data())
def test_batches_of_large_ids_are_the_same_for_every_number_of_ranks(sizes, seed, data):
    manifest = make_manifest([*sizes, data.draw(LARGE)])
    meta_batch = 24 * data.draw(st.integers(1, 40))
    train = min(2 * manifest.total, MAX_DRAWS - 10**6)
    sampler = Sampler(Schedule(manifest, meta_batch, train), seed)
    first = data.draw(st.integers(0, sampler.schedule.iterations - 3))
    seen: dict[tuple[int, int], list[np.ndarray]] = {}
    for iteration in range(first, first + 3):
        batch = sampler.batch(iteration)
        ranks = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
        ids = np.full(meta_batch, -1)
        for rank in range(ranks):
            own = positions_of(rank, ranks, meta_batch, 1)
            component, _, row = Sampler(sampler.schedule, seed).rows(iteration * meta_batch + own)
            ids[own] = manifest.sample_ids(component, row)
        np.testing.assert_array_equal(ids, batch.id)
        component, row = manifest.locate(batch.id)
        np.testing.assert_array_equal(component, batch.component)
        np.testing.assert_array_equal(row, batch.row)
        assert (batch.row < manifest.sizes[batch.component]).all()
        for c, epoch in set(zip(batch.component.tolist(), batch.epoch.tolist(), strict=True)):
            seen.setdefault((c, epoch), []).append(batch.row[(batch.component == c) & (batch.epoch == epoch)])
    for rows in seen.values():
        found = np.concatenate(rows)
        assert len(np.unique(found)) == len(found), "no row twice in an epoch"


@settings(max_examples=25, deadline=None)
@given(n=LARGE, ranks=st.integers(160, 400), data=st.data())
def test_scores_of_large_ids_land_on_their_owner_alone(n, ranks, data):
    ids = near_powers(n, data)
    picked = data.draw(st.sampled_from(ids.tolist()))
    rank = next(r for r in range(ranks) if picked < owned_range(n, r, ranks)[1])
    low, high = owned_range(n, rank, ranks)
    ids = np.unique(np.concatenate([ids, [low, high - 1]]))
    own = (ids >= low) & (ids < high)
    store = ScoreStore(
        make_manifest([n // 3, n - n // 3]),
        es_config(preset="paper"),
        RankGrid(rank, ranks, 0, 1, 0, 1),
    )
    loss = np.random.default_rng(0).lognormal(0, 1, len(ids)).astype(np.float32)
    score, visits = store.stored(ids)
    assert not visits.any()
    store.evolve(4, ids, Lookup(score, visits, score), loss)
    staged = store._staged
    assert staged is not None
    store.commit(4)
    score, visits = store.stored(ids)
    np.testing.assert_array_equal(visits, own.astype(np.uint8))
    np.testing.assert_array_equal(np.flatnonzero(store.visits) + low, ids[own])
    np.testing.assert_array_equal(score[own], staged.score)
    assert not score[~own].any()
