"""The store over 1 to 4 ranks: whatever the number, the same scores, means and masks, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from es_megatron.core.epoch_pruning import EpochPruning
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore
from tests.es_config import es_config
from tests.ranks_helper import run_on_ranks
from tests.unit.naive import make_manifest

SIZES = (1500, 130, 9, 1)
"""The last ones are smaller than the number of ranks, or fall into one rank's range."""
EPOCHS = (1, 4)
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "debiased-floor": {"score_correction": "debiased", "weight_floor": 0.5},
    "shuffled": {"arm": "shuffled"},
    "uniform": {"arm": "uniform-prune"},
    "hard": {"pruning_ratio": 0.97},
}


def run(settings: dict[str, Any], scores: str) -> Any:
    """Learn over some iterations, then prune everything; what all ranks hold, joined."""
    manifest = make_manifest(SIZES)
    store = ScoreStore(
        manifest,
        es_config(preset="paper", **{"pruning_ratio": 0.3, "seed": 3, **settings}),
        RankGrid.data_parallel(),
    )
    grid, random = store.grid, np.random.default_rng(0)
    weights = []
    for iteration in range(40):
        ids = random.choice(manifest.total, 32, replace=iteration % 3 == 0)
        loss = losses_of(scores, ids, random)
        own = np.arange(32) % grid.dp_size == grid.dp_rank
        found, shared = store.exchange(ids, np.where(own, loss, np.float32(0)))
        np.testing.assert_array_equal(shared, loss)
        weights.append(store.evolve(iteration, ids, found, shared).tobytes())
        if iteration % 7 == 3:
            store.discard()
        store.commit(iteration)
    masks = {(c, e): EpochPruning(store).prune(c, e).packed.tobytes() for c in range(len(SIZES)) for e in EPOCHS}
    means = store.component_means().tobytes()
    parts = grid.gather_objects((store.low, store.score.tobytes(), store.visits.tobytes()))
    assert [part[0] for part in parts] == sorted(part[0] for part in parts)
    return weights, masks, means, b"".join(part[1] for part in parts), b"".join(part[2] for part in parts)


def losses_of(scores: str, ids: Any, random: Any) -> Any:
    """Losses as float32; the same on every rank."""
    loss = random.uniform(0.1, 5, len(ids)).astype(np.float32)
    if scores == "ties":
        loss = np.float32(ids % 3)  # many equal, a third of them zero
    if scores == "bad":
        loss[::5] = np.nan
        loss[1] = np.inf
    return loss


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    return {}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_ranks_is_like_one(ranks: int, variant: str, alone: dict[Any, Any]) -> None:
    if variant not in alone:
        alone[variant] = run_on_ranks(1, run, VARIANTS[variant], "plain")[0]
    for found in run_on_ranks(ranks, run, VARIANTS[variant], "plain"):
        assert found == alone[variant]


@pytest.mark.parametrize("scores", ["ties", "bad"])
def test_ties_zeros_and_bad_losses_are_like_on_one_rank(scores: str) -> None:
    expected = run_on_ranks(1, run, {}, scores)[0]
    for ranks in (2, 4):
        for found in run_on_ranks(ranks, run, {}, scores):
            assert found == expected


def test_equal_keys_go_to_the_lower_id() -> None:
    """With all keys equal only the id is left to decide, across the border of ranks too."""
    from es_megatron.core import epoch_pruning

    def keep() -> list[int]:
        epoch_pruning.uniforms = lambda *_: np.full(_[-1], 0.5)
        manifest = make_manifest((200,))
        store = ScoreStore(manifest, es_config(preset="paper", pruning_ratio=0.37), RankGrid.data_parallel())
        return np.flatnonzero(EpochPruning(store).prune(0, 1).to_bool()).tolist()

    for ranks in (1, 2, 3, 4):
        for kept in run_on_ranks(ranks, keep):
            assert kept == list(range(126))


def test_copies_of_a_range_agree() -> None:
    """Two data-parallel ranks of two model-parallel ranks each."""

    def run_grid() -> tuple[int, int, bytes]:
        grid = RankGrid.of_grid([[0, 1], [2, 3]])
        manifest = make_manifest(SIZES)
        store = ScoreStore(manifest, es_config(preset="paper", pruning_ratio=0.3), grid)
        random = np.random.default_rng(0)
        for iteration in range(5):
            ids = random.choice(manifest.total, 32, replace=False)
            found, shared = store.exchange(
                ids, np.where(np.arange(32) % 2 == grid.dp_rank, np.float32(2), np.float32(0))
            )
            store.evolve(iteration, ids, found, shared)
            store.commit(iteration)
        return grid.dp_rank, store.checksum(), EpochPruning(store).prune(0, 1).packed.tobytes()

    told = run_on_ranks(4, run_grid)
    assert told[0] == told[1]
    assert told[2] == told[3]
    assert told[0][1] != told[2][1]
    assert len({mask for _, _, mask in told}) == 1
