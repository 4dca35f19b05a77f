"""Totals of a run and the log line."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from es_megatron.core.metrics import LogEntry, RunTotals
from es_megatron.core.step import StepRecord


def record(
    components: list[int], *, scored: int = 0, evolving: bool = True, bad: int = 0, masked: int = 0, **seconds: float
) -> StepRecord:
    ids = np.arange(len(components))
    return StepRecord(0, evolving, scored, ids, np.asarray(components), 1.0, 1.0, bad, seconds, masked=masked)


def filled() -> RunTotals:
    totals = RunTotals(3, 8)
    totals.add(record([0, 0, 2], scored=8, score=1.0, train=2.0), {"step": 4.0}, succeeded=True)
    totals.add(record([1] * 8, evolving=False, bad=2, masked=3, train=3.0), {"step": 5.0}, succeeded=False)
    return totals


def test_totals_add_up() -> None:
    totals = filled()
    assert (totals.sequences_scored, totals.sequences_trained, totals.evolving_iterations) == (8, 11, 1)
    assert (totals.bad, totals.masked, totals.skipped) == (2, 3, 1)
    assert totals.chosen.tolist() == [2, 8, 1]
    assert totals.seconds == {"score": 1.0, "train": 5.0, "step": 9.0}


def test_totals_go_through_a_checkpoint() -> None:
    other = RunTotals(3, 8)
    other.load_state_dict(json.loads(json.dumps(filled().state_dict())))
    other.add(record([2], scored=8, score=1.0), {}, succeeded=True)
    expected = filled()
    expected.add(record([2], scored=8, score=1.0), {}, succeeded=True)
    assert other.state_dict() == expected.state_dict()
    assert other.state_dict() != filled().state_dict()


def test_a_state_that_lacks_something_is_refused() -> None:
    state: dict[str, Any] = filled().state_dict()
    older = RunTotals(3, 8)
    older.load_state_dict({name: value for name, value in state.items() if name != "drawn"})
    assert older.drawn.tolist() == older.chosen.tolist(), "of a version that did not count draws"
    older.load_state_dict({name: value for name, value in state.items() if name != "masked"})
    assert older.masked == 0, "of a version that did not count masked ones"
    for key in state.keys() - {"drawn", "masked"}:
        with pytest.raises(KeyError, match=key):
            RunTotals(3, 8).load_state_dict({name: value for name, value in state.items() if name != key})


def test_the_log_line_is_megatrons_with_what_es_adds() -> None:
    entry = LogEntry(
        iteration=12,
        iterations=340,
        consumed=768,
        milliseconds=81.25,
        learning_rate=1.5e-3,
        meta_batch=64,
        lm_loss=3.25,
        kept=16,
        score_ms=20.0,
        train_ms=50.0,
        other_ms=11.25,
        grad_norm=0.5,
        skipped=1,
        bad=2,
    )
    parts = [part.strip() for part in entry.line().split("|")]
    assert parts[0].endswith("iteration       12/     340")
    assert parts[-1] == ""
    assert "consumed samples:          768" in parts
    assert "learning rate: 1.500000E-03" in parts
    assert "lm loss: 3.250000E+00" in parts
    assert "es kept: 16/64" in parts
    assert "es score/train/other (ms): 20.0/50.0/11.2" in parts
    assert "number of skipped iterations:   1" in parts
    assert "number of nan sequences:   2" in parts
    assert "| lm loss: NAN |" in LogEntry(**{**vars(entry), "lm_loss": math.nan}).line()


def test_shares_name_first_what_has_moved_most() -> None:
    totals = RunTotals(3, 8)
    totals.drawn[:], totals.chosen[:] = [50, 30, 20], [10, 12, 3]
    assert totals.shares(["a", "b", "c"])["b"] == (0.3, 0.48)
    assert totals.told_shares(["a", "b", "c"]) == "b 30.0/48.0%, a 50.0/40.0%, c 20.0/12.0%"
    assert RunTotals(1, 8).told_shares(["a"]) == ""
    assert RunTotals(9, 8).told_shares(list("abcdefghi")).endswith("f 0.0/0.0%, 3 more")
