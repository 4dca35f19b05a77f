"""The score store on one rank: staging, means, pruning against the plain race."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from es_megatron.algorithm.evolution import MAX_VISITS
from es_megatron.algorithm.pruners import kept_count
from es_megatron.algorithm.randomness import Purpose, component_key, uniforms
from es_megatron.core.epoch_pruning import EpochPruning
from es_megatron.data.manifest import Manifest
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore
from tests.es_config import es_config
from tests.unit.naive import make_manifest, prune

SIZES = (300, 40, 3)


def make(manifest: Manifest | None = None, **settings: Any) -> ScoreStore:
    config = es_config(preset="paper", **{"pruning_ratio": 0.3, "seed": 5, **settings})
    return ScoreStore(manifest or make_manifest(SIZES), config, RankGrid.alone())


def learn(store: ScoreStore, iteration: int, ids: Any, loss: Any) -> Any:
    ids, loss = np.asarray(ids, np.int64), np.asarray(loss, np.float32)
    found, shared = store.exchange(ids, loss)
    return store.evolve(iteration, ids, found, shared)


def test_nothing_is_written_before_the_commit() -> None:
    store = make(beta1=0.2)
    untouched = store.checksum()
    weight = learn(store, 0, [5, 310, 342], [1.0, 2.0, 3.0])
    np.testing.assert_allclose(weight, 0.2 / 343 + 0.8 * np.asarray([1, 2, 3]), rtol=1e-6)
    assert store.checksum() == untouched
    store.commit(0)
    np.testing.assert_allclose(store.score[[5, 310, 342]], 0.8 / 343 + 0.2 * np.asarray([1, 2, 3]), rtol=1e-6)
    assert np.flatnonzero(store.visits).tolist() == [5, 310, 342]


def test_staging_again_replaces_and_discarding_forgets() -> None:
    store = make()
    learn(store, 0, [5, 6], [1.0, 1.0])
    learn(store, 0, [7], [2.0])
    store.commit(0)
    assert np.flatnonzero(store.visits).tolist() == [7]
    before = store.checksum()
    learn(store, 1, [8], [2.0])
    store.discard()
    store.commit(1)
    assert store.checksum() == before


def test_a_commit_of_another_iteration_writes_nothing() -> None:
    store = make()
    before = store.checksum()
    learn(store, 3, [5], [1.0])
    store.commit(4)
    assert store.checksum() == before
    store.commit(3)
    assert store.checksum() == before, "what was staged is gone"


def test_a_sample_that_stands_twice_evolves_once_at_its_lowest_position() -> None:
    store = make(beta2=0.5)
    weight = learn(store, 0, [9, 4, 9, 9], [1.0, 2.0, 5.0, 7.0])
    store.commit(0)
    assert store.visits[9] == 1
    assert store.score[9] == pytest.approx(0.5 / 343 + 0.5 * 1.0)
    assert len(set(weight.tolist())) == 4, "each position has the weight of its own loss"
    learn(store, 1, [9, 9], [np.nan, 3.0])
    store.commit(1)
    assert store.score[9] == pytest.approx(0.5 * (0.5 / 343 + 0.5) + 0.5 * 3.0)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    store = make()
    weight = learn(store, 0, [1, 2, 3, 4], [1.0, np.nan, np.inf, -np.inf])
    store.commit(0)
    assert weight[1:].tolist() == [0, 0, 0]
    assert weight[0] > 0
    assert np.flatnonzero(store.visits).tolist() == [1]


def test_visits_saturate() -> None:
    store = make()
    for iteration in range(MAX_VISITS + 3):
        learn(store, iteration, [0], [1.0])
        store.commit(iteration)
    assert store.visits[0] == MAX_VISITS
    assert store.score[0] == pytest.approx(1.0)


@pytest.mark.parametrize("correction", ["paper", "debiased"])
def test_means_are_those_of_the_seen(correction: str) -> None:
    store = make(score_correction=correction, beta2=0.8)
    np.testing.assert_allclose(store.component_means(), 1 / 343)
    random = np.random.default_rng(0)
    for iteration in range(30):
        ids = random.choice(340, 16, replace=False)
        learn(store, iteration, ids, random.uniform(0.5, 4, 16))
        store.commit(iteration)
    means = store.component_means()
    for component, (low, high) in enumerate([(0, 300), (300, 340)]):
        seen = np.flatnonzero(store.visits[low:high]) + low
        score, left = store.score[seen].astype(np.float64), 0.8 ** store.visits[seen].astype(np.float64)
        used = score if correction == "paper" else (score - left / 343) / (1 - left)
        assert means[component] == pytest.approx(used.mean(), rel=1e-5)
    everything = np.flatnonzero(store.visits)
    score, left = store.score[everything].astype(np.float64), 0.8 ** store.visits[everything].astype(np.float64)
    used = score if correction == "paper" else (score - left / 343) / (1 - left)
    assert means[2] == pytest.approx(used.mean(), rel=1e-5), "none of it is seen: what is usual elsewhere"
    sums = store.sums.total.copy()  # pyright: ignore[reportPrivateUsage]
    store.load(store.score, store.visits)
    assert np.array_equal(store.sums.total, sums), "kept up to date, they are what counting anew gives"  # pyright: ignore[reportPrivateUsage]


def test_scores_that_no_loss_can_be_overflow_no_mean() -> None:
    store = make(score_correction="debiased", beta2=0.8)
    store.load(np.full(343, 1e30, np.float32), np.ones(343, np.uint8))
    assert (store.component_means() > 0).all()


def filled(store: ScoreStore, seen: float = 0.7, ties: bool = False) -> ScoreStore:
    random = np.random.default_rng(1)
    n = store.manifest.total
    score = random.choice([0.5, 1.0, 2.0], n) if ties else random.uniform(0, 4, n)
    visits = np.where(random.random(n) < seen, random.integers(1, 5, n), 0)
    store.load(np.where(visits > 0, score, 0).astype(np.float32), visits.astype(np.uint8))
    return store


def reference(store: ScoreStore, component: int, epoch: int, weight: Any) -> Any:
    size = int(store.manifest.sizes[component])
    name = component_key(store.manifest.components[component].name)
    uniform = uniforms(store.config.seed, Purpose.PRUNE, name, epoch, 0, size)
    return prune(weight, uniform, kept_count(size, store.config.pruning.ratio))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("component", [0, 1, 2])
def test_pruning_is_the_plain_race_over_scores(component: int, ties: bool) -> None:
    store = filled(make(), ties=ties)
    low, high = store.manifest.offsets[component : component + 2]
    seen, mean = (store.visits > 0)[low:high], np.float32(store.component_means()[component])
    score = np.where(seen, store.score[low:high], mean)
    for epoch in (1, 2, 7):
        mask = EpochPruning(store).prune(component, epoch).to_bool()
        assert np.array_equal(mask, reference(store, component, epoch, score))
    assert not np.array_equal(EpochPruning(store).prune(0, 1).to_bool(), EpochPruning(store).prune(0, 2).to_bool())


def test_rows_never_visited_lose_no_more_often_than_others() -> None:
    """With raw scores they counted as 1/n before, below every visited row, and were all of what was left out."""
    store = filled(make(), seen=0.5)
    seen = store.visits[:300] > 0
    pruning = EpochPruning(store)
    kept = np.mean([pruning.prune(0, epoch).to_bool() for epoch in range(40)], axis=0)
    assert kept[~seen].mean() == pytest.approx(kept[seen].mean(), abs=0.15)
    pruning.unvisited_as_mean = False  # as states of before go on
    before = np.mean([pruning.prune(0, epoch).to_bool() for epoch in range(40)], axis=0)
    assert before[~seen].mean() < before[seen].mean() - 0.4


def test_debiased_pruning_counts_the_unseen_as_the_mean() -> None:
    store = filled(make(score_correction="debiased", beta2=0.8, weight_floor=0.5))
    mean = store.component_means()[0]
    left = 0.8 ** store.visits[:300].astype(np.float64)
    seen = store.visits[:300] > 0
    debiased = np.maximum((store.score[:300] - left / 343) / np.where(seen, 1 - left, 1), 0).astype(np.float32)
    used = np.where(seen, debiased, mean).astype(np.float32)
    weight = np.maximum(np.maximum(used, np.finfo(np.float32).tiny), np.float32(0.5 * float(mean)))
    assert np.array_equal(EpochPruning(store).prune(0, 3).to_bool(), reference(store, 0, 3, weight))


def test_zero_scores_are_kept_last() -> None:
    store = make()
    score = np.zeros(343, np.float32)
    score[:150] = 1
    store.load(score, np.ones(343, np.uint8))
    mask = EpochPruning(store).prune(0, 1).to_bool()
    assert mask.sum() == 210
    assert mask[:150].all()


def test_the_uniform_arm_prunes_without_scores() -> None:
    store = filled(make(arm="uniform-prune"))
    assert np.array_equal(EpochPruning(store).prune(0, 1).to_bool(), reference(store, 0, 1, np.ones(300, np.float32)))


def test_the_placebo_keeps_as_many_but_others() -> None:
    honest, placebo = filled(make()), filled(make(arm="shuffled"))
    for component in range(3):
        kept, other = EpochPruning(honest).prune(component, 1), EpochPruning(placebo).prune(component, 1)
        assert kept.count == other.count
    kept, other = EpochPruning(honest).prune(0, 1).to_bool(), EpochPruning(placebo).prune(0, 1).to_bool()
    score = honest.score[:300]
    assert not np.array_equal(kept, other)
    assert score[kept].mean() > score[other].mean() + 0.1


def test_scores_of_another_range_are_refused() -> None:
    with pytest.raises(CheckpointError, match="must cover 343 samples of rank 0, but cover 5 instead"):
        make().load(np.zeros(5, np.float32), np.zeros(5, np.uint8))
