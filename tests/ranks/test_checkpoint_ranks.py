"""Checkpoints between real processes; everything that needs none is in tests/unit."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from es_megatron.algorithm.ownership import owned_range
from es_megatron.checkpoint import CheckpointDirectory, EsState, load_es_state, save_es_state
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid
from tests.checkpoint_helper import MANIFEST, MASKS, make_scores, own_scores
from tests.ranks_helper import on_ranks, run_on_ranks

N = 100_003


def _save(root: Path, places: list[list[int]], iteration: int, seed: int = 0) -> None:
    grid = RankGrid.of_grid(places)
    with CheckpointDirectory(root, 2, grid).saving(iteration) as folder:
        (folder / f"model{grid.world_rank}.bin").write_bytes(bytes(1000 + grid.world_rank))
        masks = MASKS if grid.world_rank == 0 else {}
        save_es_state(folder / "es_state", own_scores(N, grid, seed), masks, {"it": iteration}, MANIFEST, grid)


def _load(root: Path, places: list[list[int]]) -> tuple[Path, EsState]:
    grid = RankGrid.of_grid(places)
    path = CheckpointDirectory(root, 2, grid).find()
    assert path is not None
    state = load_es_state(path / "es_state", N, grid, MANIFEST)
    assert (state.low, state.high) == owned_range(N, grid.dp_rank, grid.dp_size)
    return path, state


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([[0], [1]], [[0]]),
        ([[0]], [[0], [1], [2]]),
        ([[0, 1], [2, 3]], [[0], [1], [2]]),
        ([[0], [1], [2]], [[0, 2], [1, 3]]),
    ],
    ids=["dp2-dp1", "dp1-dp3", "dp2mp2-dp3", "dp3-dp2mp2"],
)
def test_another_layout(tmp_path: Path, before: list[list[int]], after: list[list[int]]) -> None:
    run_on_ranks(sum(map(len, before)), _save, tmp_path, before, 5)
    answers = run_on_ranks(sum(map(len, after)), _load, tmp_path, after)
    score, visits = make_scores(N)
    for path, state in answers:
        assert path == tmp_path / "iter_0000005"
        np.testing.assert_array_equal(state.score, score[state.low : state.high])
        np.testing.assert_array_equal(state.visits, visits[state.low : state.high])
        assert state.state == {"it": 5}
        assert set(state.masks) == set(MASKS)
    assert len({state.low for _, state in answers}) == len(after)


def test_damage_that_one_rank_sees_moves_all_ranks_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = [[0], [1], [2]]
    for iteration in (5, 10):
        run_on_ranks(3, _save, tmp_path, places, iteration)
    path = tmp_path / "iter_0000010" / "model1.bin"
    path.write_bytes(bytes(1000) + b"\x01")

    def find() -> tuple[Path | None, str]:
        with caplog.at_level(logging.WARNING):
            return CheckpointDirectory(tmp_path, 2, RankGrid.data_parallel()).find(), caplog.text

    found = run_on_ranks(3, find)
    assert [answer[0] for answer in found] == [tmp_path / "iter_0000005"] * 3
    assert str(path) in found[0][1]


@on_ranks(3)
def test_a_write_that_fails_on_one_rank_fails_on_all_and_the_run_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "run"
    places = [[0], [1], [2]]
    _save(root, places, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        # The kernel itself refuses to let a file of this rank grow; its scores take 166,672 bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    with pytest.raises(CheckpointError, match=r"rank 1: .*scores-00001-of-00003.safetensors: File too large"):
        _save(root, places, 10, seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000005", "latest"]
    path, state = _load(root, places)
    assert path.name == "iter_0000005"
    np.testing.assert_array_equal(state.score, make_scores(N)[0][state.low : state.high])
    dist.barrier()
    _save(root, places, 10, seed=1)
    assert _load(root, places)[0].name == "iter_0000010"
