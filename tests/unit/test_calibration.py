"""The calibration: a pass is timed until its last stage is done."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from es_megatron.trainer import passes


def test_a_pass_is_timed_until_its_last_stage_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def advance(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    waits = iter([5.0, 2.0] * 100)  # the other stages: late to begin, and late to end
    grid: Any = SimpleNamespace(barrier=lambda: advance(next(waits)), broadcast=np.asarray)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    stages: Any = SimpleNamespace(grid=grid)

    told = passes.quickest(stages, lambda: None, [lambda: advance(1.0), lambda: advance(4.0)])

    assert told == [3.0, 6.0]
