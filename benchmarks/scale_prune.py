"""Pruning: the store's exact threshold beside numpy's own ways to draw without replacement."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.scale_measure import measured
from es_megatron.algorithm.pruners import kept_count
from es_megatron.algorithm.randomness import Purpose, component_key, uniforms
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.epoch_pruning import EpochPruning, Rows, Scale
from es_megatron.data.manifest import Component, Manifest
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore
from es_megatron.scores.threshold import sample_count

RATIO = 0.2
BLOCK = 1 << 22


def one_component(samples: int) -> Manifest:
    return Manifest((Component("all", "all", samples, 1.0, "0"),), 4096)


def config(**groups: Any) -> EvolvedSamplingConfig:
    return EvolvedSamplingConfig.from_mapping({"preset": "paper", "pruning": {"ratio": RATIO}, "seed": 1, **groups})


def fill(store: ScoreStore) -> None:
    """Scores of a log-normal distribution, one in twenty samples unseen."""
    random = np.random.default_rng(store.low)
    pattern = random.lognormal(0.7, 0.5, BLOCK).astype(np.float32)
    visits = np.where(random.random(BLOCK) < 0.95, random.integers(1, 6, BLOCK), 0).astype(np.uint8)
    for start in range(0, len(store.score), BLOCK):
        part = store.score[start : start + BLOCK]
        part[:] = pattern[: len(part)] * np.float32(1 + start * 1e-12)
        store.visits[start : start + BLOCK] = visits[: len(part)]


def prune(samples: int) -> dict[str, Any]:
    """Decide the kept mask of one component on one rank."""
    store = ScoreStore(one_component(samples), config(), RankGrid.alone())
    fill(store)
    with measured() as cost:
        mask = EpochPruning(store).prune(0, 1)
    assert mask.count == kept_count(samples, RATIO)
    return {
        "samples": samples,
        "ns_per_sample": 1e9 * cost.cpu_seconds / samples,
        "clock_ns_per_sample": 1e9 * cost.seconds / samples,
        "extra_bytes_per_sample": cost.extra_bytes / samples,
    }


def argpartition(samples: int) -> dict[str, Any]:
    """The same kept set from all keys in memory and `numpy.argpartition`, held against the store's."""
    store = ScoreStore(one_component(samples), config(), RankGrid.alone())
    fill(store)
    count = kept_count(samples, RATIO)
    with measured() as cost:
        weight = np.where(store.visits == 0, np.float32(store.start), store.score)
        uniform = uniforms(store.config.seed, Purpose.PRUNE, component_key("all"), 1, 0, samples)
        keys = -np.log(uniform) / weight
        kept = np.zeros(samples, np.bool_)
        kept[np.argpartition(keys, count - 1)[:count]] = True
    same = bool(np.array_equal(EpochPruning(store).prune(0, 1).packed, np.packbits(kept, bitorder="little")))
    return {
        "samples": samples,
        "ns_per_sample": 1e9 * cost.cpu_seconds / samples,
        "extra_bytes_per_sample": cost.extra_bytes / samples,
        "same_set": same,
    }


def choice(samples: int) -> dict[str, Any]:
    """`Generator.choice(replace=False, p=...)`, which draws another set by the same law."""
    store = ScoreStore(one_component(samples), config(), RankGrid.alone())
    fill(store)
    with measured() as cost:
        weight = np.where(store.visits == 0, np.float32(store.start), store.score).astype(np.float64)
        weight /= weight.sum()
        kept = np.random.default_rng(0).choice(
            samples, kept_count(samples, RATIO), replace=False, p=weight, shuffle=False
        )
    assert len(kept) == kept_count(samples, RATIO)
    return {
        "samples": samples,
        "ns_per_sample": 1e9 * cost.cpu_seconds / samples,
        "extra_bytes_per_sample": cost.extra_bytes / samples,
    }


class OneOfMany(RankGrid):
    """A data-parallel rank whose peers are taken to hold what it holds."""

    def sum_over_dp(self, array: Any) -> Any:
        return array * self.dp_size if array.dtype == np.int64 else array


class SharePruning(EpochPruning):
    """Pruning on one rank whose peers are elsewhere; its bracket is sampled from its own rows."""

    def _sample_keys(self, component: int, epoch: int, scale: Scale) -> Any:
        score, visits = self.store.score, self.store.visits
        slots = np.linspace(0, len(score) - 1, sample_count(self.store.manifest.total)).astype(np.int64)
        uniform = np.random.default_rng(0).random(len(slots))
        rows = Rows(score[slots], visits[slots], uniform, None)
        return self._key(rows, component, epoch, scale)


def share(samples: int, ranks: int) -> dict[str, Any]:
    """What one of many ranks does for real: its own range, its own part of the decision, and the whole mask."""
    rank = ranks // 2
    store = ScoreStore(one_component(samples), config(), OneOfMany(rank, ranks, 0, 1, 0, 1))
    fill(store)
    held = len(store.score)
    with measured() as cost:
        mask = SharePruning(store).prune(0, 1)
    ids = np.random.default_rng(1).integers(0, samples, 16_384)
    loss = np.ones(len(ids), np.float32)
    steps = 20
    with measured() as step:
        for iteration in range(steps):
            found = store.lookup(ids)
            store.evolve(iteration, ids, found, loss)
            store.commit(iteration)
    ranks_of_kept = np.random.default_rng(2).integers(0, mask.count, 1 << 17)
    with measured() as select:
        mask.select(ranks_of_kept)
    return {
        "samples": samples,
        "ranks": ranks,
        "samples_of_rank": held,
        "store_bytes": 5 * held,
        "prune_seconds": cost.cpu_seconds,
        "prune_ns_per_sample_of_rank": 1e9 * cost.cpu_seconds / held,
        "prune_extra_bytes": cost.extra_bytes,
        "mask_bytes": sum(part.nbytes for part in mask.arrays),
        "evolve_local_ms": 1e3 * step.cpu_seconds / steps,
        "select_ns": 1e9 * select.cpu_seconds / len(ranks_of_kept),
    }


PARTS = {"prune": prune, "argpartition": argpartition, "choice": choice, "share": functools.partial(share, ranks=128)}
