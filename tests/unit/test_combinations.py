"""What goes with what: settings of Evolved Sampling two by two through the engine, and the document of what they do."""

from __future__ import annotations

import itertools
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.algorithm.policies import POLICIES
from es_megatron.algorithm.pruners import PRUNERS
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.engine import EvolvedSampling
from es_megatron.errors import ConfigError
from es_megatron.rank_grid import RankGrid
from es_megatron.scoring.scorers import SCORERS
from tests.reference_helper import write_reference
from tests.unit.naive import make_manifest
from tests.unit.test_engine import SIZES, Fake, loss_of

B = 16
MANIFEST = make_manifest(SIZES)
DOCUMENT = Path(__file__).parents[2] / "docs" / "combinations.md"
INTRODUCTION = """# What goes with what

Written by `tests/unit/test_combinations.py`, which runs every two of these settings together and notes what
comes of it. All other pairs run, and mean together what each means alone.

{tried}

| setting | with | what comes of it |
|---|---|---|
"""
REFERENCE = "reference.folder"
Changes = dict[str, Any]
SETTINGS: dict[str, Changes] = {
    **{f"selection.policy: {name}": {"selection.policy": name} for name in POLICIES.names()},
    **{f"scorer: {name}": {"scorer.kind": name} for name in SCORERS},
    "scorer.overlap: merged": {"scorer.overlap": "merged"},
    "selection.mixture: kept": {"selection.mixture": "kept"},
    "selection.mixture: free": {"selection.mixture": "free"},
    "selection.granularity: microbatch": {"selection.granularity": "microbatch"},
    "selection.parts": {"selection.parts": 2},
    "selection.weight_floor": {"selection.weight_floor": 0.5},
    "selection.inclusion_weights": {"selection.inclusion_weights": True},
    "selection.budget": {"selection.budget": 0.6},
    "scores.correction: paper": {"scores.correction": "paper"},
    "scores.correction: debiased": {"scores.correction": "debiased"},
    **{f"pruning.pruner: {name}": {"pruning.pruner": name, "pruning.ratio": 0.3} for name in PRUNERS.names()},
    "guard: uniform": {"guard.fallback": "uniform", "guard.window": 3},
    "guard: plain": {"guard.fallback": "plain", "guard.window": 3},
}


class Normed(Fake):
    """Tells gradient norms too."""

    def score(self, positions: Any) -> Any:
        loss = super().score(positions)
        return np.stack([loss, 2 * loss]) if self.engine.needs_norm else loss


def config_of(changes: Changes, folder: Path) -> EvolvedSamplingConfig:
    """The default settings with these, and with what one of them cannot do without."""
    reference = "reducible" in changes.values()
    prefix = "prefix" in changes.values()
    needed: Changes = {REFERENCE: str(folder / ("of-a-prefix" if prefix else "reference"))} if reference else {}
    if "external" in changes.values():
        needed["scores.initial"] = str(folder / "scores")
    if (changes.get("selection.policy") == "grad-norm" or "scorer.overlap" in changes) and "scorer.kind" not in changes:
        needed["scorer.kind"] = "fresh"
    given: Changes = {}
    for name, value in {**changes, **needed}.items():
        group, _, last = name.partition(".")
        given.setdefault(group, {})[last] = value
    return EvolvedSamplingConfig.from_mapping({"seed": 5, **given})


def outcome(changes: Changes, folder: Path) -> str:
    """Empty where a run with these settings goes through its first pruned epochs; else what is refused or changed."""
    try:
        config = config_of(changes, folder)
        engine = EvolvedSampling(config, MANIFEST, RankGrid.alone(), meta_batch=B, micro_batch=1, train_samples=30 * B)
    except ConfigError as error:
        return f"refused: {str(error).split('. ')[0]}"
    fake = Normed(engine)
    sizes = {len(fake.iterate().chosen) for _ in range(engine.plan.schedule.iterations)}
    assert engine.done
    assert min(sizes) < B
    if changes.get("selection.policy") == "reducible" and changes.get("scorer.kind") == "prefix":
        return "the reference's losses must be about the same first tokens: `reference score --tokens`"
    if engine.plan.config.mixture == "free" and "selection.mixture" not in changes:
        return "the mixture is free"
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("combinations")
    loss = [loss_of(sample, 0) for sample in range(MANIFEST.total)]
    write_reference(path / "reference", MANIFEST, loss)
    write_reference(path / "of-a-prefix", MANIFEST, loss, tokens=8)
    config = EvolvedSamplingConfig.from_mapping({"seed": 5, "scorer": "fresh"})
    engine = EvolvedSampling(config, MANIFEST, RankGrid.alone(), meta_batch=B, micro_batch=1, train_samples=30 * B)
    fake = Fake(engine)
    while not engine.done:
        fake.iterate()
    engine.save(path / "scores")
    return path


def test_the_document_tells_what_every_two_settings_do(folder: Path) -> None:
    """Write it anew with `ES_WRITE_GOLDEN=1 python -m pytest tests/unit/test_combinations.py`."""
    alone = {name: outcome(changes, folder) for name, changes in SETTINGS.items()}
    assert [name for name, found in alone.items() if found.startswith("refused")] == []
    lines: list[str] = []
    for (left, one), (right, other) in itertools.combinations(SETTINGS.items(), 2):
        if any(one[name] != other[name] for name in one.keys() & other.keys()):
            continue  # two values of one setting
        found = outcome({**one, **other}, folder)
        if found not in {"", alone[left], alone[right]}:
            lines.append(f"| `{left}` | `{right}` | {found} |")
    changed = [f"| `{name}` | | {found} |" for name, found in alone.items() if found]
    whole = ", ".join(f"`{name}`".replace(" ", "~") for name in SETTINGS)
    tried = textwrap.fill(f"Tried: {whole}.", 120, break_on_hyphens=False).replace("~", " ")
    text = INTRODUCTION.format(tried=tried) + "\n".join(changed + lines) + "\n"
    if os.environ.get("ES_WRITE_GOLDEN"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text
