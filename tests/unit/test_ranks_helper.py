"""The helper that runs tests on several ranks: values, fixtures, failures, deaths and hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks_helper import RankFailure, on_ranks, run_on_ranks


def _sum_of_ranks(scale: int) -> tuple[int, int, str]:
    total = torch.tensor([dist.get_rank() * scale])
    dist.all_reduce(total)
    return dist.get_rank(), int(total), f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}/{os.environ['LOCAL_RANK']}"


def test_values_come_back_by_rank() -> None:
    assert run_on_ranks(3, _sum_of_ranks, 10) == [(0, 30, "0/3/0"), (1, 30, "1/3/1"), (2, 30, "2/3/2")]


def test_environment_and_group_of_the_parent_stay_as_they_were() -> None:
    before = dict(os.environ)
    run_on_ranks(2, _sum_of_ranks, 1)
    assert dict(os.environ) == before
    assert not dist.is_initialized()


@pytest.mark.parametrize(("n", "fn", "timeout"), [(1, "x", 0), (2, "y", 0)])
@on_ranks(2)
def test_decorator_passes_parameters_also_by_the_names_of_its_own(n: int, fn: str, timeout: int) -> None:
    assert (n, fn, timeout) in [(1, "x", 0), (2, "y", 0)]
    assert dist.get_world_size() == 2


def test_decorated_body_runs_on_every_rank(tmp_path: Path) -> None:
    @on_ranks(2)
    def body(folder: Path) -> None:
        (folder / str(dist.get_rank())).touch()

    body(folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@on_ranks(2)
def test_decorated_test_sees_its_fixtures(tmp_path: Path) -> None:
    (tmp_path / f"rank{dist.get_rank()}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.get_num_threads() == 1


def test_closures_and_unpicklable_arguments_reach_the_ranks() -> None:
    assert run_on_ranks(2, lambda make: make() + dist.get_rank(), lambda: 5) == [5, 6]


def test_exception_of_one_rank_names_it_and_shows_where() -> None:
    def fail_on_one() -> None:
        if dist.get_rank() == 1:
            raise KeyError("lost sheep")

    with pytest.raises(RankFailure, match=r"rank 1 of 2: error(.|\n)*fail_on_one(.|\n)*lost sheep") as caught:
        run_on_ranks(2, fail_on_one)
    assert "rank 0" not in str(caught.value)


def test_failing_rank_ends_those_that_wait_for_it() -> None:
    def wait_for_the_dead() -> None:
        if dist.get_rank() == 0:
            raise ValueError("left early")
        time.sleep(50)

    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 0 of 2: error(.|\n)*left early(.|\n)*rank 1 of 2: hung"):
        run_on_ranks(2, wait_for_the_dead)
    assert time.monotonic() - start < 20
    assert psutil.Process().children() == []


def test_death_without_a_word_is_told_with_its_exit_code() -> None:
    def die() -> None:
        if dist.get_rank() == 1:
            os._exit(7)

    with pytest.raises(RankFailure, match=r"rank 1 of 2: died(.|\n)*exit code 7"):
        run_on_ranks(2, die)


def test_hang_ends_in_time_and_shows_the_stack() -> None:
    def sleep_for_ever() -> None:
        time.sleep(100)

    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 0 of 2: hung(.|\n)*sleep_for_ever(.|\n)*rank 1 of 2: hung"):
        run_on_ranks(2, sleep_for_ever, timeout=3)
    assert time.monotonic() - start < 20
    assert psutil.Process().children() == []


def _start_sleepers() -> int:
    return subprocess.Popen(["sleep", "300"]).pid


def test_what_a_rank_started_ends_with_it() -> None:
    for pid in run_on_ranks(2, _start_sleepers):
        assert _has_ended(pid)


def _has_ended(pid: int) -> bool:
    """Whether a process that was sent SIGKILL ends; the kernel may take a moment, and nobody may reap orphans."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_killed_rank_is_told_with_its_signal() -> None:
    with pytest.raises(RankFailure, match=r"rank 0 of 2: died(.|\n)*exit code -9"):
        run_on_ranks(2, lambda: os.kill(os.getpid(), signal.SIGKILL) if dist.get_rank() == 0 else None)


def test_value_that_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises(RankFailure, match="of type function cannot be pickled"):
        run_on_ranks(1, lambda: lambda: 1)


def test_large_values_come_back_whole() -> None:
    values = run_on_ranks(2, lambda: torch.full((1_000_000,), float(dist.get_rank())))
    assert [float(value.sum()) for value in values] == [0.0, 1_000_000.0]


def test_skip_on_all_ranks_skips() -> None:
    with pytest.raises(pytest.skip.Exception, match="not today"):
        run_on_ranks(2, lambda: pytest.skip("not today"))


def test_skip_on_some_ranks_fails() -> None:
    with pytest.raises(RankFailure, match=r"rank 0 of 2: skip"):
        run_on_ranks(2, lambda: pytest.skip("half") if dist.get_rank() == 0 else None)


def test_xfail_travels() -> None:
    with pytest.raises(pytest.xfail.Exception, match="known"):
        run_on_ranks(2, lambda: pytest.xfail("known"))


def test_body_may_destroy_the_group_itself() -> None:
    assert run_on_ranks(2, dist.destroy_process_group) == [None, None]


def test_number_of_ranks_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        run_on_ranks(0, _sum_of_ranks, 1)
