"""Set-level pruners against their formulas, worked out by hand, and through the store."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from es_megatron.algorithm.pruners import PRUNERS, Block
from es_megatron.core.epoch_pruning import EpochPruning
from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import ConfigError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore
from tests.es_config import es_config

N = 1000


def keys(name: str, options=MappingProxyType({}), *, score, visits=None, uniform=None, mean=0.0, epoch=1) -> np.ndarray:
    score = np.asarray(score, np.float32)
    visits = np.ones(len(score), np.uint8) if visits is None else np.asarray(visits, np.uint8)
    uniform = np.full(len(score), 0.5) if uniform is None else np.asarray(uniform)
    return PRUNERS.make(name, options).keys(Block(score, visits, uniform, mean, epoch))


def test_eswp_is_the_race_and_random_ignores_scores():
    np.testing.assert_allclose(keys("eswp", score=[1, 2], uniform=[0.5, 0.25]), [math.log(2), math.log(2)])
    np.testing.assert_allclose(keys("random", score=[1, 9], uniform=[0.5, 0.25]), [math.log(2), math.log(4)])


def test_infobatch_keeps_what_is_not_below_the_mean_first():
    found = keys("infobatch", score=[1, 3, 2, 4], uniform=[0.1, 0.9, 0.2, 0.8], mean=2.0)
    assert found.tolist() == [1.1, 0.9, 0.2, 0.8]


def test_ucb_by_hand():
    found = keys("ucb", {"c": 2}, score=[1.0, 1.0, 3.0, 0.1], visits=[1, 4, 4, 0], epoch=3)
    bonus = [2 * math.sqrt(math.log(4) / visits) for visits in (1, 4, 4)]
    expected = [1 / (1 + score + more) for score, more in zip((1, 1, 3), bonus, strict=True)]
    np.testing.assert_allclose(found, [*expected, 0.0], rtol=1e-6)


def test_kakurenbo_hides_the_lowest_of_which_it_is_sure():
    limit = -math.log(0.05)
    found = keys("kakurenbo", score=[0.5, 1.0, limit + 0.1, 5.0], uniform=[0.3, 0.3, 0.9, 0.3])
    assert found.tolist() == pytest.approx([1 + 1 / 1.5, 1 + 1 / 2.0, 0.9, 0.3])
    assert PRUNERS.make("kakurenbo").corrects_rate


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("infobach", {}, "There is no pruner `infobach`. Did you mean `infobatch`?"),
        ("ucb", {"c": -1}, "`c` of pruner `ucb` must be >= 0"),
        ("kakurenbo", {"confidence": 0}, r"`confidence` of pruner `kakurenbo` must be in \(0, 1\]"),
    ],
)
def test_what_cannot_be_made(name: str, options: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        PRUNERS.make(name, options)


def store_of(pruner: str, *options: str, ratio: float = 0.2) -> ScoreStore:
    """A store of one component with scores 0.001, 0.002, ..., 1.0, all seen."""
    manifest = Manifest((Component("a", "a", N, 1.0, "f"),), 8)
    config = es_config(preset="paper", pruner=pruner, pruner_options=options, pruning_ratio=ratio)
    store = ScoreStore(manifest, config, RankGrid.alone())
    store.load(np.arange(1, N + 1, dtype=np.float32) / N, np.full(N, 3, np.uint8))
    return store


def test_infobatch_through_the_store():
    store = store_of("infobatch")
    stand_in = EpochPruning(store).stand_in(0)
    kept = EpochPruning(store).prune(0, 1).to_bool()
    below = store.score < np.float32(stand_in.threshold)
    assert stand_in.threshold == pytest.approx(0.5005, abs=1e-5)
    assert kept.sum() == 800
    assert kept[~below].all()
    assert stand_in.factor == pytest.approx(below.sum() / kept[below].sum())
    # the weighted sum over the kept stands for all of those below: 500 of them, of which 300 are kept
    assert below.sum() == 500
    assert stand_in.factor == pytest.approx(500 / 300)
    assert EpochPruning(store_of("eswp")).stand_in(0) is None


def test_infobatch_where_too_few_lie_below():
    store = store_of("infobatch", ratio=0.7)
    stand_in = EpochPruning(store).stand_in(0)
    kept = EpochPruning(store).prune(0, 1).to_bool()
    assert kept.sum() == 300
    assert not kept[store.score < stand_in.threshold].any()
    assert stand_in.factor == 1.0


def test_ranking_pruners_keep_exactly_the_best():
    assert EpochPruning(store_of("ucb")).prune(0, 1).to_bool().tolist() == [False] * 200 + [True] * 800
    assert (
        EpochPruning(store_of("kakurenbo", "confidence=0.0001")).prune(0, 1).to_bool().tolist()
        == [False] * 200 + [True] * 800
    )
    # of the 105 that are sure, all are hidden, and 95 more at random
    kept = EpochPruning(store_of("kakurenbo", f"confidence={math.exp(-0.1055)}")).prune(0, 1).to_bool()
    assert kept.sum() == 800
    assert not kept[:105].any()
    assert 0 < (~kept[105:]).sum() == 95
