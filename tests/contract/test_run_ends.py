"""How a run ends and goes on, in both frameworks: exit codes, changed rates, skipped steps, a finished run."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from es_megatron.errors import CheckpointError, LossError
from es_megatron.trainer.command import STOPPED
from es_megatron.trainer.run_lock import NAME
from es_megatron.trainer.settings import SETTINGS, write_settings
from tests.ranks_helper import run_on_ranks
from tests.small_run import META_BATCH, Trainer, chunks_of, settings_of, train, write_blend

from es_megatron import cli  # isort: skip - the CPU layer stands since small_run was imported

DEEPSPEED = pytest.param(
    ("backend=deepspeed", "deepspeed.zero_stage=1"),
    id="deepspeed",
    marks=pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
)
BACKENDS = [pytest.param((), id="megatron"), DEEPSPEED]
SHORT = ("model.num_layers=2", f"training.train_samples={10 * META_BATCH}", "training.min_lr=0")
STOP = 3
"""Iterations before the interrupt."""


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blend(tmp_path_factory.mktemp("data"))


def rates(settings: Any, stop: int | None = None) -> tuple[list[float], dict[str, Any], list[dict[str, Any]]]:
    """Run, with Ctrl-C after an iteration; gives rates, the summary, and the optimizer's groups at the start."""
    trainer = Trainer(settings)
    optimizer = trainer.backend.scheduler.optimizer
    groups = [{key: value for key, value in each.items() if key != "params"} for each in optimizer.param_groups]
    iterate, seen = trainer.backend.iterate, []

    def watched() -> Any:
        done = iterate()
        seen.append(done.rate)
        if trainer.engine.iteration == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    trainer.backend.iterate = watched  # pyright: ignore[reportAttributeAccessIssue]
    return seen, trainer.run(), groups


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_that_change_on_resume_take_effect_and_are_told(
    backend: tuple[str, ...], blend: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    begun = settings_of(blend, run, *SHORT, *backend)
    ((before, summary, _),) = run_on_ranks(1, rates, begun, STOP)
    assert (len(before), summary["finished"]) == (STOP, False)
    changed = ("training.lr=6e-3", "training.weight_decay=0.3", "training.adam_beta2=0.9", "training.adam_eps=1e-6")
    ((after, summary, groups),) = run_on_ranks(1, rates, settings_of(blend, run, *SHORT, *backend, *changed))
    assert summary["finished"]
    whole = settings_of(blend, tmp_path / "whole", *SHORT, *backend)
    ((plain, _, _),) = run_on_ranks(1, rates, whole)
    assert before == plain[:STOP]
    assert after == pytest.approx([2 * rate for rate in plain[STOP:]], rel=1e-12)
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.9)}
    assert {group["eps"] for group in groups} == {1e-6}
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    (line,) = [each for each in (run / "log.txt").read_text().splitlines() if each.startswith("changed since")]
    assert line == (
        f"changed since iteration {STOP}: training.lr: 0.003 -> 0.006, training.weight_decay: 0.1 -> 0.3, "
        "training.adam_beta2: 0.95 -> 0.9, training.adam_eps: 1e-08 -> 1e-06"
    )


@pytest.mark.parametrize("override", ["training.seed=9", "model.init_std=0.1", "model.swiglu=false"])
def test_what_cannot_change_on_resume_is_refused(override: str, blend: Path, tmp_path: Path) -> None:
    run_on_ranks(1, rates, settings_of(blend, tmp_path, *SHORT), STOP)

    def refused() -> str:
        with pytest.raises(CheckpointError) as raised:
            Trainer(settings_of(blend, tmp_path, *SHORT, override))
        return str(raised.value)

    (message,) = run_on_ranks(1, refused)
    assert f"`{override.partition('=')[0]}` was " in message


@pytest.mark.parametrize(("interval", "kept"), [(3, [3, 6]), (2, [2, 4, 6])])
def test_a_run_whose_steps_are_skipped_stops_and_keeps_its_checkpoints(
    interval: int, kept: list[int], blend: Path, tmp_path: Path
) -> None:
    def spoil(trainer: Trainer, iteration: int) -> None:
        if iteration >= STOP and iteration != STOP + 1:
            for chunk in chunks_of(trainer):
                chunk.buffers[0].grad_data.fill_(float("nan"))

    def run() -> str:
        options = ("training.max_skipped=3", f"run.save_interval={interval}", "run.keep_checkpoints=1")
        with pytest.raises(LossError) as raised:
            train(settings_of(blend, tmp_path, *SHORT, *options), spoil)
        return str(raised.value)

    told = run_on_ranks(2, run)
    assert told[0] == told[1]
    assert "3 more optimizer steps than were taken have been skipped up to iteration 8" in told[0]
    assert "(iteration 6 is saved)" in told[0]
    names = sorted(each.name for each in (tmp_path / "checkpoints").glob("iter_*"))
    assert names == [f"iter_{iteration:07d}" for iteration in kept]  # one would be kept if no step had been skipped
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_steps_are_counted_whatever_the_framework(
    backend: tuple[str, ...], blend: Path, tmp_path: Path
) -> None:
    def run(allowed: int) -> bool:
        settings = settings_of(blend, tmp_path / str(allowed), *SHORT, *backend, f"training.max_skipped={allowed}")
        trainer = Trainer(settings)
        iterate = trainer.backend.iterate
        trainer.backend.iterate = lambda: iterate()._replace(succeeded=False)  # pyright: ignore[reportAttributeAccessIssue]
        return trainer.run()["finished"]

    def stopped() -> None:
        with pytest.raises(LossError, match="4 more optimizer steps"):
            run(4)

    run_on_ranks(1, stopped)
    assert run_on_ranks(1, run, 0) == [True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interval", ["0", "null"])
def test_a_finished_run_started_again_says_so_and_does_nothing(
    backend: tuple[str, ...], interval: str, blend: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(blend, tmp_path, *SHORT, *backend, f"run.save_interval={interval}")
    ((_, first, _),) = run_on_ranks(1, rates, settings)
    assert first["finished"]

    def content() -> dict[str, tuple[int, bytes]]:
        # but for the lock, which says who was here last
        files = (each for each in tmp_path.rglob("*") if each.is_file() and each.name != NAME)
        return {str(each): (each.stat().st_mtime_ns, each.read_bytes()) for each in files}

    before = content()
    ((seen, again, _),) = run_on_ranks(1, rates, settings)
    assert (seen, again) == ([], first)
    assert content() == before
    assert f"`{tmp_path}` holds a finished run" in capfd.readouterr().out


def test_exit_codes_tell_finished_from_stopped(blend: Path, tmp_path: Path) -> None:
    settings = settings_of(blend, tmp_path / "run", *SHORT)
    path = tmp_path / SETTINGS
    write_settings(settings, path)

    def command(stop: bool) -> int:
        if stop:
            Trainer._agreed_stop = lambda _: True  # pyright: ignore[reportPrivateUsage]
        return cli.main(["pretrain", "--config", str(path)])

    assert run_on_ranks(1, command, True) == [STOPPED]
    assert run_on_ranks(1, command, False) == [0]
    assert run_on_ranks(1, command, True) == [0], "finished already"
