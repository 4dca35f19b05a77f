"""Whole runs chose, scored and pruned as they do now: changes that move code must not move these.

Every arm, scorer, policy and pruner on one rank of Megatron-Core; and layouts, DeepSpeed, and a run that goes on with
another number of ranks, with fresh scores and with free ones. Write the file anew with
`ES_WRITE_GOLDEN=1 python -m pytest tests/contract/test_golden_runs.py`, and tell why.
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

from tests import deepspeed_helper
from tests.contract import test_policies
from tests.ranks_helper import run_on_ranks
from tests.small_run import History, settings_of, train, write_blend

FILE = Path(__file__).parent / "golden_runs.json"
SECONDS = 200
VARIANTS: dict[str, tuple[str, ...]] = {
    **{arm: (f"arm={arm}",) for arm in ("es", "plain", "uniform", "uniform-prune", "shortened", "shuffled")},
    "history": ("scorer=history",),
    "default": ("preset=default", "selection.keep_ratio=0.25"),
    "every-k": ("scorer=every-k", "scorer.every=3"),
    "microbatch": ("selection.granularity=microbatch",),
    "inclusion": ("selection.inclusion_weights=true",),
    "debiased": ("scores.correction=debiased", "selection.weight_floor=0.5"),
    "no-annealing": ("selection.anneal=0", "pruning.ratio=0", "scores.beta1=0.5", "scores.beta2=0.7"),
    **{name: test_policies.VARIANTS[name] for name in ("parts", "prefix", "guard", "budget")},
    **{name: changes for name, changes in test_policies.VARIANTS.items() if name.startswith(("policy-", "pruner-"))},
}
SCORERS = {"fresh": (), "history": ("scorer=history",)}
DEEPSPEED = "backend=deepspeed"
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "dp2": ((2,), ()),
    "tp2": ((2,), ("parallel.tensor=2",)),
    "pp2": ((2,), ("parallel.pipeline=2",)),
    "dp2-to-dp1": ((2, 1), ()),
    "deepspeed-zero2-dp2": ((2,), (DEEPSPEED, "deepspeed.zero_stage=2")),
    "deepspeed-pp2": ((2,), (DEEPSPEED, "deepspeed.zero_stage=1", "parallel.pipeline=2")),
    "deepspeed-dp1-to-dp2": ((1, 2), (DEEPSPEED, "deepspeed.zero_stage=1")),
}
"""Ranks of a run, and of the one that goes on from it, if there is one."""
STOP = 14


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


def write(found: dict[str, dict[str, Any]]) -> None:
    """Into the file, where that is asked for."""
    if os.environ.get("ES_WRITE_GOLDEN"):
        golden = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps({**golden, **found}, indent=1) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if not found:
            found.update(
                run_on_ranks(1, train_all, tuple(VARIANTS), tmp_path_factory.mktemp("golden"), timeout=SECONDS)[0]
            )
            write(found)
        return found[name]

    return run


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("name", VARIANTS)
def test_runs_are_the_golden_ones(name: str, runs: Callable[[str], dict[str, Any]]) -> None:
    found = runs(name)
    golden = json.loads(FILE.read_text())
    exact, close = ("chosen", "masks", "visits", "iterations"), ("loss", "score", "weights", "norm")
    assert [found[key] for key in exact] == [golden[name][key] for key in exact]
    assert [found[key] for key in close] == pytest.approx([golden[name][key] for key in close], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_the_golden_ones(layout: str, scorer: str, tmp_path: Path) -> None:
    sizes, overrides = LAYOUTS[layout]
    options = [test_policies.SAMPLES, test_policies.SHALLOW, *overrides]
    options += [f"evolved_sampling.{change}" for change in SCORERS[scorer]]
    blend = write_blend(tmp_path / "data")
    chosen: list[list[int]] = []
    loss: list[float] = []
    scores: list[tuple[bytes, bytes]] = []
    for part, ranks in enumerate(sizes):
        stop = STOP if part < len(sizes) - 1 else None
        traces = deepspeed_helper.run(ranks, blend, tmp_path / "run", *options, stop_at=stop)
        chosen += traces[0].chosen
        loss += traces[0].loss
        shards = {trace.place[0]: trace.scores for trace in traces}
        scores = [shards[rank] for rank in sorted(shards)]
    found = {
        "chosen": digest(chosen),
        "visits": digest(np.frombuffer(b"".join(visits for _, visits in scores), np.uint8).tolist()),
        "loss": float(np.nansum(loss)),
        "score": float(np.frombuffer(b"".join(score for score, _ in scores), np.float32).sum(dtype=np.float64)),
    }
    write({f"{layout}-{scorer}": found})
    golden = json.loads(FILE.read_text())[f"{layout}-{scorer}"]
    assert (found["chosen"], found["visits"]) == (golden["chosen"], golden["visits"])
    assert (found["loss"], found["score"]) == pytest.approx((golden["loss"], golden["score"]), rel=1e-5)
