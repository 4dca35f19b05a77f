"""Batch-size ramp-up: sizes and positions, the schedule and the feed over it, and the engine's step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.selection import positions_of
from es_megatron.core.engine import EvolvedSampling
from es_megatron.data.ramp import Ramp, Stage
from es_megatron.data.sampler import Sampler
from es_megatron.data.schedule import Origin, Schedule
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.frameworks.feed import MetaBatchFeed
from es_megatron.rank_grid import RankGrid
from tests.es_config import es_config
from tests.unit.naive import make_manifest
from tests.unit.test_engine import SIZES, Fake
from tests.unit.test_feed import Rows, ids_of

B = 16
RAMP = Ramp(B, (Stage(3, 4), Stage(2, 8), Stage(1, 12)))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=4), st.integers(9, 20), st.integers(0, 12))
def test_sizes_and_positions_are_those_of_a_list(stages: list[tuple[int, int]], full: int, begun: int) -> None:
    sizes = [size for count, size in sorted(stages, key=lambda each: each[1]) for _ in range(count)] + [full] * 30
    ramp = Ramp.of_sizes(sizes)
    assert ramp.iterations == sum(size < full for size in sizes)
    starts = [0, *itertools.accumulate(sizes)]
    assert [ramp.size(n) for n in range(30)] == sizes[:30]
    assert [ramp.position(n) for n in range(31)] == starts[:31]
    whose = [n for n, size in enumerate(sizes) for _ in range(size)]
    assert [ramp.iteration_at(p) for p in range(starts[30])] == whose[: starts[30]]
    left = ramp.after(begun)
    assert [left.size(n) for n in range(18)] == sizes[begun : begun + 18]


@pytest.mark.parametrize(
    ("start", "increment", "samples", "full", "expected"),
    [
        (4, 4, 48, 16, [4, 4, 4, 4, 8, 8, 12, 12, 16]),
        (8, 8, 0, 16, [16]),
        (16, 8, 100, 16, [16]),
        (4, 12, 10, 16, [4, 4, 4, 16]),
    ],
)
def test_the_rule_of_megatron(start: int, increment: int, samples: int, full: int, expected: list[int]) -> None:
    ramp = Ramp.linear(start, increment, samples, full)
    assert [ramp.size(n) for n in range(len(expected))] == expected
    assert (ramp.full, ramp.iterations) == (full, len(expected) - 1)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="must lead from its first size to 16 in whole steps, but is 4 5 100"):
        Ramp.linear(4, 5, 100, 16)
    with pytest.raises(ConfigError, match="must grow from iteration to iteration, but are 8, 4, 16"):
        Ramp(16, (Stage(2, 8), Stage(2, 4)))
    with pytest.raises(ConfigError, match=r"`--rampup-batch-size` must be a multiple of 8 .*, but 4, 12 are not"):
        RAMP.check(8, "--rampup-batch-size")
    RAMP.check(4, "--rampup-batch-size")


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    ratio=st.sampled_from([0.0, 0.2, 0.5]),
    anneal=st.sampled_from([0.0, 0.1, 0.3]),
    passes=st.integers(1, 6),
    begun=st.integers(0, 9),
    lag=st.integers(1, 4),
)
def test_no_epoch_that_begins_in_the_ramp_is_pruned(
    sizes: list[int], ratio: float, anneal: float, passes: int, begun: int, lag: int
) -> None:
    manifest, wanted = make_manifest(sizes), passes * sum(sizes) + 60
    origin = Origin(begun, RAMP.position(begun)) if begun else None
    schedule = Schedule(
        manifest, B, wanted, anneal=anneal, pruning_ratio=ratio, scores_imported=True, origin=origin, ramp=RAMP
    )
    last = schedule.iterations
    assert last == begun or schedule.stood_for(last - 1) < wanted <= schedule.stood_for(last)
    assert schedule.phases.start >= min(last, RAMP.iterations)
    decided = set[tuple[int, int]]()
    for iteration in range(begun, last):
        for due in schedule.due(iteration, lag):
            assert due.first_iteration >= max(iteration, RAMP.iterations)
            assert iteration == max(begun, due.first_iteration - lag)
            decided.add((due.component, due.epoch))
        positions = np.arange(schedule.position(iteration), schedule.position(iteration + 1))
        assert len(positions) == RAMP.size(iteration)
        component, draw = schedule.blend.locate(positions)
        place = schedule.epochs.place(component, draw)
        pruned = set(zip(component[place.pruned].tolist(), place.epoch[place.pruned].tolist(), strict=True))
        assert pruned <= decided


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_smaller_meta_batches_too(workers: int) -> None:
    schedule = Schedule(make_manifest((50, 13)), B, 20 * B, ramp=RAMP)
    seen: list[list[int]] = [[] for _ in range(9)]
    for rank in (0, 1):
        sampler = Sampler(schedule, seed=3)
        own = positions_of(rank, 2, B, 2)
        feed = MetaBatchFeed(Rows(), sampler, own, workers=workers, mask_lag=4)
        for iteration in range(9):
            batch = sampler.batch(iteration)
            feed.fetch(batch)
            mine = positions_of(rank, 2, len(batch.id), 2)
            assert ids_of(feed.micro_batches(mine, 2)) == batch.id[mine].tolist()
            assert ids_of(feed.micro_batches(np.asarray([3, 0]), 1)) == batch.id[[3, 0]].tolist()
            seen[iteration] += batch.id[mine].tolist()
    whole = Sampler(schedule, seed=3)
    assert [sorted(ids) for ids in seen] == [sorted(whole.batch(n).id.tolist()) for n in range(9)]


def make(ramp: Ramp | None = RAMP, **settings: Any) -> EvolvedSampling:
    config = es_config(**{"preset": "paper", "pruning_ratio": 0.3, "mask_lag": 3, "seed": 5, **settings})
    manifest, grid = make_manifest(SIZES), RankGrid.alone()
    return EvolvedSampling(config, manifest, grid, meta_batch=ramp or B, micro_batch=2, train_samples=40 * B)


@pytest.mark.parametrize("scorer", ["fresh", "history"])
def test_the_ramp_trains_on_everything_and_learns(scorer: str) -> None:
    engine = make(scorer=scorer, anneal=0.0)
    fake, trained, sizes = Fake(engine), list[int](), list[int]()
    while not engine.done:
        record = fake.iterate()
        trained.append(len(record.chosen))
        sizes.append(len(record.drawn))
        if record.iteration == RAMP.iterations - 1:
            seen = set(np.flatnonzero(engine.store.visits).tolist())
            assert len(seen) == len(set(np.concatenate([engine.sampler.batch(n).id for n in range(6)]).tolist()))
            assert not fake.scored
            assert np.isfinite(record.meta_loss)
    assert sizes == [RAMP.size(n) for n in range(len(sizes))]
    assert trained[:6] == sizes[:6] == [4, 4, 4, 8, 8, 12]
    assert set(trained[6:]) == {4}
    assert engine.plan.sequences_trained == sum(trained)
    assert engine.plan.sequences_scored == (B * len(fake.scored))


@pytest.mark.parametrize("stop", [2, 4, 9, 20])
def test_resume_inside_and_after_the_ramp(stop: int, tmp_path: Any) -> None:
    def run(engine: EvolvedSampling, until: int) -> list[list[int]]:
        fake = Fake(engine)
        return [fake.iterate().chosen.tolist() for _ in range(until - engine.iteration)]

    first = make()
    last = first.plan.schedule.iterations
    whole = run(make(), last)
    before = run(first, stop)
    first.save(tmp_path / "es_state")
    second = make()
    second.load(tmp_path / "es_state")
    assert before + run(second, last) == whole
    with pytest.raises(
        CheckpointError, match=r"`batch-size ramp-up` was \[\[3, 4\], \[2, 8\], \[1, 12\]\] and is \[\]"
    ):
        make(None).load(tmp_path / "es_state")
