"""Every policy, pruner and scorer through the real trainer: it runs, it is the same on every layout, it resumes.

`reducible`, which needs a reference, is in test_kept_and_reducible.py.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from es_megatron.algorithm.policies import POLICIES
from es_megatron.algorithm.pruners import PRUNERS
from es_megatron.frameworks.gradient_norm import norm_bounds, square_sums
from tests.ranks_helper import run_on_ranks
from tests.small_run import META_BATCH, History, T, Trainer, settings_of, train, write_blend

ITERATIONS = 24
STOP = 12
SECONDS = 200
SAMPLES = f"training.train_samples={ITERATIONS * META_BATCH}"
SHALLOW = "model.num_layers=2"
VARIANTS: dict[str, tuple[str, ...]] = {
    **{f"policy-{name}": (f"selection.policy={name}",) for name in POLICIES.names() if name not in {"es", "reducible"}},
    "policy-es-options": ("selection.policy=es", "selection.options=[power=2, leave_out=0.3]"),
    "parts": ("selection.policy=adaselection", "selection.parts=2"),
    **{
        f"pruner-{name}": (f"pruning.pruner={name}", "selection.policy=uniform")
        for name in PRUNERS.names()
        if name != "eswp"
    },
    "pruning-alone": ("pruning.pruner=infobatch", "selection.keep_ratio=1"),
    "prefix": ("scorer=prefix", "scorer.prefix_share=0.5"),
    "guard": ("guard=uniform", "guard.window=4"),
    "budget": ("scorer=history", "selection.budget=0.55", "pruning.ratio=0"),
}
LAYOUTS = ("parallel.pipeline=2", "parallel.tensor=2", "data.prefetch=2")
"""Of two ranks; the last is data-parallel, where b is even: variants that find b themselves find an even one alone."""
ARM = "evolved_sampling.arm=uniform"
FAST = {("policy-grad-norm", LAYOUTS[1]), ("pruner-infobatch", LAYOUTS[0]), ("prefix", LAYOUTS[0])}
Run = Callable[..., list[History]]


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blend(tmp_path_factory.mktemp("policies") / "data")


def overrides_of(name: str) -> list[str]:
    return [f"evolved_sampling.{change}" for change in VARIANTS[name]]


def train_all(names: tuple[str, ...], blend: Path, folder: Path, *overrides: str) -> dict[str, History]:
    """Train one variant after the other in one process: every run ends with its groups closed."""
    from megatron.core import parallel_state

    found: dict[str, History] = {}
    for name in names:
        found[name] = train(settings_of(blend, folder / name, SAMPLES, SHALLOW, *overrides, *overrides_of(name)))
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
    return found


@pytest.fixture(scope="module")
def alone(blend: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, History]:
    """Every variant on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    return run_on_ranks(1, train_all, tuple(VARIANTS), blend, folder, timeout=SECONDS)[0]


@pytest.mark.timeout(SECONDS + 60)
def test_every_variant_runs_to_its_end_and_chooses_in_its_own_way(alone: dict[str, History]) -> None:
    for name, history in alone.items():
        assert history.summary["finished"], name
        assert history.summary["iterations"] == history.summary["planned_iterations"] == len(history.chosen), name
        assert np.isfinite(history.norm).all(), name
        if name == "pruning-alone":
            assert {len(ids) for ids in history.chosen} == {META_BATCH}
            assert len(history.chosen) < ITERATIONS
        else:
            assert len(history.chosen[STOP]) < META_BATCH, name
    middle = {name: str(history.chosen) for name, history in alone.items()}
    same = {"policy-big-loss", "policy-order"}
    assert middle["policy-big-loss"] == middle["policy-order"]
    # pruners differ in masks, and the first epochs have none
    distinct = {name: each for name, each in middle.items() if name not in same and not name.startswith("pruner")}
    assert len(set(distinct.values())) == len(distinct)
    masks = {str(sorted(alone[name].pruned.items())) for name in alone if name.startswith("pruner")}
    assert len(masks) == len(PRUNERS.names()) - 1


@pytest.mark.timeout(SECONDS + 60)
def test_costs_are_those_that_were_asked_for(alone: dict[str, History]) -> None:
    summary = alone["budget"].summary
    assert summary["cost"] <= 0.55 * summary["plain_cost"]
    assert summary["cost"] > 0.53 * summary["plain_cost"]
    prefix = alone["prefix"].summary
    assert prefix["scoring_price"] == prefix["scored_share"] == 0.5
    assert prefix["cost"] == pytest.approx(0.5 * prefix["sequences_scored"] + 3 * prefix["sequences_trained"])


@pytest.mark.timeout(SECONDS + 60)
def test_the_guard_falls_back(alone: dict[str, History]) -> None:
    """Weights of a tiny model are worth next to nothing, so after 4 selecting iterations b grows and scoring ends."""
    history = alone["guard"]
    sizes = [len(ids) for ids in history.chosen]
    selecting = [size for size in sizes if size < META_BATCH]
    assert selecting[:4] == [4] * 4
    assert set(selecting[4:]) == {8}  # 4 + 16 / 3, down to a multiple of 4
    assert history.summary["sequences_scored"] == 4 * META_BATCH


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if (name, layout) in FAST else pytest.mark.slow)
        for name in VARIANTS
        for layout in LAYOUTS
    ],
)
def test_layouts_choose_alike(name: str, layout: str, alone: dict[str, History], blend: Path, tmp_path: Path) -> None:
    for found in run_on_ranks(2, train_all, (name,), blend, tmp_path, layout, timeout=SECONDS):
        history, reference = found[name], alone[name]
        assert history.chosen == reference.chosen
        assert history.pruned == reference.pruned
        np.testing.assert_allclose(history.norm, reference.norm, rtol=1e-3)


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    "name",
    [
        "policy-adaselection",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("pruner-infobatch", "pruner-kakurenbo", "guard", "parts")
        ),
    ],
)
def test_state_survives_a_resume(name: str, alone: dict[str, History], blend: Path, tmp_path: Path) -> None:
    def terminate(trainer: Trainer, iteration: int) -> None:
        if iteration == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = settings_of(blend, tmp_path, SAMPLES, SHALLOW, *overrides_of(name))
    first = run_on_ranks(1, functools.partial(train, settings, after=terminate), timeout=SECONDS)[0]
    assert len(first.chosen) == STOP + 1
    second = run_on_ranks(1, train, settings, timeout=SECONDS)[0]
    assert first.chosen + second.chosen == alone[name].chosen
    assert first.norm + second.norm == alone[name].norm
    assert (second.scores, second.weights) == (alone[name].scores, alone[name].weights)


@pytest.mark.timeout(SECONDS)
def test_external_scores_choose_and_never_change(blend: Path, tmp_path: Path) -> None:
    first = settings_of(blend, tmp_path / "a", SAMPLES, "run.save_interval=20")
    known = run_on_ranks(1, train, first, timeout=SECONDS)[0]
    changes = ("scorer=external", f"scores.initial={tmp_path / 'a'}", "selection.policy=small-loss", "pruning.ratio=0")
    overrides = [f"evolved_sampling.{change}" for change in changes]
    found = run_on_ranks(1, train, settings_of(blend, tmp_path / "b", SAMPLES, *overrides), timeout=SECONDS)[0]
    assert found.scores == known.scores
    assert found.summary["sequences_scored"] == found.summary["non_finite_losses"] == 0
    score = np.frombuffer(known.scores[0], np.float32)
    uniform = run_on_ranks(1, train, settings_of(blend, tmp_path / "c", SAMPLES, *overrides[3:], ARM), timeout=SECONDS)[
        0
    ]
    assert [len(ids) for ids in found.chosen] == [len(ids) for ids in uniform.chosen]
    lowest, any_four = (np.mean([score[ids].mean() for ids in run.chosen[3:20]]) for run in (found, uniform))
    assert lowest < any_four - 0.1


def rates_of(settings: Any) -> list[tuple[float, float]]:
    """Learning rate and its factor, by iteration."""
    found: list[tuple[float, float]] = []
    trainer = Trainer(settings)
    iterate = trainer.backend.iterate

    def watched() -> Any:
        iteration = iterate()
        found.append((iteration.rate, trainer.engine.rate_factor))
        return iteration

    trainer.backend.iterate = watched  # pyright: ignore[reportAttributeAccessIssue]
    trainer.run()
    return found


@pytest.mark.timeout(SECONDS)
def test_kakurenbo_raises_the_learning_rate_in_its_epochs(blend: Path, tmp_path: Path) -> None:
    hiding = settings_of(blend, tmp_path / "a", SAMPLES, *overrides_of("pruner-kakurenbo"))
    other = settings_of(blend, tmp_path / "b", SAMPLES, *overrides_of("pruner-random"))
    raised = run_on_ranks(1, rates_of, hiding, timeout=SECONDS)[0]
    plain = run_on_ranks(1, rates_of, other, timeout=SECONDS)[0]
    assert {factor for _, factor in plain} == {1.0}
    assert raised[0][1] == 1.0
    assert max(factor for _, factor in raised) == pytest.approx(1 / 0.7, rel=0.05)
    for (rate, factor), (scheduled, _) in zip(raised, plain, strict=True):
        assert rate == pytest.approx(scheduled * factor)


def test_norm_bound_is_the_norm_of_the_gradient_at_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TBV = torch.randn(T, 3, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    labels_TB = torch.randint(0, 11, (T, 3), generator=generator)
    mask_BT = (torch.rand(3, T, generator=generator) < 0.7).double()
    losses_BT = F.cross_entropy(logits_TBV.flatten(0, 1), labels_TB.flatten(), reduction="none").view(T, 3).T
    mean_B = (losses_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)
    (gradient,) = torch.autograd.grad(mean_B.sum(), logits_TBV)
    found = norm_bounds(losses_BT, mask_BT, square_sums(logits_TBV))
    torch.testing.assert_close(found, gradient.norm(dim=(0, 2)).float(), rtol=1e-5, atol=1e-6)
