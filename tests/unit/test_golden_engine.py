"""Runs of the engine, and states that an earlier version saved: changes that move code must move neither.

Losses are a function of sample and iteration, so that every processor finds the same. Write the files anew with
`ES_WRITE_GOLDEN=1 python -m pytest tests/unit/test_golden_engine.py`, and tell why.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.core.engine import EvolvedSampling
from tests.unit.test_engine import Fake, make

FOLDER = Path(__file__).parent / "golden_engine"
RUNS = FOLDER / "runs.json"
PAUSE = 17
"""Iterations before the saved states; epochs of all components are pruned by then."""

HISTORY: dict[str, Any] = {"scorer": "history"}
EXTERNAL: dict[str, Any] = {"scorer": "external", "initial_scores": str(FOLDER / "es-fresh")}
EVERY: dict[str, Any] = {"scorer": "every-k", "score_every": 3}
GUARD: dict[str, Any] = {"guard_window": 5, "anneal": 0.1}
ARMS = ("es", "plain", "uniform", "uniform-prune", "shortened", "shuffled")
POLICIES = ("uniform", "loss", "order", "big-loss", "small-loss", "adaboost", "coreset-1", "coreset-2", "adaselection")
RUNS_OF: dict[str, dict[str, Any]] = {
    **{
        f"{arm}-{name}": {"arm": arm, **more}
        for arm in ARMS
        for name, more in {"fresh": {}, "history": HISTORY}.items()
    },
    "every-k": EVERY,
    "every-k-paper": {**EVERY, "score_correction": "paper"},
    "prefix": {"scorer": "prefix"},
    "external": EXTERNAL,
    "shuffled-every-k": {"arm": "shuffled", **EVERY},
    "power": {**HISTORY, "policy_options": ("power=8",)},
    "floor": {"weight_floor": 0.5, "score_correction": "debiased"},
    "inclusion": {"inclusion_weights": True},
    "inclusion-parts": {"inclusion_weights": True, "selection_parts": 2},
    "groups": {"granularity": "microbatch", "micro": 2},
    "groups-ranked": {"granularity": "microbatch", "micro": 2, "policy": "big-loss"},
    "budget": {"budget": 0.5},
    "budget-history": {**HISTORY, "budget": 0.5},
    "guard-uniform": {"guard": "uniform", **GUARD},
    "guard-plain": {"guard": "plain", **GUARD, "scoring_cost": 0.5},
    "guard-every-k": {"guard": "uniform", **GUARD, **EVERY, "scoring_cost": 3.0},
    **{f"policy-{name}": {"policy": name} for name in POLICIES},
    "adaselection-parts": {"policy": "adaselection", "selection_parts": 2},
    **{f"pruner-{name}": {"pruner": name} for name in ("random", "infobatch", "kakurenbo", "ucb")},
    "infobatch-history": {**HISTORY, "pruner": "infobatch"},
    **{
        f"kept-{name}": {"selection": {"mixture": "kept"}, **more}
        for name, more in {
            "fresh": {},
            "history": HISTORY,
            "every-k": EVERY,
            "uniform": {"arm": "uniform"},
            "shuffled": {"arm": "shuffled"},
            "parts": {"policy": "adaselection", "selection_parts": 2},
            "ranked": {"policy": "big-loss"},
            "guard": {"guard": "uniform", **GUARD, **EVERY, "scoring_cost": 3.0},
        }.items()
    },
}
STATES = ("kept-history", "es-fresh", "es-history", "adaselection-parts", "pruner-infobatch", "guard-uniform")


def engine_of(name: str) -> EvolvedSampling:
    return make(**RUNS_OF[name])


def go_on(engine: EvolvedSampling) -> dict[str, Any]:
    """Run to the end; every fifth optimizer step is skipped."""
    fake = Fake(engine)
    chosen, losses, masks = [], [], {}
    while not engine.done:
        record = fake.iterate(succeeded=engine.iteration % 5 != 4)
        masks.update({f"{c}-{epoch}": mask.packed.tobytes().hex() for (c, epoch), mask in engine.sampler.masks.items()})
        chosen.append(record.chosen.tolist())
        losses.append(
            [record.meta_loss, record.chosen_loss, record.skipped_loss, float(record.bad), float(record.scored)]
        )
    weights = [None if weight is None else weight.tolist() for weight in fake.weights]
    return {
        "chosen": digest(chosen),
        "masks": digest(sorted(masks.items())),
        "visits": digest(engine.store.visits.tolist()),
        "iterations": len(chosen),
        "scored": len(fake.scored),
        "losses": np.nansum(losses, axis=0).tolist(),
        "weights": float(sum(sum(weight) for weight in weights if weight is not None)),
        "score": float(engine.store.score.sum(dtype=np.float64)),
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def writes() -> bool:
    return bool(os.environ.get("ES_WRITE_GOLDEN"))


def check(found: dict[str, Any], name: str) -> None:
    """Choices exactly, sums to what the last bit of a logarithm may change; or write them, where asked to."""
    golden: dict[str, Any] = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    if writes():
        RUNS.parent.mkdir(exist_ok=True)
        RUNS.write_text(json.dumps({**golden, name: found}, indent=1, sort_keys=True) + "\n")
        return
    close = ("losses", "weights", "score")
    assert {key: found[key] for key in found if key not in close} == {
        key: golden[name][key] for key in golden[name] if key not in close
    }
    for key in close:
        assert found[key] == pytest.approx(golden[name][key], rel=1e-6)


@pytest.mark.parametrize("name", RUNS_OF)
def test_runs_are_the_golden_ones(name: str) -> None:
    check(go_on(engine_of(name)), name)


@pytest.mark.parametrize("name", STATES)
def test_states_of_an_earlier_version_go_on(name: str) -> None:
    folder = FOLDER / name
    if writes():
        engine = engine_of(name)
        fake = Fake(engine)
        while engine.iteration < PAUSE:
            fake.iterate(succeeded=engine.iteration % 5 != 4)
        engine.save(folder, totals={"seconds": 1.5})
    resumed = engine_of(name)
    assert resumed.load(folder) == {"totals": {"seconds": 1.5}}
    assert resumed.iteration == PAUSE
    check(go_on(resumed), f"{name} resumed")
