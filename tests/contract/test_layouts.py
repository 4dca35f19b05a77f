"""Invariants 3, 8 and 9: whatever the layout and the loader, a run chooses what one rank chooses; replicas agree."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from es_megatron.errors import LayoutError
from tests.ranks_helper import run_on_ranks
from tests.small_run import META_BATCH, SIZES, History, Trainer, audit_of, settings_of, train, write_blend

LONG = f"training.train_samples={76 * META_BATCH}"
SHORT = f"training.train_samples={30 * META_BATCH}"
OVERLAPS = (
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "parallel.bucket_size=5000",
)
SECONDS = 200


class Layout(NamedTuple):
    """Processes and what they share."""

    name: str
    ranks: int
    overrides: tuple[str, ...] = ()


ONE = Layout("one", 1)
DP2 = Layout("dp2", 2)
PP2 = Layout("pp2", 2, ("parallel.pipeline=2",))
CP2 = Layout("cp2", 2, ("parallel.context=2",))
LAYOUTS = [
    Layout("dp2-workers", 2, ("data.num_workers=2",)),
    PP2,
    CP2,
    Layout("vpp2-workers", 2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "data.num_workers=2")),
]
SLOW_LAYOUTS = [
    DP2,
    Layout("one-workers", 1, ("data.num_workers=2",)),
    Layout("tp2", 2, ("parallel.tensor=2",)),
    Layout("dp2-overlaps", 2, OVERLAPS),
    Layout("dp4", 4),
    Layout("cp2-pp2", 4, ("parallel.context=2", "parallel.pipeline=2")),
    Layout("cp2-dp2-overlaps", 4, ("parallel.context=2", *OVERLAPS)),
    Layout("cp2-tp2", 4, ("parallel.context=2", "parallel.tensor=2")),
    Layout("pp2-dp2", 4, ("parallel.pipeline=2",)),
    Layout("vpp2-dp2-overlaps", 4, ("parallel.pipeline=2", "parallel.virtual_pipeline=2", *OVERLAPS)),
    Layout("tp2-pp2", 4, ("parallel.pipeline=2", "parallel.tensor=2")),
]
Run = Callable[..., list[History]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a layout once, however often it is asked for."""
    folder = tmp_path_factory.mktemp("layouts")
    blend = write_blend(folder / "data")

    @functools.cache
    def run_once(layout: Layout, *overrides: str) -> list[History]:
        directory = folder / str(len(list(folder.iterdir())))
        settings = settings_of(blend, directory, *layout.overrides, *overrides)
        histories = run_on_ranks(layout.ranks, train, settings, timeout=SECONDS)
        assert audit_of(directory) == histories[0].chosen
        return histories

    return run_once


def check_same(histories: list[History], reference: History) -> None:
    """Same ids, masks and losses on every rank; replicas of a shard are equal, and shards join to the reference's."""
    for history in histories:
        assert history.chosen == reference.chosen
        assert history.pruned == reference.pruned
        np.testing.assert_allclose(history.loss, reference.loss, rtol=0, atol=1e-6)
    shards: dict[int, list[History]] = defaultdict(list)
    for history in histories:
        shards[history.place[0]].append(history)
    for copies in shards.values():
        assert len({copy.checksum for copy in copies}) == 1
        assert len({copy.scores for copy in copies}) == 1
    parts = [shards[rank][0].scores for rank in sorted(shards)]
    score = np.frombuffer(b"".join(part[0] for part in parts), np.float32)
    np.testing.assert_allclose(score, np.frombuffer(reference.scores[0], np.float32), rtol=0, atol=1e-5)
    assert b"".join(part[1] for part in parts) == reference.scores[1]


@pytest.mark.timeout(SECONDS + 60)
def test_the_reference_says_something(run: Run) -> None:
    """Selection, pruning and learning do happen, so that equality means something."""
    es = run(ONE, LONG)[0]
    assert len(es.chosen) >= 55
    assert sum(len(ids) == 4 for ids in es.chosen) >= 50
    assert len(es.pruned) >= 10
    assert {component for component, _ in es.pruned} == {0, 1, 2}
    assert np.mean(es.loss[-5:]) < np.mean(es.loss[:5]) - 0.2


@pytest.mark.timeout(SECONDS + 60)
def test_losses_decide(run: Run) -> None:
    """The same meta-batches and the same uniforms, but another choice."""
    whole = "evolved_sampling.pruning.ratio=0"
    es, uniform = run(ONE, SHORT, whole)[0], run(ONE, SHORT, whole, "evolved_sampling.arm=uniform")[0]
    pairs = list(zip(es.chosen[2:28], uniform.chosen[2:28], strict=True))
    assert es.chosen[:2] == uniform.chosen[:2]
    assert sum(len(set(ids) & set(other)) for ids, other in pairs) < 4 * len(pairs)


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
    ids=lambda layout: layout.name,
)
def test_layouts_choose_alike_across_pruned_epochs(layout: Layout, run: Run) -> None:
    check_same(run(layout, LONG), run(ONE, LONG)[0])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("size", [None, 1, 2, 8])
def test_the_size_of_scoring_micro_batches_changes_nothing(size: int | None, run: Run) -> None:
    override = f"evolved_sampling.scorer.micro_batch_size={'null' if size is None else size}"
    check_same(run(PP2, SHORT, override), run(ONE, SHORT)[0])


VARIANTS = {
    "uniform": (DP2, ("arm=uniform",)),
    "uniform-prune": (DP2, ("arm=uniform-prune", "selection.budget=0.6")),
    "plain": (DP2, ("arm=plain",)),
    "shortened": (PP2, ("arm=shortened",)),
    "shuffled": (DP2, ("arm=shuffled",)),
    "history-pp": (PP2, ("scorer=history",)),
    "history-dp": (DP2, ("scorer=history",)),
    "every-k": (DP2, ("scorer=every-k", "scorer.every=3")),
    "microbatch": (DP2, ("selection.granularity=microbatch",)),
    "debiased-floor": (DP2, ("scores.correction=debiased", "selection.weight_floor=0.5")),
    "inclusion": (PP2, ("selection.inclusion_weights=true",)),
    "history-cp": (CP2, ("scorer=history",)),
    "inclusion-cp": (CP2, ("selection.inclusion_weights=true",)),
    "grad-norm-cp": (CP2, ("selection.policy=grad-norm",)),
}
FAST = ("shuffled", "history-pp", "every-k", "microbatch", "history-cp")


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_arms_and_scorers_choose_alike(name: str, run: Run) -> None:
    layout, changes = VARIANTS[name]
    overrides = tuple(f"evolved_sampling.{change}" for change in changes)
    if name == "microbatch":
        overrides += ("training.micro_batch_size=2",)
    reference = run(ONE, SHORT, *overrides)[0]
    histories = run(layout, SHORT, *overrides)
    for history in histories:
        assert history.chosen == reference.chosen
        assert history.pruned == reference.pruned
        np.testing.assert_allclose(history.norm, reference.norm, rtol=1e-4)
    assert {len(set(history.chosen[5])) for history in histories} == {len(set(reference.chosen[5]))}
    assert reference.summary["finished"]
    assert len({history.checksum for history in histories}) == (1 if layout in (PP2, CP2) else len(histories))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 2)
def test_arms_differ_where_they_should(run: Run) -> None:
    """The same code path, but not the same choice: an arm that silently did nothing would pass the test above."""

    def chosen(*changes: str) -> list[list[int]]:
        extra = ("training.micro_batch_size=2",) if "selection.granularity=microbatch" in changes else ()
        return run(ONE, SHORT, *(f"evolved_sampling.{change}" for change in changes), *extra)[0].chosen

    es, every = chosen(), chosen("scorer=every-k", "scorer.every=3")
    known = {"es": es, "every-k": every, "history": chosen("scorer=history"), "uniform": chosen("arm=uniform")}
    known |= {"shuffled": chosen("arm=shuffled"), "microbatch": chosen("selection.granularity=microbatch")}
    middle = {name: tuple(map(tuple, ids[4:20])) for name, ids in known.items()}
    assert len(set(middle.values())) == len(middle)
    plain = chosen("arm=plain")
    assert {len(ids) for ids in plain} == {META_BATCH}
    assert len(plain) == 30
    assert len(chosen("arm=shortened")) < len(es) < 30
    assert set().union(*plain) == set(range(sum(SIZES.values())))


def test_a_rank_whose_copy_of_the_scores_differs_stops_the_run_everywhere(tmp_path: Path) -> None:
    """Invariant 9 at run time."""

    def spoil(trainer: Trainer, iteration: int) -> None:
        if iteration == 3 and trainer.grid.world_rank == 1:
            trainer.engine.store.score[0] += 1

    overrides = (SHORT, "parallel.pipeline=2", "run.save_interval=6")
    settings = settings_of(write_blend(tmp_path / "data"), tmp_path / "run", *overrides)

    def run_spoiled() -> str:
        with pytest.raises(LayoutError, match="differ") as raised:
            train(settings, after=spoil)
        return str(raised.value)

    told = run_on_ranks(2, run_spoiled)
    assert len(set(told)) == 1
