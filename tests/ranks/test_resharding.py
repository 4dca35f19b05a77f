"""The same scores, masks and next 1,000 global batches after a move between numbers of ranks.

{1, 2, 3, 4} squared through real checkpoints of real processes, {1, 2, 3, 4, 6, 8, 12, 24} squared through the pure
functions alone. The number of samples is a prime, so that nothing divides it.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.algorithm.ownership import owned_range, owned_shards, shard_bounds
from es_megatron.checkpoint import CheckpointDirectory, ScoreRange, load_es_state, save_es_state
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.epoch_pruning import EpochPruning
from es_megatron.core.step import Trained
from es_megatron.data.manifest import Manifest
from es_megatron.data.mask import KeptMask
from es_megatron.rank_grid import RankGrid
from tests.es_config import es_config
from tests.ranks_helper import run_on_ranks
from tests.unit.naive import make_manifest

SIZES = (3003, 1500, 130, 9, 1)
META_BATCH = 24
BEFORE, AFTER = 260, 1000
CONFIG = es_config(preset="paper", pruning_ratio=0.3, keep_ratio=0.5, anneal=0.0, mask_lag=3, seed=11)
REAL, PURE = (1, 2, 3, 4), (1, 2, 3, 4, 6, 8, 12, 24)


def manifest() -> Manifest:
    found = make_manifest(SIZES)
    n = found.total
    assert all(n % divisor for divisor in range(2, int(n**0.5) + 1)), "a prime"
    return found


class Losses:
    """A framework whose losses are a function of the sample and the iteration."""

    loss_source = 0

    def __init__(self, engine: EvolvedSampling) -> None:
        self.engine, self.ids = engine, np.zeros(0, np.int64)

    def score(self, positions: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(self.engine.iteration).random(self.engine.manifest.total)
        return random[self.ids[positions]].astype(np.float32) + np.float32(0.1)

    def train(self, work: Any) -> Trained:
        return Trained(None, self.score(work.positions) if work.capture else None)


def make_engine() -> EvolvedSampling:
    return EvolvedSampling(
        CONFIG, manifest(), RankGrid.data_parallel(), meta_batch=META_BATCH, micro_batch=1, train_samples=40_000
    )


def steps(engine: EvolvedSampling, count: int) -> str:
    """Run iterations; a checksum of every global batch and choice."""
    crc, framework = 0, Losses(engine)
    for _ in range(count):
        batch = engine.draw()
        framework.ids = batch.id
        engine.step(batch, framework)
        assert engine.last is not None
        for part in (batch.component, batch.epoch, batch.row, batch.id, engine.last.chosen):
            crc = zlib.crc32(part.tobytes(), crc)
        engine.finish(True)
    return f"{crc:08x}"


def whole_state(engine: EvolvedSampling) -> Any:
    """Scores and visits of all ranks, joined; masks and when they were decided."""
    store = engine.store
    parts = engine.grid.gather_objects((store.score.tobytes(), store.visits.tobytes()))
    masks = {key: mask.packed.tobytes() for key, mask in sorted(engine.sampler.masks.items())}
    return b"".join(p[0] for p in parts), b"".join(p[1] for p in parts), masks, dict(engine.decided)


def first_part(root: Path) -> Any:
    engine = make_engine()
    steps(engine, BEFORE)
    store, grid = engine.store, engine.grid
    with CheckpointDirectory(root, 1, grid).saving(BEFORE) as folder:
        save_es_state(
            folder / "es_state",
            ScoreRange(engine.manifest.total, store.low, store.score, store.visits),
            {key: mask.packed for key, mask in engine.sampler.masks.items()},
            {"engine": engine.state_dict()},
            engine.manifest.to_json(),
            grid,
        )
    return whole_state(engine), steps(engine, AFTER), whole_state(engine)


def second_part(root: Path) -> Any:
    engine = make_engine()
    sizes, found = engine.manifest.sizes, CheckpointDirectory(root, 1, engine.grid).find()
    assert found is not None
    state = load_es_state(found / "es_state", engine.manifest.total, engine.grid, engine.manifest.to_json())
    masks = {key: KeptMask(packed, int(sizes[key[0]])) for key, packed in state.masks.items()}
    engine.load_state_dict(state.state["engine"], masks)
    engine.store.load(state.score, state.visits)
    return whole_state(engine), steps(engine, AFTER), whole_state(engine)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Any]]:
    """What each number of ranks saved, and how it went on without a break."""
    runs: dict[int, tuple[Path, Any]] = {}
    for ranks in REAL:
        root = tmp_path_factory.mktemp(f"ranks{ranks}")
        told = run_on_ranks(ranks, first_part, root, timeout=600)
        assert all(each == told[0] for each in told)
        runs[ranks] = root, told[0]
    return runs


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_any_number_of_ranks_saves_and_goes_on_alike(saved: dict[int, tuple[Path, Any]]) -> None:
    expected = saved[1][1]
    (_, _, masks, decided), _, (_, visits, later, _) = expected
    assert masks, "a pruned epoch was open at the checkpoint"
    assert set(masks) == set(decided)
    assert set(later) - set(masks), "and others began after it"
    assert min(np.frombuffer(visits, np.uint8)) > 0
    for ranks in REAL[1:]:
        assert saved[ranks][1] == expected


@pytest.mark.slow
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("before", REAL)
@pytest.mark.parametrize("after", REAL)
def test_checkpoints_move_between_numbers_of_ranks(before: int, after: int, saved: dict[int, tuple[Path, Any]]) -> None:
    root, uninterrupted = saved[before]
    for told in run_on_ranks(after, second_part, root, timeout=600):
        assert told == uninterrupted


@pytest.mark.parametrize("n", [sum(SIZES), 65_537 * 3 + 1, 244_140_625 + 12, 2**31 + 11, 3_700_000_019])
def test_ranges_of_any_number_of_ranks_are_made_of_the_same_shards(n: int) -> None:
    bounds = shard_bounds(n)
    assert bounds[0] == 0
    assert bounds[-1] == n
    assert (np.diff(bounds) > 0).all()
    probes = np.unique(np.concatenate([bounds[:-1], bounds[1:] - 1, np.random.default_rng(0).integers(0, n, 100)]))
    for ranks in PURE:
        ranges = [owned_range(n, rank, ranks) for rank in range(ranks)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == n
        assert [high for _, high in ranges[:-1]] == [low for low, _ in ranges[1:]]
        assert set(np.ravel(ranges)) <= set(bounds.tolist())
        assert all(sum(low <= i < high for low, high in ranges) == 1 for i in probes.tolist())


def scores() -> tuple[np.ndarray, np.ndarray]:
    """Scores and visits of the whole, some samples unseen."""
    random = np.random.default_rng(4)
    score = random.lognormal(0, 1, sum(SIZES)).astype(np.float32)
    visits = random.integers(0, 4, len(score)).astype(np.uint8)
    return np.where(visits > 0, score, 0).astype(np.float32), visits


def moved(before: int, after: int) -> list[list[np.ndarray]]:
    """Scores and visits of each of `after` ranks, put together from the shards that `before` ranks own."""
    n, bounds = sum(SIZES), shard_bounds(sum(SIZES))
    files: list[dict[int, np.ndarray]] = [{}, {}]
    for rank in range(before):
        first, end = owned_shards(len(bounds) - 1, rank, before)
        low, high = owned_range(n, rank, before)
        for file, whole in zip(files, scores(), strict=True):
            own = whole[low:high]
            file |= {shard: own[bounds[shard] - low : bounds[shard + 1] - low] for shard in range(first, end)}
    shards = [range(*owned_shards(len(bounds) - 1, rank, after)) for rank in range(after)]
    return [[np.concatenate([file[0][:0], *(file[shard] for shard in own)]) for file in files] for own in shards]


class Recorded:
    """A data-parallel rank of a store that was computed rank by rank: sums come from a record of all of them."""

    mp_rank, mp_size, world_rank, world_size = 0, 1, 0, 1

    def __init__(self, rank: int, ranks: int, rounds: dict[int, list[np.ndarray]]) -> None:
        self.dp_rank, self.dp_size, self.rounds, self.calls = rank, ranks, rounds, 0

    def sum_over_dp(self, array: np.ndarray) -> np.ndarray:
        told = self.rounds.setdefault(self.calls, [])
        self.calls += 1
        if len(told) == self.dp_size:
            return np.sum(told, axis=0, dtype=array.dtype)
        raise NotYet(self.calls - 1, array.copy())

    def broadcast_over_mp(self, array: np.ndarray, source: int) -> np.ndarray:
        return array

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


class NotYet(Exception):
    """The other ranks have not said their part."""


def masks_of(parts: list[list[np.ndarray]]) -> tuple[list[bytes], str]:
    """Masks that ranks with these scores decide, and the checksum of 1,000 batches by them, without any process.

    A rank runs until it needs the others; what it said is noted, and all begin again.
    """
    from es_megatron.scores.store import ScoreStore

    whole, ranks = manifest(), len(parts)
    masks: list[bytes] = []
    for component in range(len(SIZES)):
        rounds: dict[int, list[np.ndarray]] = {}
        found: list[KeptMask] = []
        while len(found) < ranks:
            found, waiting = [], []
            for rank, (score, visits) in enumerate(parts):
                store = ScoreStore(whole, CONFIG, Recorded(rank, ranks, rounds))  # type: ignore[arg-type]
                store.load(score, visits)
                try:
                    found.append(EpochPruning(store).prune(component, 1))
                except NotYet as said:
                    waiting.append(said.args)
            assert len({call for call, _ in waiting}) <= 1, "all ranks are at the same collective"
            for call, array in waiting:
                rounds[call].append(array)
        assert len({mask.packed.tobytes() for mask in found}) == 1
        masks.append(found[0].packed.tobytes())
    return masks, batches_of(
        ranks, [KeptMask(np.frombuffer(m, np.uint8), n) for m, n in zip(masks, SIZES, strict=True)]
    )


def batches_of(ranks: int, masks: list[KeptMask]) -> str:
    """Checksum of 1,000 global batches put together from what each rank asks for alone."""
    from es_megatron.algorithm.selection import positions_of
    from es_megatron.data.sampler import Sampler
    from es_megatron.data.schedule import Schedule

    schedule = Schedule(manifest(), META_BATCH, 40_000, pruning_ratio=CONFIG.pruning.ratio)
    samplers = [Sampler(schedule, CONFIG.seed) for _ in range(ranks)]
    crc = 0
    for iteration in range(BEFORE - 60, BEFORE - 60 + AFTER):
        rows = np.full(META_BATCH, -1)
        open_masks = {key: masks[key[0]] for key in needed(schedule, iteration)}
        for rank, sampler in enumerate(samplers):
            own = positions_of(rank, ranks, META_BATCH, 1)
            sampler.masks = open_masks
            component, _, row = sampler.rows(iteration * META_BATCH + own)
            rows[own] = sampler.manifest.sample_ids(component, row)
        assert rows.min() >= 0
        crc = zlib.crc32(rows.tobytes(), crc)
    return f"{crc:08x}"


def needed(schedule: Any, iteration: int) -> list[tuple[int, int]]:
    component, draw = schedule.blend.locate(np.arange(META_BATCH) + iteration * META_BATCH)
    place = schedule.epochs.place(component, draw)
    return list(zip(component[place.pruned].tolist(), place.epoch[place.pruned].tolist(), strict=True))


@pytest.fixture(scope="module")
def of_one_rank() -> tuple[list[bytes], str]:
    return masks_of([list(scores())])


@pytest.mark.parametrize("before", PURE)
@pytest.mark.parametrize("after", PURE)
def test_shards_of_one_number_of_ranks_make_up_the_ranges_of_another(before: int, after: int) -> None:
    parts = moved(before, after)
    for rank, (score, visits) in enumerate(parts):
        low, high = owned_range(sum(SIZES), rank, after)
        assert len(score) == len(visits) == high - low
    for joined, whole in zip(zip(*parts, strict=True), scores(), strict=True):
        assert np.concatenate(joined).tobytes() == whole.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("before", PURE)
@pytest.mark.parametrize("after", PURE)
def test_masks_and_batches_of_the_pure_functions(before: int, after: int, of_one_rank: tuple[list[bytes], str]) -> None:
    assert masks_of(moved(before, after)) == of_one_rank
