"""Whole runs chose, scored and pruned as they do now: changes that move code must not move these.

One rank on Megatron-Core; that every layout, DeepSpeed and a resumed run do what one rank does is held by other tests.
Write the file anew with `ES_WRITE_GOLDEN=1 python -m pytest tests/contract/test_golden_runs.py`, and tell why.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract import test_policies
from tests.ranks_helper import run_on_ranks
from tests.small_run import History, settings_of, train, write_blend

FILE = Path(__file__).parent / "golden_runs.json"
SECONDS = 200
VARIANTS: dict[str, tuple[str, ...]] = {
    **{arm: (f"arm={arm}",) for arm in ("es", "plain", "uniform", "uniform-prune", "shortened", "shuffled")},
    "history": ("scorer=history",),
    "default": ("preset=default", "keep_ratio=0.25"),
    "every-k": ("scorer=every-k", "score_every=3"),
    "microbatch": ("granularity=microbatch",),
    "inclusion": ("inclusion_weights=true",),
    "debiased": ("score_correction=debiased", "weight_floor=0.5"),
    "no-annealing": ("anneal=0", "pruning_ratio=0", "beta1=0.5", "beta2=0.7"),
    **{name: test_policies.VARIANTS[name] for name in ("parts", "prefix", "guard", "budget", "match-cost")},
    **{name: changes for name, changes in test_policies.VARIANTS.items() if name.startswith(("policy-", "pruner-"))},
}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def told_of(history: History) -> dict[str, Any]:
    """What must not change: choices and masks exactly, losses, scores and weights to what a processor may change."""
    score = np.frombuffer(history.scores[0], np.float32).astype(np.float64)
    return {
        "chosen": digest(history.chosen),
        "masks": digest([[*key, mask.hex()] for key, mask in sorted(history.pruned.items())]),
        "visits": digest(np.frombuffer(history.scores[1], np.uint8).tolist()),
        "iterations": len(history.chosen),
        "loss": float(np.nansum(history.loss)),
        "score": float(score.sum()),
        "weights": history.weights,
        "norm": float(np.sum(history.norm)),
    }


def train_all(names: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    """One after the other in one process."""
    from megatron.core import parallel_state

    found: dict[str, dict[str, Any]] = {}
    blend = write_blend(folder / "data")
    for name in names:
        changes = [f"evolved_sampling.{change}" for change in VARIANTS[name]]
        short = [test_policies.SAMPLES, test_policies.SHALLOW]
        found[name] = told_of(train(settings_of(blend, folder / name, *short, *changes)))
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if not found:
            found.update(
                run_on_ranks(1, train_all, tuple(VARIANTS), tmp_path_factory.mktemp("golden"), timeout=SECONDS)[0]
            )
            if os.environ.get("ES_WRITE_GOLDEN"):
                FILE.write_text(json.dumps(found, indent=1) + "\n")
        return found[name]

    return run


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("name", VARIANTS)
def test_runs_are_the_golden_ones(name: str, runs: Callable[[str], dict[str, Any]]) -> None:
    found = runs(name)
    golden = json.loads(FILE.read_text())
    assert set(golden) == set(VARIANTS)
    exact, close = ("chosen", "masks", "visits", "iterations"), ("loss", "score", "weights", "norm")
    assert [found[key] for key in exact] == [golden[name][key] for key in exact]
    assert [found[key] for key in close] == pytest.approx([golden[name][key] for key in close], rel=1e-5)
