"""The feed: samples by position, moved rows, restarts, and loader workers that change nothing."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch

from es_megatron.algorithm.selection import positions_of
from es_megatron.data.sampler import MetaBatch, Sampler
from es_megatron.data.schedule import Schedule
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.feed import MetaBatchFeed, collate
from tests.unit.naive import make_manifest

B, T = 12, 4
MANIFEST = make_manifest((50, 13))


class Rows:
    """Sample n holds n everywhere; it notes what is read in this process."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        self.read.append(sample_id)
        return {"tokens": torch.full((T,), sample_id), "loss_mask": torch.full((T,), sample_id / 2)}


def make(rank: int = 0, ranks: int = 2, rows: Rows | None = None, **options: Any) -> tuple[MetaBatchFeed, Sampler, Any]:
    sampler = Sampler(Schedule(MANIFEST, B, 20 * B), seed=3)
    own = positions_of(rank, ranks, B, 2)
    return MetaBatchFeed(rows or Rows(), sampler, own, **options), sampler, own


def ids_of(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["tokens"]]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_positions(rank: int) -> None:
    feed, sampler, own = make(rank)
    for iteration in range(5):
        batch = sampler.batch(iteration)
        feed.fetch(batch)
        packed = feed.micro_batches(own, 2)
        assert ids_of(packed) == batch.id[own].tolist()
        assert [tuple(each["tokens"].shape) for each in packed] == [(2, T)] * 3
        assert all(torch.equal(each["loss_mask"], each["tokens"] / 2) for each in packed)


def test_any_positions_in_any_order_also_of_other_ranks() -> None:
    rows = Rows()
    feed, sampler, own = make(0, rows=rows)
    batch = sampler.batch(0)
    feed.fetch(batch)
    rows.read.clear()
    foreign = [p for p in range(B) if p not in own][:2]
    wanted = np.asarray([own[3], foreign[0], own[0], foreign[1]])
    packed = feed.micro_batches(wanted, 4)
    assert ids_of(packed) == batch.id[wanted].tolist()
    assert rows.read == batch.id[foreign].tolist(), "only what moved is read again"
    assert ids_of(feed.micro_batches(own, 6)) == batch.id[own].tolist()


def test_fetching_the_same_iteration_again_reads_nothing() -> None:
    rows = Rows()
    feed, sampler, own = make(rows=rows)
    feed.fetch(sampler.batch(0))
    count = len(rows.read)
    feed.fetch(sampler.batch(0))
    assert len(rows.read) == count
    assert ids_of(feed.micro_batches(own, 2)) == sampler.batch(0).id[own].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_going_elsewhere_restarts_the_loader(workers: int) -> None:
    feed, sampler, own = make(workers=workers, prefetch=2, mask_lag=4)
    for iteration in (0, 1, 7, 8, 2, 19):
        batch = sampler.batch(iteration)
        feed.fetch(batch)
        assert ids_of(feed.micro_batches(own, 2)) == batch.id[own].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_starts_draws_from_no_generator_of_the_model(workers: int) -> None:
    feed, sampler, _ = make(workers=workers, prefetch=2, mask_lag=4)
    before = torch.get_rng_state()
    for iteration in (0, 1, 9):
        feed.fetch(sampler.batch(iteration))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_that_was_killed_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    feed, sampler, own = make(workers=2, prefetch=2, mask_lag=4)
    for iteration in range(8):
        batch = sampler.batch(iteration)
        if iteration in (2, 5):
            loader: Any = feed._loader
            victim = loader._workers[iteration % 2]
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
        feed.fetch(batch)
        assert ids_of(feed.micro_batches(own, 2)) == batch.id[own].tolist()
    told = [record.getMessage() for record in caplog.records]
    assert 1 <= len(told) <= 2, "a worker whose rows had all been read ahead may be missed only at the next start"
    assert all("starts again" in each for each in told)


class Deadly(Rows):
    """Ends the process that reads it, or raises in it."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        if self.error is not None:
            raise self.error
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(sample_id)


@pytest.mark.slow
def test_workers_that_are_killed_time_and_again() -> None:
    feed, sampler, _ = make(rows=Deadly(), workers=1, prefetch=1, mask_lag=1)
    with pytest.raises(DataError, match=r"killed 3 times in a row at iteration 0\. Is there enough memory"):
        feed.fetch(sampler.batch(0))


def test_what_a_worker_raises_is_told(caplog: pytest.LogCaptureFixture) -> None:
    feed, sampler, _ = make(rows=Deadly(RuntimeError("bad row")), workers=1, prefetch=1, mask_lag=1)
    with pytest.raises(RuntimeError, match="bad row"):
        feed.fetch(sampler.batch(0))
    assert caplog.records == []


def test_workers_must_not_run_ahead_of_the_masks() -> None:
    make(workers=2, prefetch=2, mask_lag=4)
    with pytest.raises(
        ConfigError, match=r"`order.mask_lag` must be >= 4 .* but is 3 instead. Raise it, or use fewer workers"
    ):
        make(workers=2, prefetch=2, mask_lag=3)


def test_workers_read_meta_batches_of_masks_decided_late() -> None:
    """With the lag that is asked for, a worker never needs a mask before it is there."""
    schedule = Schedule(MANIFEST, B, 20 * B, pruning_ratio=0.5, anneal=0.0)
    sampler = Sampler(schedule, seed=3)
    own = positions_of(0, 1, B, 2)
    feed = MetaBatchFeed(Rows(), sampler, own, workers=2, prefetch=2, mask_lag=4)
    from es_megatron.data.mask import KeptMask

    random = np.random.default_rng(0)
    seen: list[MetaBatch] = []
    for iteration in range(schedule.iterations):
        for due in schedule.due(iteration, 4):
            size = int(MANIFEST.sizes[due.component])
            kept = np.zeros(size, bool)
            kept[random.permutation(size)[: -(-size // 2)]] = True
            sampler.masks[due.component, due.epoch] = KeptMask.from_bool(kept)
        seen.append(sampler.batch(iteration))
        feed.fetch(seen[-1])
        assert ids_of(feed.micro_batches(own, 3)) == seen[-1].id.tolist()
    assert len(sampler.masks) > 4


def test_micro_batches_before_a_fetch_are_a_mistake() -> None:
    feed, _, own = make()
    with pytest.raises(RuntimeError, match="`fetch` must be called before"):
        feed.micro_batches(own, 2)


def test_collate_stacks_name_by_name() -> None:
    rows = Rows()
    stacked = collate([rows[3], rows[5]])
    assert stacked["tokens"].tolist() == [[3] * T, [5] * T]
    assert stacked["loss_mask"].dtype == torch.float32
