"""A save that fails on one of two ranks ends both, typed, within a minute."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from es_megatron.frameworks import deepspeed_common
from tests.faults.job import Job, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LIMIT = 60.0
BEGUN = "it fails now"
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
MEGATRON = {
    "common": "megatron.core.dist_checkpointing.strategies.common:TorchCommonSaveStrategy.save_common",
    "tensors": f"{WRITER}:_write_item",
    "metadata": f"{WRITER}:FileSystemWriterAsync.finish",
    "config": "megatron.core.dist_checkpointing.serialization:save_config",
}
RANK_0_ALONE = ("metadata", "config")
DEEPSPEED = {"engine": "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.save"}


def fail_at(place: str, at: int, error: Exception | None = None) -> Callable[[int], None]:
    """Have a function of a module raise in one rank."""

    def prepare(rank: int) -> None:
        if rank != at:
            return
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        assert callable(getattr(owner, name))

        def fail(*_: Any, **__: Any) -> Any:
            print(BEGUN, flush=True)
            raise error or OSError(5, "Input/output error", "made up")

        setattr(owner, name, fail)

    return prepare


def check_ended(job: Job, failing: int) -> None:
    """Both ranks have ended with an error that names the failure and the rank, soon, and left no process."""
    job.wait_for(BEGUN, failing)
    codes = job.codes(LIMIT)
    told = "\n".join(f"--- rank {rank}\n{job.said(rank)}" for rank in range(2))
    assert codes == [2, 2], told
    for rank in range(2):
        assert "error: " in job.said(rank), told
        assert "Input/output error" in job.said(rank), told
        if rank != failing:
            assert f"Rank {failing} failed with " in job.said(rank) or f"rank {failing}:" in job.said(rank), told
    assert job.left_behind() == []


@pytest.mark.parametrize(
    ("fault", "rank"),
    [(fault, rank) for fault in MEGATRON for rank in range(2) if not (rank and fault in RANK_0_ALONE)],
)
def test_megatron(tmp_path: Path, fault: str, rank: int) -> None:
    check_ended(start(tmp_path, "parallel.pipeline=2", prepare=fail_at(MEGATRON[fault], rank)), rank)


@pytest.mark.parametrize("rank", range(2))
def test_deepspeed(tmp_path: Path, rank: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: install es_megatron[deepspeed]")
    deepspeed_common.prepare()
    check_ended(start(tmp_path, "backend=deepspeed", prepare=fail_at(DEEPSPEED["engine"], rank)), rank)
