"""A damaged row is named by `spike`, and never drawn again once `skip` has named it; on any number of ranks."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.cli import main
from es_megatron.core.skipped import SKIPPED
from tests.ranks_helper import RankFailure, run_on_ranks
from tests.small_run import SIZES, VOCABULARY, History, T, Trainer, audit_of, settings_of, train, write_blend

DAMAGED = 33
"""Row of component `a`, and its id."""
SAVED_EACH = 4
Go = Callable[..., list[History]]


def spike_of(directory: Path, *arguments: str) -> dict[str, Any]:
    """What `spike --json` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["spike", str(directory), "--json", *arguments]) == 0
    return json.loads(printed.getvalue())


@pytest.fixture(scope="module")
def damaged_blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blend in which one row has tokens that stand nowhere else, in no order."""
    blend = write_blend(tmp_path_factory.mktemp("data"))
    path = blend.parent / "a.bin"
    tokens = np.fromfile(path, np.uint16) % (VOCABULARY // 2)
    tokens[DAMAGED * T + 1 : (DAMAGED + 1) * T] = np.random.default_rng(1).permutation(VOCABULARY // 2)[: T - 1] + 48
    tokens.tofile(path)
    return blend


@pytest.fixture(scope="module")
def go(damaged_blend: Path) -> Go:
    """Start or resume a run in a directory; `stop` is the iteration after which SIGTERM comes."""

    def run(directory: Path, ranks: int, *overrides: str, stop: int = -1) -> list[History]:
        def terminate(trainer: Trainer, iteration: int) -> None:
            if iteration == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        often = (f"run.save_interval={SAVED_EACH}", "run.keep_checkpoints=20")
        settings = settings_of(damaged_blend, directory, *often, *overrides)
        return run_on_ranks(ranks, functools.partial(train, settings, after=terminate), timeout=100)

    return run


@pytest.fixture(scope="module")
def spiked(go: Go, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run, and an iteration that trained the damaged row after the first checkpoint."""
    directory = tmp_path_factory.mktemp("spiked")
    go(directory, 1)
    at = [number for number, ids in enumerate(audit_of(directory)) if DAMAGED in ids and number >= SAVED_EACH]
    return directory, at[0]


def test_the_damaged_row_is_named(spiked: tuple[Path, int]) -> None:
    directory, at = spiked
    found = spike_of(directory, "--iteration", str(at), "--before", "0", "--top", "1", "--text")
    (row,) = found["rows"]
    assert (row["component"], row["row"], row["iteration"], row["documents"]) == ("a", DAMAGED, at, [0])
    losses = [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()][at]
    assert row["loss"] == pytest.approx(losses["loss"][losses["chosen"].index(DAMAGED)])
    assert row["loss"] == pytest.approx(max(losses["loss"]))
    assert row["visits after"] == (row["visits before"] or 0) + 1
    before = at // SAVED_EACH * SAVED_EACH
    assert found["checkpoints"]["before"] == f"iter_{before:07d}"
    assert row["text"].startswith("tokens ")
    assert found["command"] == f"es-megatron skip {directory} a:{DAMAGED}"
    (point,) = found["curve"]
    assert point["loss"] == pytest.approx(np.mean(losses["loss"]), rel=1e-4)
    assert point["gradient norm"] == losses["norm"]


def test_drawn_rows_are_found_without_an_audit(spiked: tuple[Path, int], tmp_path: Path) -> None:
    directory, at = spiked
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    chosen = audit_of(copy)
    (copy / "audit.jsonl").unlink()
    for iteration in (0, at, len(chosen) - 1):
        found = spike_of(copy, "--iteration", str(iteration), "--top", "16")
        offsets = dict(zip(SIZES, np.cumsum([0, *SIZES.values()]), strict=False))
        assert len(found["rows"]) == 16
        assert {offsets[row["component"]] + row["row"] for row in found["rows"]} >= set(chosen[iteration])
        assert "run.audit=true" in found["what"]
        (*_, stretch) = found["curve"]  # of the metrics file, which begins a stretch at every save
        first, _, last = stretch["iterations"].partition("-")
        assert int(first) <= iteration <= int(last or first)
        assert stretch["loss"] > 0
        assert stretch["gradient norm"] > 0


@pytest.fixture(scope="module")
def rolled_back(spiked: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Copies of the run that stand before the spike and leave the damaged row out."""
    directory, at = spiked
    folder = tmp_path_factory.mktemp("rolled")

    def copied(name: str) -> Path:
        copy = folder / name
        shutil.copytree(directory, copy)
        found = spike_of(copy, "--iteration", str(at))
        assert found["checkpoints"]["before"] == f"iter_{at // SAVED_EACH * SAVED_EACH:07d}"
        (copy / "checkpoints" / "latest").write_text(found["checkpoints"]["before"])
        assert main(["skip", str(copy), f"a:{DAMAGED}", "a:3-4"]) == 0
        return copy

    return copied


@pytest.fixture(scope="module")
def left_out(rolled_back: Callable[[str], Path], go: Go) -> Path:
    """The run that went on without the row, on one rank, without interruption."""
    directory = rolled_back("one")
    go(directory, 1)
    return directory


@pytest.mark.timeout(200)
def test_rows_left_out_are_not_trained_any_more(left_out: Path, spiked: tuple[Path, int]) -> None:
    directory, at = spiked
    begun = at // SAVED_EACH * SAVED_EACH
    with_it, without = audit_of(directory), audit_of(left_out)
    assert with_it[:begun] == without[:begun]
    assert len(without) == len(with_it)  # the plan of the run has not changed
    assert not {DAMAGED, 3, 4} & {each for ids in without[begun:] for each in ids}
    log = (left_out / "log.txt").read_text()
    assert f"\nthe run leaves out 3 rows (a 3) from iteration {begun} on\n" in log


@pytest.mark.timeout(300)
def test_any_layout_and_any_interruption_give_the_same(
    left_out: Path, rolled_back: Callable[[str], Path], go: Go, spiked: tuple[Path, int]
) -> None:
    two = rolled_back("two")
    go(two, 2, stop=spiked[1] + 1)
    go(two, 2)
    assert audit_of(two) == audit_of(left_out)
    assert "the run leaves out" not in (two / "log.txt").read_text().rpartition("plan:")[2]  # no news the second time


@pytest.mark.timeout(200)
def test_going_on_without_the_file_is_refused(left_out: Path, go: Go, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(left_out, copy)
    (copy / SKIPPED).unlink()
    with pytest.raises(RankFailure, match=r"leaves out 3 rows \(a 3\), but `order.skip` names no file"):
        go(copy, 1)
    (copy / SKIPPED).write_text('{"components": {}}')
    assert go(copy, 1)[0].chosen == []  # the run was finished
