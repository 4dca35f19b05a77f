"""A save in the background: where it runs, where its failure is raised, and that the end of a process waits for it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from es_megatron.checkpoint import CheckpointDirectory, disk
from es_megatron.checkpoint.background import BackgroundSave, start_in_thread
from es_megatron.checkpoint.es_state import EsStateWriter
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid
from tests.checkpoint_helper import MANIFEST, MASKS, own_scores

ALONE = RankGrid.alone()


def begin(root: Path, iteration: int, write: Callable[[EsStateWriter], None] = EsStateWriter.write) -> BackgroundSave:
    """Begin to save, with another way to write the scores if one is given."""

    class Writer(EsStateWriter):
        def write(self) -> None:
            write(self)

    checkpoints = CheckpointDirectory(root, 2, ALONE)
    folder = checkpoints.begin(iteration) / "es_state"
    disk.make_folder(folder.parent)
    writer = Writer(folder, own_scores(3, ALONE, iteration), MASKS, {"iteration": iteration}, MANIFEST, ALONE)
    return BackgroundSave(checkpoints, iteration, writer, ALONE)


def test_training_goes_on_until_the_scores_are_written(tmp_path: Path) -> None:
    may_write, threads = threading.Event(), list[threading.Thread]()

    def write(writer: EsStateWriter) -> None:
        threads.append(threading.current_thread())
        assert may_write.wait(60)
        EsStateWriter.write(writer)

    save = begin(tmp_path, 4, write)
    assert save.advance() is None
    assert save.report is None
    assert CheckpointDirectory(tmp_path, 2, ALONE).find() is None
    may_write.set()
    assert save.advance(wait=True) == tmp_path / "iter_0000004"
    assert CheckpointDirectory(tmp_path, 2, ALONE).find() == tmp_path / "iter_0000004"
    assert threads[0] is not threading.main_thread()
    assert save.report is not None


def test_failure_is_raised_where_the_save_is_advanced_and_leaves_the_older_one(tmp_path: Path) -> None:
    begin(tmp_path, 4).advance(wait=True)

    def fail(_: EsStateWriter) -> None:
        raise OSError(28, "No space left on device", "scores")

    save = begin(tmp_path, 8, fail)
    with pytest.raises(CheckpointError, match=r"Could not save iteration 8: scores: No space left .*free space"):
        save.advance(wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000004", "latest"]


def test_thread_ends_with_its_function() -> None:
    start_in_thread(lambda: None).result(60)
    for thread in threading.enumerate():
        if thread.name.startswith("es-checkpoint"):
            thread.join(60)
    assert not any(thread.name.startswith("es-checkpoint") for thread in threading.enumerate())


def test_end_of_a_process_waits_for_what_is_written(tmp_path: Path) -> None:
    script = """
import pathlib, sys, time
from es_megatron.checkpoint.background import start_in_thread
def write():
    time.sleep(0.5)
    pathlib.Path(sys.argv[1]).write_text("whole")
start_in_thread(write)
raise SystemExit(3)
"""
    file = tmp_path / "written"
    ended = subprocess.run([sys.executable, "-c", script, str(file)], timeout=100, check=False)
    assert ended.returncode == 3
    assert file.read_text() == "whole"
