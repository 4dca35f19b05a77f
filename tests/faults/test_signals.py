"""Signals at one rank, a second start in a folder, and an output or a limit that gives way under a run."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from es_megatron.checkpoint.rotation import CheckpointDirectory
from es_megatron.trainer.command import STOPPED
from es_megatron.trainer.run_lock import NAME
from tests.faults.job import Job, free_port, start

from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip - the CPU layer stands by now

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENDLESS = "training.train_samples=160000"
LIMIT = 60.0
"""Seconds in which a job ends, once it has a reason to."""
RUN = 240.0
"""Seconds for a short run from its start, on a machine that does much else."""
SHORT = "training.train_samples=160"


def checkpoints(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())


def begun(job: Job) -> Job:
    job.wait_for("iteration        6/")
    return job


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
def test_a_request_to_end_reaches_all_ranks_from_any(tmp_path: Path, number: int) -> None:
    job = begun(start(tmp_path, ENDLESS, "run.save_interval=null", "training.log_interval=1"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    job.kill(1, number)
    assert job.codes(LIMIT) == [STOPPED, STOPPED], job.said(1)
    assert [name[:5] for name in checkpoints(tmp_path)] == ["iter_", "lates"]


@pytest.mark.parametrize("rank", range(2))
def test_a_killed_rank_ends_the_other(tmp_path: Path, rank: int) -> None:
    job = begun(start(tmp_path, ENDLESS))
    job.kill(rank)
    codes = job.codes(LIMIT)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 2, job.said(1 - rank)
    assert f"Rank {1 - rank} lost another rank" in job.said(1 - rank)
    assert job.left_behind() == []


def hang_in_the_writer(rank: int) -> None:
    if rank != 0:
        return
    write = filesystem_async._write_item

    def hang(*args: Any, **options: Any) -> Any:
        print("writing", flush=True)
        time.sleep(600)
        return write(*args, **options)

    filesystem_async._write_item = hang


def test_a_rank_that_is_killed_while_it_writes_leaves_no_writer(tmp_path: Path) -> None:
    job = start(tmp_path, ENDLESS, prepare=hang_in_the_writer)
    job.wait_for("writing")
    job.kill(0)
    alive = job.left_behind()
    codes = job.codes(LIMIT)
    assert codes == [-signal.SIGKILL, 2], job.said(1)
    assert [pid for pid in alive if int(pid) not in (job.pid(0), job.pid(1))] == []


def test_a_second_start_in_a_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first = begun(start(tmp_path, ENDLESS, "run.save_interval=null"))
    second = start(tmp_path, ENDLESS, "training.seed=5", folder="second")
    assert second.codes(RUN) == [2, 2]
    for rank in range(2):
        assert f"process {first.pid(0)} on " in second.said(rank)
        assert "choose another `run.directory`" in second.said(rank)
    assert "seed: 5" not in (tmp_path / "run" / "settings.yaml").read_text()
    first.kill(0, signal.SIGTERM)
    assert first.codes(LIMIT) == [STOPPED, STOPPED]
    third = start(tmp_path, ENDLESS, folder="third")
    third.wait_for("resumed from")
    third.kill(0)
    third.codes(LIMIT)
    start(tmp_path, ENDLESS, folder="fourth").wait_for("resumed from")  # a crash releases the folder


def test_ranks_that_outlive_their_launcher_are_noticed(tmp_path: Path) -> None:
    job = start(tmp_path, ENDLESS)  # writes the settings
    job.end()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    rest = ["-m", "es_megatron.cli", "pretrain", "--config", str(tmp_path / "told.yaml")]
    with (tmp_path / "output.txt").open("w") as output:
        launcher = subprocess.Popen([*command, str(free_port()), *rest], stdout=output, stderr=output)
        log = tmp_path / "run" / "log.txt"
        until = time.monotonic() + RUN
        while not (log.exists() and "iteration        6/" in log.read_text()):
            assert launcher.poll() is None and time.monotonic() < until, (tmp_path / "output.txt").read_text()  # noqa: PT018
            time.sleep(0.2)
        launcher.kill()
        launcher.wait()
    holder = int((tmp_path / "run" / NAME).read_text().split('"pid": ')[1].split(",")[0])
    try:
        second = start(tmp_path, ENDLESS, folder="second")
        assert second.codes(RUN) == [2, 2]
        assert f"end it with `kill {holder}`" in second.said(1)
        os.kill(holder, signal.SIGTERM)
        until = time.monotonic() + LIMIT
        while "saved" not in log.read_text().splitlines()[-1]:
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        end(holder)


def end(pid: int) -> None:
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def close_output(rank: int) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    os.dup2(theirs, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)


def narrow_output(rank: int) -> None:
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="latin-1")  # noqa: SIM115


@pytest.mark.parametrize("prepare", [close_output, narrow_output])
def test_an_output_that_takes_nothing_ends_no_run(tmp_path: Path, prepare: Callable[[int], None]) -> None:
    job = start(tmp_path, SHORT, ranks=1, prepare=prepare, sizes={"\u6587": 60, "b": 30})
    assert job.codes(RUN) == [0], job.said(0)
    assert "latest" in checkpoints(tmp_path)
    assert "\u6587" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    if prepare is narrow_output:
        assert "\\u6587" in job.said(0)
    else:
        assert job.said(0).count("standard output is closed") == 1


LIMITS = {
    "files": (resource.RLIMIT_NOFILE, 3, "Too many open files"),
    "size": (resource.RLIMIT_FSIZE, 200_000, "File too large"),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_a_limit_that_a_save_meets_is_told_and_leaves_the_save_before(tmp_path: Path, kind: str) -> None:
    what, limit, words = LIMITS[kind]

    def lower_before_the_second_save(rank: int) -> None:
        begin = CheckpointDirectory.begin

        def lowered(self: CheckpointDirectory, iteration: int) -> Path:
            if iteration == 8:
                resource.setrlimit(what, (limit, limit))
            return begin(self, iteration)

        CheckpointDirectory.begin = lowered

    job = start(tmp_path, ranks=1, prepare=lower_before_the_second_save)
    assert job.codes(RUN) == [2], job.said(0)
    assert words in job.said(0)
    assert [name for name in checkpoints(tmp_path) if "partial" not in name] == ["iter_0000004", "latest"]
