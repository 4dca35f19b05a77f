"""Invariant 7: a run that was interrupted chooses, loses and ends as one that was not, also on other ranks."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.errors import CheckpointError
from tests.ranks_helper import RankFailure, run_on_ranks
from tests.small_run import META_BATCH, History, Trainer, audit_of, settings_of, train, write_blend

ITERATIONS = 30
MID_EPOCH, SECOND_EPOCH = 6, 14
"""Iterations after which a run is interrupted: in the first, unpruned epochs, and where epochs are pruned."""
SECONDS = 120
Start = Callable[..., list[History]]


class Crash(Exception):
    """The end of a process that had no time to save."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start or resume a run in a directory; `stop` is the iteration after which SIGTERM comes."""
    folder = tmp_path_factory.mktemp("resume")
    blend = write_blend(folder / "data")

    def run(directory: Path, ranks: int, *overrides: str, stop: int = -1, after: Any = None) -> list[History]:
        def terminate(trainer: Trainer, iteration: int) -> None:
            if iteration == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        samples = f"training.train_samples={(ITERATIONS + 7) * META_BATCH}"
        settings = settings_of(blend, directory, samples, *overrides)
        return run_on_ranks(ranks, functools.partial(train, settings, after=after or terminate), timeout=SECONDS)

    return run


@pytest.fixture(scope="module")
def uninterrupted(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A run without interruption, once for all tests that ask for the same."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def run(ranks: int, *overrides: str) -> list[History]:
        return start(folder / str(len(list(folder.iterdir()))), ranks, *overrides)

    return run


def check_joined(parts: list[list[History]], whole: list[History], directory: Path) -> None:
    """The parts of an interrupted run on one layout, put together, are the whole run, bit for bit."""
    for rank, expected in enumerate(whole):
        mine = [part[rank] for part in parts]
        assert [each for part in mine for each in part.chosen] == expected.chosen
        assert [each for part in mine for each in part.norm] == expected.norm
        assert [each for part in mine for each in part.reported] == expected.reported
        np.testing.assert_array_equal([each for part in mine for each in part.loss], expected.loss)
        assert (mine[-1].scores, mine[-1].weights) == (expected.scores, expected.weights)
    assert audit_of(directory) == whole[0].chosen
    check_totals(parts[-1][0].summary, whole[0].summary)


def check_totals(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    """What is told at the end covers both parts."""
    for key in ("finished", "iterations", "passes", "tokens_scored", "tokens_trained", "chosen", "cost"):
        assert resumed[key] == whole[key]


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2-dropout": (2, ("model.dropout=0.1",)),
    "pp2": (2, ("parallel.pipeline=2",)),
    "dp2-overlaps": (
        2,
        (
            "parallel.distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
            "parallel.bucket_size=5000",
        ),
    ),
    "vpp2-dropout-workers": (
        2,
        ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.dropout=0.1", "data.num_workers=2"),
    ),
    "history": (2, ("evolved_sampling.scorer=history", "model.dropout=0.1")),
    "every-k-debiased": (1, ("evolved_sampling.scorer=every-k", "evolved_sampling.scores.correction=debiased")),
    "shuffled": (1, ("evolved_sampling.arm=shuffled",)),
}
FAST = ("dp2-dropout", "two-to-one", "one-to-two")


@pytest.mark.timeout(SECONDS * 3)
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_terminated_twice_and_resumed_equals_uninterrupted(
    name: str, start: Start, uninterrupted: Start, tmp_path: Path
) -> None:
    ranks, overrides = LAYOUTS[name]
    whole = uninterrupted(ranks, *overrides)
    assert len(whole[0].chosen) >= 25
    first = start(tmp_path, ranks, *overrides, stop=MID_EPOCH)
    assert len(first[0].chosen) == MID_EPOCH + 1
    assert not first[0].summary["finished"]
    second = start(tmp_path, ranks, *overrides, stop=SECOND_EPOCH)
    assert len(second[0].chosen) == SECOND_EPOCH - MID_EPOCH
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] == SECOND_EPOCH + 1
    third = start(tmp_path, ranks, *overrides)
    check_joined([first, second, third], whole, tmp_path)
    pruned = {epoch for part in (first, second) for _, epoch in part[0].pruned}
    assert max(pruned) >= 2, "the second interruption is where epochs are pruned"


@pytest.mark.timeout(SECONDS * 3)
def test_a_crash_goes_back_to_the_last_checkpoint(start: Start, uninterrupted: Start, tmp_path: Path) -> None:
    def crash(trainer: Trainer, iteration: int) -> None:
        if iteration == 17:
            raise Crash

    saving = "run.save_interval=6"
    with pytest.raises(RankFailure, match="Crash"):
        start(tmp_path, 2, saving, after=crash)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("iter*")) == ["iter_0000006", "iter_0000012"]
    rest = start(tmp_path, 2, saving)
    whole = uninterrupted(2)
    for mine, expected in zip(rest, whole, strict=True):
        assert mine.chosen == expected.chosen[12:]
        assert mine.norm == expected.norm[12:]
        assert (mine.scores, mine.weights) == (expected.scores, expected.weights)
    assert audit_of(tmp_path) == whole[0].chosen
    check_totals(rest[0].summary, whole[0].summary)


MOVES = {
    "two-to-one": ((2, ()), (1, ())),
    "one-to-two": ((1, ()), (2, ())),
    "one-to-pp2": ((1, ()), (2, ("parallel.pipeline=2",))),
    "pp2-to-dp4": ((2, ("parallel.pipeline=2",)), (4, ())),
    "tp2-to-vpp2": ((2, ("parallel.tensor=2",)), (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2"))),
}


@pytest.mark.timeout(SECONDS * 3)
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MOVES]
)
@pytest.mark.parametrize("stop", [MID_EPOCH, pytest.param(SECOND_EPOCH, marks=pytest.mark.slow)])
def test_resumed_on_another_layout(name: str, stop: int, start: Start, uninterrupted: Start, tmp_path: Path) -> None:
    (ranks, overrides), (other_ranks, other_overrides) = MOVES[name]
    whole = uninterrupted(1)[0]
    start(tmp_path, ranks, *overrides, stop=stop)
    rest = start(tmp_path, other_ranks, *other_overrides)
    assert audit_of(tmp_path) == whole.chosen
    for mine in rest:
        assert mine.chosen == whole.chosen[stop + 1 :]
        np.testing.assert_allclose(mine.loss, whole.loss[stop + 1 :], rtol=0, atol=1e-5)
        np.testing.assert_allclose(mine.norm, whole.norm[stop + 1 :], rtol=1e-4)
    check_totals(rest[0].summary, whole.summary)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 2)
def test_a_damaged_newest_checkpoint_falls_back(start: Start, uninterrupted: Start, tmp_path: Path) -> None:
    start(tmp_path, 2, "run.save_interval=5", stop=12)
    newest = tmp_path / "checkpoints" / "iter_0000013" / "es_state"
    victim = next(newest.glob("scores-*"))
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    rest = start(tmp_path, 2)
    whole = uninterrupted(2)
    assert rest[0].chosen == whole[0].chosen[10:]
    assert [mine.scores for mine in rest] == [expected.scores for expected in whole]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("interval", "kept"), [("0", 1), ("null", 0)])
def test_a_finished_run_saves_its_end_unless_told_never(interval: str, kept: int, tmp_path: Path) -> None:
    blend = write_blend(tmp_path / "data")
    options = ("model.num_layers=2", f"training.train_samples={4 * META_BATCH}", f"run.save_interval={interval}")
    run_on_ranks(1, train, settings_of(blend, tmp_path / "run", *options), timeout=100)
    assert len(list((tmp_path / "run").glob("checkpoints/iter_*"))) == kept


def test_terminated_before_the_first_iteration(start: Start, tmp_path: Path) -> None:
    """A signal that comes before anything is trained leaves nothing that a second start would stumble over."""
    blend = write_blend(tmp_path / "data")
    settings = settings_of(blend, tmp_path / "run", f"training.train_samples={4 * META_BATCH}")

    def run(stop: bool) -> tuple[bool, int]:
        trainer = Trainer(settings)
        if stop:
            trainer._train = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        summary = trainer.run()
        return summary["finished"], summary["iterations"]

    assert run_on_ranks(1, run, True) == [(False, 0)]
    assert not list((tmp_path / "run").glob("checkpoints/iter_*"))
    assert run_on_ranks(1, run, False) == [(True, 4)]


@pytest.fixture(scope="module")
def saved(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    start(directory, 2, stop=2)
    return directory


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evolved_sampling.seed=8", "`seed` was 7 and is 8"),
        ("evolved_sampling.arm=uniform", "`arm` was 'es' and is 'uniform'"),
        ("training.global_batch_size=32", "`meta_batch` was 16 and is 32"),
        ("training.train_samples=999", "`train_samples` was"),
        ("evolved_sampling.pruning.ratio=0.2", "`pruning.ratio` was 0.3 and is 0.2"),
    ],
    ids=lambda value: value.split(".")[-1].split("=")[0] if "=" in value else "",
)
def test_the_checkpoint_of_another_run_is_refused(override: str, message: str, saved: Path) -> None:
    def refused(settings: Any) -> str:
        with pytest.raises(CheckpointError) as raised:
            Trainer(settings)
        return str(raised.value)

    blend = write_blend(saved.parent / "data")
    samples = f"training.train_samples={(ITERATIONS + 7) * META_BATCH}"
    for told in run_on_ranks(2, refused, settings_of(blend, saved, samples, override)):
        assert message in told
        assert "start a new run directory" in told
