"""Runs whose scorer is merged: the same choices on every layout, after an interruption, and around steps that fail."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks_helper import run_on_ranks
from tests.small_run import META_BATCH, History, Trainer, audit_of, settings_of, train, write_blend

MERGED = ("evolved_sampling.scorer.overlap=merged", "evolved_sampling.scorer.micro_batch_size=null")
LONG = f"training.train_samples={76 * META_BATCH}"
SHORT = f"training.train_samples={37 * META_BATCH}"
PP2, VPP2 = ("parallel.pipeline=2",), ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
OVERLAPS = (
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "parallel.bucket_size=5000",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "pp2-workers": (2, (*PP2, "data.num_workers=1", "data.prefetch=2")),
    "dp2": (2, ()),
    "vpp2": (2, VPP2),
    "pp4": (4, ("parallel.pipeline=4",)),
    "pp2-dp2-overlaps": (4, (*PP2, *OVERLAPS)),
    "tp2-pp2": (4, (*PP2, "parallel.tensor=2")),
    "bf16": (4, (*PP2, *OVERLAPS, "training.precision=bf16")),
}
FAST = ("pp2-workers",)
SECONDS = 240


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blend(tmp_path_factory.mktemp("merged") / "data")


@pytest.fixture(scope="module")
def alone(blend: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on one rank, once for all tests that ask for the same."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def run(*overrides: str) -> History:
        directory = folder / str(len(list(folder.iterdir())))
        return run_on_ranks(1, train, settings_of(blend, directory, *MERGED, *overrides), timeout=SECONDS)[0]

    return run


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    "name", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in LAYOUTS]
)
def test_layouts_choose_alike_across_pruned_epochs(name: str, blend: Path, alone: Any, tmp_path: Path) -> None:
    ranks, overrides = LAYOUTS[name]
    reference: History = alone(LONG, *(each for each in overrides if "precision" in each))
    assert len(reference.chosen) >= 55
    assert len(reference.pruned) >= 10
    for history in run_on_ranks(ranks, train, settings_of(blend, tmp_path, *MERGED, LONG, *overrides), timeout=SECONDS):
        assert history.chosen == reference.chosen
        assert history.pruned == reference.pruned
        np.testing.assert_allclose(history.loss, reference.loss, rtol=0, atol=0.05 if name == "bf16" else 1e-5)


def test_scores_are_one_step_old(blend: Path, alone: Any, tmp_path: Path) -> None:
    """The first choice is that of a run that scores and then trains, the next ones are not, and as many are scored."""
    fresh = run_on_ranks(1, train, settings_of(blend, tmp_path, SHORT), timeout=SECONDS)[0]
    merged: History = alone(SHORT)
    first = next(n for n, ids in enumerate(merged.chosen) if len(ids) < META_BATCH)
    assert merged.chosen[: first + 1] == fresh.chosen[: first + 1]
    assert merged.chosen[first + 1 :] != fresh.chosen[first + 1 :]
    assert merged.summary["sequences_scored"] == fresh.summary["sequences_scored"]


MOVES = {
    "pp2": ((2, PP2), (2, PP2)),
    "dp2-to-one": ((2, ()), (1, ())),
    "pp2-to-dp4": ((2, PP2), (4, ())),
    "one-to-pp2-dp2": ((1, ()), (4, PP2)),
}


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    "name", [each if each == "pp2" else pytest.param(each, marks=pytest.mark.slow) for each in MOVES]
)
@pytest.mark.parametrize("stop", [14, pytest.param(6, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(name: str, stop: int, blend: Path, alone: Any, tmp_path: Path) -> None:
    whole: History = alone(SHORT)

    def terminate(trainer: Trainer, iteration: int) -> None:
        if iteration == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    (ranks, overrides), (other_ranks, other_overrides) = MOVES[name]
    started = settings_of(blend, tmp_path, *MERGED, SHORT, *overrides)
    run_on_ranks(ranks, functools.partial(train, started, after=terminate), timeout=SECONDS)
    resumed = settings_of(blend, tmp_path, *MERGED, SHORT, *other_overrides)
    rest = run_on_ranks(other_ranks, train, resumed, timeout=SECONDS)
    assert audit_of(tmp_path) == whole.chosen
    for mine in rest:
        np.testing.assert_allclose(mine.loss, whole.loss[stop + 1 :], rtol=0, atol=1e-5)
    assert rest[0].summary["sequences_scored"] == whole.summary["sequences_scored"]
