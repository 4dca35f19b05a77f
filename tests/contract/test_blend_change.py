"""A run that goes on over another blend, and one that saves in the background, through the real trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from es_megatron.checkpoint.es_state import read_manifest, read_state
from es_megatron.errors import CheckpointError
from tests.ranks_helper import RankFailure, run_on_ranks

from tests.small_run import T, audit_of, settings_of, train, write_blend, write_component  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def stop_after(count: int) -> Any:
    def stop(trainer: Any, iteration: int) -> None:
        if iteration == count - 1:
            trainer.alarm.ask_to_stop()

    return stop


def run(settings: Any, count: int = 10**9) -> Any:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("es_megatron").addHandler(handler)
    logging.getLogger("es_megatron").setLevel(logging.INFO)
    history = train(settings, after=stop_after(count))
    return history, records


def scores_of(directory: Path, name: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Scores and visits of a component in the newest checkpoint of a run, and the state."""
    from es_megatron.checkpoint.transfer import Move, Transfer, find_scores, read_moved, saved_blend

    folder = find_scores(directory)
    blend = saved_blend(folder)
    number = [component.name for component in blend.components].index(name)
    rows = int(blend.sizes[number])
    score, visits = np.zeros(rows, np.float32), np.zeros(rows, np.uint8)
    read_moved(folder, Transfer((Move(int(blend.offsets[number]), 0, rows),), ()), 0, score, visits)
    return score, visits, read_state(folder, read_manifest(folder))


def change_blend(path: Path) -> None:
    """Drop `c`, append to `a`, add `d`, draw `b` more often."""
    folder = path.parent
    old = np.fromfile(folder / "a.bin", np.uint16)
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "a2.bin"), np.uint16)
    builder.add_document(old.astype(np.int64), [len(old)])
    builder.add_document(np.arange(20 * T) % 90, [20 * T])
    builder.finalize(str(folder / "a2.idx"))
    write_component(folder / "d", 25, 77)
    entries = [("d", "d", 25.0), ("a", "a2", 90.0), ("b", "b", 60.0)]
    blend = {
        "vocab_size": 96,
        "components": [{"name": name, "train": prefix, "weight": weight} for name, prefix, weight in entries],
    }
    path.write_text(yaml.safe_dump(blend))


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_changed_blend_keeps_the_scores_of_what_did_not_change(tmp_path: Path, ranks: tuple[int, int]) -> None:
    blend = write_blend(tmp_path / "data")
    directory = tmp_path / "run"
    first = settings_of(blend, directory, "training.train_samples=800")
    run_on_ranks(ranks[0], run, first, 20, timeout=200)
    before = {name: scores_of(directory, name) for name in "ab"}
    assert before["a"][1].min() > 0, "a whole pass was made"
    change_blend(blend)
    with pytest.raises(RankFailure, match="on_blend_change=keep_scores"):
        run_on_ranks(ranks[1], run, first, timeout=200)
    second = settings_of(blend, directory, "training.train_samples=800", "run.on_blend_change=keep_scores")
    told = run_on_ranks(ranks[1], run, second, 21, timeout=200)
    said = "\n".join(told[0][1])
    for sentence in (
        "iteration 20 begins a new order",
        "`c` was removed",
        "`d` was added with 25 samples",
        "`a` has 20 more samples, its first 70 keep their scores",
        "`b` has",
        "epoch 0 is pruned for b",
    ):
        assert sentence in said, said
    after = {name: scores_of(directory, name) for name in "abd"}
    trained = audit_of(directory)
    assert len(trained) == 21
    moved = np.flatnonzero((after["a"][0][:70] != before["a"][0]) | (after["a"][1][:70] != before["a"][1]))
    assert len(moved) <= 16, "one iteration changes at most its meta-batch"
    assert np.array_equal(np.delete(after["a"][0][:70], moved), np.delete(before["a"][0], moved))
    assert after["a"][1][70:].max() <= 1
    state = after["d"][2]["engine"]
    assert state["origin"]["iteration"] == 20
    assert state["origin"]["stood_for"] >= 20 * 16
    assert state["origin"]["scored"] == ["b"]
    # the run ends, is resumed once more on the way, and stands for what was asked for
    rest = run_on_ranks(ranks[1], run, second, timeout=200)
    history = rest[0][0]
    assert history.summary["finished"]
    assert 20 < history.summary["planned_iterations"] < 50
    assert len(audit_of(directory)) == history.summary["planned_iterations"]
    assert (1, 0) not in history.pruned, "the mask of b's epoch 0 was decided before, and came from the checkpoint"
    assert np.isfinite(history.loss[-1])


def test_another_text_under_the_same_name_is_an_error(tmp_path: Path) -> None:
    blend = write_blend(tmp_path / "data")
    directory = tmp_path / "run"
    run_on_ranks(1, run, settings_of(blend, directory), 4, timeout=200)
    write_component(tmp_path / "data" / "b", 30, 999)
    keep = settings_of(blend, directory, "run.on_blend_change=keep_scores")
    with pytest.raises(RankFailure, match="files of component `b` must be those its scores belong to"):
        run_on_ranks(1, run, keep, timeout=200)
    write_component(tmp_path / "data" / "b", 45, 999)
    with pytest.raises(RankFailure, match="or those with text appended"):
        run_on_ranks(1, run, keep, timeout=200)


def test_saving_in_the_background_saves_the_same(tmp_path: Path) -> None:
    blend = write_blend(tmp_path / "data")
    options = ("run.save_interval=6", "run.keep_checkpoints=9")
    run_on_ranks(2, run, settings_of(blend, tmp_path / "front", *options), timeout=200)
    histories = run_on_ranks(2, run, settings_of(blend, tmp_path / "back", *options, "run.background_save=true"))
    front, back = (sorted((tmp_path / name / "checkpoints").iterdir()) for name in ("front", "back"))
    assert [path.name for path in front] == [path.name for path in back]
    assert len(front) > 4
    for one, other in zip(front, back, strict=True):
        if one.is_dir():
            for file in ("scores-00000-of-00002.safetensors", "scores-00001-of-00002.safetensors", "masks.safetensors"):
                assert (one / "es_state" / file).read_bytes() == (other / "es_state" / file).read_bytes()
    assert histories[0][0].summary["finished"]


def test_a_background_save_that_fails_leaves_the_last_one_and_stops_every_rank(tmp_path: Path) -> None:
    blend = write_blend(tmp_path / "data")
    directory = tmp_path / "run"
    options = ("run.save_interval=4", "run.background_save=true")

    def fail_later(settings: Any) -> None:
        from es_megatron.checkpoint import es_state

        write = es_state._write_scores

        def broken(folder: Path, scores: Any, grid: Any) -> Any:
            if "iter_0000008" in str(folder) and grid.world_rank == 1:
                raise OSError(28, "No space left on device", str(folder))
            return write(folder, scores, grid)

        es_state._write_scores = broken
        with pytest.raises(CheckpointError, match=r"rank 1: .*iter_0000008.*No space left on device; free space"):
            run(settings)

    run_on_ranks(2, fail_later, settings_of(blend, directory, *options), timeout=200)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["iter_0000004", "latest"]


def test_scores_of_another_run_let_epoch_zero_prune(tmp_path: Path) -> None:
    blend = write_blend(tmp_path / "data")
    proxy = settings_of(blend, tmp_path / "proxy", "training.train_samples=400", "run.save_interval=10")
    run_on_ranks(1, run, proxy, timeout=200)
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    given = f"evolved_sampling.scores.initial={tmp_path / 'proxy'}"
    options = ("training.train_samples=240", "evolved_sampling.selection.anneal=0")
    histories = [
        run_on_ranks(2, run, settings_of(blend, directory, *options, *more), timeout=200)[0][0]
        for directory, more in ((cold, ()), (warm, (given,)))
    ]
    assert (0, 0) not in histories[0].pruned
    assert (0, 0) in histories[1].pruned
    assert histories[1].summary["planned_iterations"] < histories[0].summary["planned_iterations"]
    uninterrupted = audit_of(warm)
    again = tmp_path / "again"
    run_on_ranks(2, run, settings_of(blend, again, *options, given), 5, timeout=200)
    run_on_ranks(1, run, settings_of(blend, again, *options, given), timeout=200)
    assert audit_of(again) == uninterrupted
