"""The store at any block size, in a file, and its pruning in bits."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.core import epoch_pruning
from es_megatron.core.epoch_pruning import EpochPruning
from es_megatron.errors import ConfigError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores import store as store_module
from es_megatron.scores.store import ScoreStore, allocate
from es_megatron.scores.threshold import find_bracket, mark_kept, sample_count
from tests.es_config import es_config
from tests.unit.naive import make_manifest, prune

ALONE = RankGrid.alone()


def make(**settings: Any) -> ScoreStore:
    config = es_config(preset="paper", **{"pruning_ratio": 0.3, "seed": 5, **settings})
    store = ScoreStore(make_manifest((70_001, 3, 5000)), config, ALONE)
    random = np.random.default_rng(0)
    visits = random.integers(0, 4, store.manifest.total).astype(np.uint8)
    score = np.where(visits > 0, random.lognormal(0, 1, len(visits)), 0).astype(np.float32)
    store.load(score, visits)
    return store


@settings(max_examples=120, deadline=None)
@given(
    local=st.integers(1, 400),
    share=st.floats(0, 1),
    block=st.integers(1, 130),
    lead=st.integers(0, 7),
    kinds=st.integers(1, 50),
    sampled=st.integers(0, 60),
    seed=st.integers(0, 2**32),
)
def test_threshold_is_exact_for_every_block_size_and_bracket(local, share, block, lead, kinds, sampled, seed):
    random = np.random.default_rng(seed)
    keys = random.exponential(1, local)
    keys = keys[random.integers(0, min(kinds, local), local)]  # ties
    if random.random() < 0.3:
        keys[random.random(local) < 0.3] = np.inf
    count = round(share * local)

    def blocks() -> Any:
        return (keys[start : start + block] for start in range(0, local, block))

    sample = random.permutation(keys)[:sampled] * random.choice([0.5, 1.0, 2.0])  # also one that misleads
    packed = mark_kept(blocks, local, local, count, sample, ALONE, lead)
    bits = np.unpackbits(packed, bitorder="little").astype(np.bool_)
    expected = np.zeros(local, np.bool_)
    expected[np.argsort(keys, kind="stable")[:count]] = True
    np.testing.assert_array_equal(bits[lead : lead + local], expected)
    assert not bits[:lead].any()
    assert not bits[lead + local :].any()


@pytest.mark.parametrize("block", [1 << 16, 1000, 77])
@pytest.mark.parametrize("arm", ["es", "shuffled"])
def test_masks_do_not_depend_on_block_sizes(block, arm, monkeypatch):
    expected = [EpochPruning(make(arm=arm)).prune(component, 2).packed.tobytes() for component in range(3)]
    monkeypatch.setattr(epoch_pruning, "GATHERED_BYTES", 101)
    if arm == "es":
        monkeypatch.setattr(store_module, "BLOCK", block)
    assert [EpochPruning(make(arm=arm)).prune(component, 2).packed.tobytes() for component in range(3)] == expected


def test_bracket_of_a_large_component_is_narrow():
    assert [sample_count(n) for n in (10, 10**6, 10**8, 10**10)] == [10, 16_384, 262_144, 262_144]
    keys = np.random.default_rng(0).exponential(1, 262_144)
    low, high = find_bracket(keys, 0.8)
    bits = keys.view(np.uint64)
    assert np.mean((bits >= low) & (bits <= high)) < 0.012


def test_the_distributed_race_is_the_plain_one_at_100_000():
    weights = np.random.default_rng(1).lognormal(0, 1, 100_000)
    uniform = np.random.default_rng(2).random(100_000)
    keys = -np.log(uniform) / weights
    packed = mark_kept(lambda: [keys], 100_000, 100_000, 80_000, keys[::7], ALONE)
    np.testing.assert_array_equal(
        np.unpackbits(packed, bitorder="little", count=100_000), prune(weights, uniform, 80_000)
    )


def test_scores_in_a_file_are_those_in_memory_and_leave_no_name(tmp_path):
    memory, mapped = make(), make(score_folder=str(tmp_path))
    assert isinstance(mapped.score, np.memmap)
    assert isinstance(mapped.visits, np.memmap)
    assert os.listdir(tmp_path) == []
    for store in (memory, mapped):
        ids = np.arange(0, 70_000, 7)
        loss = np.random.default_rng(3).random(len(ids)).astype(np.float32)
        found, shared = store.exchange(ids, loss)
        store.evolve(0, ids, found, shared)
        store.commit(0)
    assert memory.checksum() == mapped.checksum()
    assert EpochPruning(memory).prune(0, 1).packed.tobytes() == EpochPruning(mapped).prune(0, 1).packed.tobytes()


def test_a_folder_that_cannot_hold_the_scores_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"`scores\.folder` must be a folder with room for 4000 bytes"):
        allocate(1000, np.float32, str(tmp_path / "missing"))
    assert len(allocate(0, np.uint8, str(tmp_path))) == 0


def test_loaded_scores_are_not_copied():
    store = make()
    score, visits = np.ones(75_004, np.float32), np.ones(75_004, np.uint8)
    store.load(score, visits)
    assert np.shares_memory(store.score, score)


def test_sums_stay_exact_over_a_thousand_components():
    manifest = make_manifest([3 + number % 5 for number in range(1000)])
    store = ScoreStore(manifest, es_config(preset="paper", score_correction="debiased", beta2=0.8), ALONE)
    random = np.random.default_rng(0)
    for iteration in range(30):
        ids = random.integers(0, manifest.total, 700)
        loss = random.lognormal(0, 1, 700).astype(np.float32)
        found, shared = store.exchange(ids, loss)
        store.evolve(iteration, ids, found, shared)
        store.commit(iteration)
    kept = store.sums.total.copy()
    store.load(store.score, store.visits)
    np.testing.assert_array_equal(kept, store.sums.total)
    np.testing.assert_array_equal(store.seen(), kept[:, 1])
    assert kept[:, 1].sum() == np.count_nonzero(store.visits)
