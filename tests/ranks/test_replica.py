"""Places in the grid and the collectives, over gloo."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from es_megatron.rank_grid import Replica
from tests.ranks_helper import on_ranks


def check_collectives(replica: Replica, grid: list[list[int]]) -> None:
    me = replica.world_rank
    assert grid[replica.dp_rank][replica.mp_rank] == me
    column = [row[replica.mp_rank] for row in grid]
    mine = np.asarray([me, 1], np.int64)
    assert replica.sum_over_dp(mine).tolist() == [sum(column), len(column)]
    assert mine.tolist() == [me, 1], "the argument is left alone"
    for source in range(replica.mp_size):
        assert replica.broadcast_over_mp(np.asarray([me]), source).tolist() == [grid[replica.dp_rank][source]]
    assert replica.tell(np.asarray([me + 0.5])).tolist() == [0.5]
    assert replica.tell_object({"from": me}) == {"from": 0}
    assert replica.gather_objects(me) == list(range(replica.world_size))
    replica.barrier()


@on_ranks(4)
def test_a_grid_of_two_by_two() -> None:
    grid = [[0, 2], [1, 3]]
    check_collectives(Replica.of_grid(grid), grid)


@on_ranks(4)
def test_everything_in_one_row_or_one_column() -> None:
    row = [[0, 1, 2, 3]]
    replica = Replica.of_grid(row)
    assert (replica.dp_size, replica.mp_size) == (1, 4)
    check_collectives(replica, row)
    column = [[0], [1], [2], [3]]
    replica = Replica.of_grid(column)
    assert (replica.dp_size, replica.mp_size) == (4, 1)
    check_collectives(replica, column)
    assert Replica.data_parallel().dp_rank == dist.get_rank()


@on_ranks(3)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_sums_are_exact_and_alike(dtype: str) -> None:
    replica = Replica.data_parallel()
    part = np.zeros((2, 9), dtype)
    part[:, replica.dp_rank :: 3] = (np.arange(3) + 7 * replica.dp_rank + 1) / 3 if "float" in dtype else 200
    whole = replica.sum_over_dp(part)
    assert whole.dtype == np.dtype(dtype)
    assert whole.shape == (2, 9)
    np.testing.assert_array_equal(whole[:, replica.dp_rank :: 3], part[:, replica.dp_rank :: 3])
    assert len(set(replica.gather_objects(whole.tobytes()))) == 1


@on_ranks(2)
def test_nan_and_infinity_reach_everybody() -> None:
    replica = Replica.data_parallel()
    part = np.asarray([np.nan, 0, 1], np.float32) if replica.dp_rank == 0 else np.asarray([0, np.inf, 1], np.float32)
    np.testing.assert_array_equal(replica.sum_over_dp(part), [np.nan, np.inf, 2])


@on_ranks(2)
def test_arrays_that_are_not_contiguous() -> None:
    replica = Replica.data_parallel()
    wide = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(replica.sum_over_dp(wide[:, ::2]), 2 * wide[:, ::2])
    np.testing.assert_array_equal(replica.tell(wide.T), wide.T)


def test_alone_needs_no_process_group() -> None:
    replica = Replica.alone()
    assert not dist.is_initialized()
    part = np.arange(3)
    assert replica.sum_over_dp(part) is part
    assert replica.broadcast_over_mp(part, 0) is part
    assert replica.tell(part) is part
    assert replica.tell_object("x") == "x"
    assert replica.gather_objects("x") == ["x"]
    replica.barrier()
    assert Replica.data_parallel() == replica
