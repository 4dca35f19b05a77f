"""Checkpoints of other data and disks that fill up are told on every rank, and no rank hangs."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from es_megatron.checkpoint import disk
from es_megatron.errors import CheckpointError
from tests.contract.test_bad_input import SECONDS, told_by_every_rank
from tests.ranks_helper import run_on_ranks
from tests.small_run import SIZES, Trainer, settings_of, train, write_blend, write_component


@pytest.fixture
def blend(tmp_path: Path) -> Path:
    return write_blend(tmp_path / "data")


@pytest.mark.parametrize("change", ["tokens", "size", "weight", "name", "seq_length"])
def test_the_checkpoint_of_another_manifest(change: str, blend: Path, tmp_path: Path) -> None:
    short = ("training.train_samples=32", "run.save_interval=1")
    run_on_ranks(2, train, settings_of(blend, tmp_path / "run", *short))
    overrides = short
    if change == "tokens":
        write_component(blend.parent / "b", SIZES["b"], 99)
    elif change == "size":
        write_component(blend.parent / "b", SIZES["b"] + 1, 1)
    elif change == "seq_length":
        overrides = (*short, "model.seq_length=8")
    else:
        content = yaml.safe_load(blend.read_text())
        for entry in content["components"]:
            entry.update({"weight": 1.0} if change == "weight" else {"name": entry["name"].replace("b", "x")})
        blend.write_text(yaml.safe_dump(content))
    message = told_by_every_rank(2, settings_of(blend, tmp_path / "run", *overrides), CheckpointError)
    said = {"tokens": "`fingerprint` was", "size": "`samples` was 30 and is 31", "weight": "`weight` was"}
    said |= {"name": "component `b` was removed", "seq_length": "`seq_length` was 16 and is 8"}
    assert said[change] in message
    assert "start a new run in another folder" in message


@pytest.fixture
def saved(blend: Path, tmp_path: Path) -> Path:
    """A run directory with a checkpoint after iteration 4."""

    def stop(trainer: Trainer, iteration: int) -> None:
        if iteration == 3:
            trainer.alarm.ask_to_stop()

    run_on_ranks(2, train, settings_of(blend, tmp_path / "run"), before_nothing, stop)
    return tmp_path / "run"


def before_nothing(trainer: Trainer, iteration: int) -> None:
    """No hook between backward and optimizer."""


def fail_to_save(settings: Any, spoil: Callable[[], None]) -> Callable[[], str]:
    def run() -> str:
        with pytest.raises(CheckpointError) as raised:
            train(settings, after=lambda _, iteration: spoil() if iteration == 5 else None)
        return str(raised.value)

    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_up_while_scores_are_saved(rank: int, saved: Path, blend: Path) -> None:
    """One rank of two runs out of space; both say so, the older checkpoint stays and resumes."""

    class FullDisk:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, *_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill() -> None:
        if dist.get_rank() == rank:
            disk.os = FullDisk()  # pyright: ignore[reportAttributeAccessIssue]

    told = run_on_ranks(2, fail_to_save(settings_of(blend, saved, "run.save_interval=2"), fill), timeout=SECONDS)
    check_full(told, saved, blend, "No space left on device; free space there")
    assert f"rank {rank}" in told[0]


@pytest.mark.parametrize(("rank", "size"), [(0, 1000), (1, 1000), (0, 100_000)], ids=["before", "other", "within"])
def test_a_file_that_cannot_grow_while_the_model_is_saved(rank: int, size: int, saved: Path, blend: Path) -> None:
    """A real failure on one rank, before Megatron writes or in the middle of it."""

    def limit() -> None:
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    told = run_on_ranks(2, fail_to_save(settings_of(blend, saved, "run.save_interval=2"), limit), timeout=SECONDS)
    check_full(told, saved, blend, "checkpoints/iter_0000006")


def check_full(told: list[str], saved: Path, blend: Path, said: str) -> None:
    """Both ranks said the same, nothing half-written counts, and the run goes on from the older checkpoint."""
    assert len(set(told)) == 1
    assert said in told[0]
    names = sorted(path.name for path in (saved / "checkpoints").iterdir())
    assert names == ["iter_0000004", "latest"]
    rest = run_on_ranks(2, train, settings_of(blend, saved))
    assert rest[0].summary["finished"]
    assert len(rest[0].chosen) == rest[0].summary["iterations"] - 4


def test_latest_that_is_a_folder(saved: Path, blend: Path) -> None:
    (saved / "checkpoints" / "latest").unlink()
    (saved / "checkpoints" / "latest").mkdir()
    message = told_by_every_rank(2, settings_of(blend, saved), CheckpointError)
    assert "latest must be a file that names the newest checkpoint, but is a folder. Remove it" in message


def test_the_checkpoint_of_the_other_backend(saved: Path, blend: Path) -> None:
    message = told_by_every_rank(2, settings_of(blend, saved, "backend=deepspeed"), CheckpointError)
    assert "iter_0000004` was saved with `backend: megatron`, but this run has `backend: deepspeed`" in message


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs the right to mount a small file system")
def test_a_file_system_without_space(blend: Path, tmp_path: Path) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True, timeout=20).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        run = fail_to_save(settings_of(blend, small / "run", "run.save_interval=6"), lambda: None)
        told = run_on_ranks(2, run, timeout=SECONDS)
        assert len(set(told)) == 1
        assert "bytes are free" in told[0] or "are free" in told[0]
        assert "Free some space" in told[0]
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=20)
