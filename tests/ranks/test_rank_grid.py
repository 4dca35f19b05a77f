"""Places in the places and the collectives, over gloo."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from es_megatron.rank_grid import RankGrid
from tests.ranks_helper import on_ranks


def check_collectives(grid: RankGrid, places: list[list[int]]) -> None:
    me = grid.world_rank
    assert places[grid.dp_rank][grid.mp_rank] == me
    column = [row[grid.mp_rank] for row in places]
    mine = np.asarray([me, 1], np.int64)
    assert grid.sum_over_dp(mine).tolist() == [sum(column), len(column)]
    assert mine.tolist() == [me, 1], "the argument is left alone"
    for source in range(grid.mp_size):
        assert grid.broadcast_over_mp(np.asarray([me]), source).tolist() == [places[grid.dp_rank][source]]
    assert grid.broadcast(np.asarray([me + 0.5])).tolist() == [0.5]
    assert grid.broadcast_object({"from": me}) == {"from": 0}
    assert grid.gather_objects(me) == list(range(grid.world_size))
    grid.barrier()


@on_ranks(4)
def test_a_grid_of_two_by_two() -> None:
    places = [[0, 2], [1, 3]]
    check_collectives(RankGrid.of_grid(places), places)


@on_ranks(4)
def test_everything_in_one_row_or_one_column() -> None:
    row = [[0, 1, 2, 3]]
    grid = RankGrid.of_grid(row)
    assert (grid.dp_size, grid.mp_size) == (1, 4)
    check_collectives(grid, row)
    column = [[0], [1], [2], [3]]
    grid = RankGrid.of_grid(column)
    assert (grid.dp_size, grid.mp_size) == (4, 1)
    check_collectives(grid, column)
    assert RankGrid.data_parallel().dp_rank == dist.get_rank()


@on_ranks(4)
def test_ranks_that_share_a_sequence() -> None:
    places = [[2, 0, 3, 1]]  # two stages, then the same stages of the other half of the sequence
    grid = RankGrid.of_grid(places, context=2)
    assert grid.cp_size == 2
    check_collectives(grid, places)
    peers = {2: 3, 3: 2, 0: 1, 1: 0}
    mine = np.asarray([grid.world_rank, 1.0])
    assert grid.sum_over_cp(mine).tolist() == [grid.world_rank + peers[grid.world_rank], 2.0]
    assert mine.tolist() == [grid.world_rank, 1.0], "the argument is left alone"
    assert RankGrid.of_grid(places).sum_over_cp(mine) is mine


@on_ranks(3)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_sums_are_exact_and_alike(dtype: str) -> None:
    grid = RankGrid.data_parallel()
    part = np.zeros((2, 9), dtype)
    part[:, grid.dp_rank :: 3] = (np.arange(3) + 7 * grid.dp_rank + 1) / 3 if "float" in dtype else 200
    whole = grid.sum_over_dp(part)
    assert whole.dtype == np.dtype(dtype)
    assert whole.shape == (2, 9)
    np.testing.assert_array_equal(whole[:, grid.dp_rank :: 3], part[:, grid.dp_rank :: 3])
    assert len(set(grid.gather_objects(whole.tobytes()))) == 1


@on_ranks(2)
def test_nan_and_infinity_reach_everybody() -> None:
    grid = RankGrid.data_parallel()
    part = np.asarray([np.nan, 0, 1], np.float32) if grid.dp_rank == 0 else np.asarray([0, np.inf, 1], np.float32)
    np.testing.assert_array_equal(grid.sum_over_dp(part), [np.nan, np.inf, 2])


@on_ranks(2)
def test_arrays_that_are_not_contiguous() -> None:
    grid = RankGrid.data_parallel()
    wide = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(grid.sum_over_dp(wide[:, ::2]), 2 * wide[:, ::2])
    np.testing.assert_array_equal(grid.broadcast(wide.T), wide.T)


def test_alone_needs_no_process_group() -> None:
    grid = RankGrid.alone()
    assert not dist.is_initialized()
    part = np.arange(3)
    assert grid.sum_over_dp(part) is part
    assert grid.broadcast_over_mp(part, 0) is part
    assert grid.broadcast(part) is part
    assert grid.broadcast_object("x") == "x"
    assert grid.gather_objects("x") == ["x"]
    grid.barrier()
    assert RankGrid.data_parallel() == grid
