"""The plan: what a run costs, arms that match a cost, what a layout saves, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from es_megatron.core.plan import (
    Layout,
    Plan,
    check_micro_batches,
    describe,
    kept_of,
    longest_within,
    nearest,
    nominal,
    plan_run,
    predict,
)
from es_megatron.errors import ConfigError, LayoutError
from tests.es_config import es_config
from tests.unit.naive import make_manifest

B = 32
MANIFEST = make_manifest((400, 90, 20))


def plan(*, passes: float = 4, quantum: int = 2, **settings: Any) -> Plan:
    config = es_config(preset="paper", **{"seed": 1, **settings})
    return plan_run(config, MANIFEST, B, quantum, round(passes * MANIFEST.total))


def test_the_plain_run() -> None:
    plain = plan(arm="plain")
    assert plain.plain_iterations == plain.schedule.iterations == math.ceil(4 * 510 / B)
    assert plain.cost == plain.plain_cost == 3 * B * plain.plain_iterations
    assert (plain.evolving_iterations, plain.sequences_scored) == (0, 0)


def test_es_without_pruning_saves_what_the_cost_model_says() -> None:
    es = plan(anneal=0)
    assert es.schedule.iterations == es.plain_iterations
    assert es.kept == B // 4
    assert 1 - es.cost / es.plain_cost == pytest.approx(1 - (1 + 3 / 4) / 3)
    annealed = plan(anneal=0.05, passes=200)
    assert 1 - annealed.cost / annealed.plain_cost == pytest.approx(0.375, abs=0.001)


def test_the_savings_of_the_design() -> None:
    """Section 5: 37.5 / 43.8 / 45.8 / 46.9% for 1 to 4 passes with r = 0.2 while the first is never pruned."""
    manifest = make_manifest((200_000,))
    for passes, expected in ((1, 0.375), (2, 0.438), (3, 0.458), (4, 0.469)):
        config = es_config(preset="paper", pruning_ratio=0.2, anneal=0.05)
        found = plan_run(config, manifest, B, 2, passes * 200_000)
        assert 1 - found.cost / found.plain_cost == pytest.approx(expected, abs=0.012)


def test_pruning_shortens_the_run_but_not_its_passes() -> None:
    eswp = plan(pruning_ratio=0.2)
    assert eswp.schedule.iterations < eswp.plain_iterations
    drawn = plan(arm="plain").passes
    assert eswp.passes == pytest.approx(drawn, rel=0.05)


@pytest.mark.parametrize(
    ("scorer", "scored"), [("fresh", 1.0), ("history", 0.0), ("every-k", 0.25)], ids=["fresh", "history", "every-k"]
)
def test_scorers_cost_their_passes(scorer: str, scored: float) -> None:
    found = plan(scorer=scorer, score_every=4, anneal=0, passes=100)
    assert found.sequences_scored == pytest.approx(scored * found.schedule.iterations * B, rel=0.01)


@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_arms_that_match_a_cost_match_it(ratio: float) -> None:
    es = plan(pruning_ratio=ratio)
    shortened = plan(arm="shortened", pruning_ratio=ratio)
    assert shortened.kept == B
    assert 0 <= es.cost - shortened.cost < 3 * B
    for arm in ("uniform", "uniform-prune"):
        uniform = plan(arm=arm, budget=es.cost / es.plain_cost, pruning_ratio=ratio)
        assert uniform.kept > es.kept
        assert uniform.sequences_scored == 0
        assert 0 <= es.cost - uniform.cost < 3 * B
    free = plan(arm="uniform", pruning_ratio=ratio)
    assert free.kept == es.kept
    assert free.cost < es.cost


def test_longest_within() -> None:
    assert longest_within(100, 50, lambda samples: 3.0 * samples) == 33
    assert longest_within(1000, 50, lambda samples: 3.0 * samples) == 50
    assert longest_within(1, 50, lambda samples: 3.0 * samples) == 1


@pytest.mark.parametrize(
    ("ratio", "quantum", "kept"), [(0.25, 8, 8), (1.0, 32, 32), (0.1875, 2, 6), (1 / 3, 1, None), (0.25, 16, None)]
)
def test_kept_sequences_must_divide(ratio: float, quantum: int, kept: int | None) -> None:
    config = es_config(preset="paper", keep_ratio=ratio)
    if kept is not None:
        assert kept_of(config, B, quantum) == kept
        return
    with pytest.raises(ConfigError, match=rf"must be a multiple of {quantum} .*Use `keep_ratio`"):
        kept_of(config, B, quantum)


def test_the_cure_it_names_works() -> None:
    with pytest.raises(ConfigError) as raised:
        plan(quantum=16, keep_ratio=0.3)
    proposed = float(str(raised.value).split("Use `keep_ratio` ")[1].split(" ")[0])
    assert plan(quantum=16, keep_ratio=proposed).kept == 16


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be a multiple of 5 .*but is 32 instead. Use 30"):
        plan(quantum=5)
    with pytest.raises(ConfigError, match="`train_samples` must be >= 1"):
        plan(passes=0)
    assert [nearest(value, 4) for value in (0, 1, 5, 7, 8.1)] == [4, 4, 4, 8, 8]


# --- layouts: the table of the design, section 5 ---


@pytest.mark.parametrize(
    ("stages", "micro_batches", "saved"),
    [
        (4, 8, 0.212),
        (4, 16, 0.298),
        (4, 32, 0.352),
        (4, 64, 0.383),
        (8, 8, 0.067),
        (8, 16, 0.188),
        (8, 32, 0.282),
        (8, 64, 0.343),
    ],
)
def test_pipelines_pay_two_ramps(stages: int, micro_batches: int, saved: float) -> None:
    predicted = predict(plan(anneal=0), Layout(micro_batches, micro_batches, pipeline=stages))
    assert predicted.selecting == pytest.approx(saved, abs=0.001)
    assert predicted.saving == pytest.approx(saved, abs=0.001)


def test_interleaving_shortens_the_ramps() -> None:
    assert Layout(8, 8, pipeline=4, virtual=3).whole() == (8 + 1) * 3
    assert Layout(8, 8, pipeline=4).whole() == (8 + 3) * 3
    assert Layout(8, 8).training(0.25) == 2 * 3


def test_measured_times_replace_the_nominal_ones() -> None:
    layout = Layout(8, 2, forward=2.0, backward=3.0, scoring_forward=6.0)
    assert layout.scoring() == 12
    assert predict(plan(anneal=0), layout).selecting == pytest.approx(1 - (2 * 5 + 12) / 40)
    assert predict(plan(anneal=0), nominal(layout)).selecting == pytest.approx(1 - (2 * 3 + 8) / 24)


def test_a_run_that_cannot_pay_is_warned_of() -> None:
    wasteful, fine = plan(keep_ratio=0.75), plan()
    layout = Layout(16, 16)
    assert "WARNING" in describe(wasteful, layout, 128, calibrated=False)
    told = describe(fine, layout, 128, calibrated=True)
    assert "WARNING" not in told
    assert f" {fine.schedule.iterations} (plain: {fine.plain_iterations})" in told
    assert "calibrated (backward = 2.00 forward" in told
    assert "c0 4." in told
    assert f"{fine.sequences_trained * 128e-6:.2f} M (plain" in told
    assert "calibrated" not in describe(fine, layout, 128, calibrated=False)


def test_virtual_stages_need_whole_rounds_of_micro_batches() -> None:
    fine = plan(quantum=4)
    check_micro_batches(fine, 2, 4, 2)
    check_micro_batches(fine, 4, 4, 1)
    with pytest.raises(LayoutError, match=r"chosen part must be a multiple of 4 micro-batches .* has 2 instead"):
        check_micro_batches(fine, 4, 4, 2)
    with pytest.raises(LayoutError, match=r"meta-batch must be a multiple of 4 .* has 2 instead"):
        check_micro_batches(fine, 16, 4, 2)


@pytest.mark.parametrize(("share", "read"), [(1 / 16, 8), (0.1, 8), (0.125, 8), (0.3, 24), (1.0, 64)])
def test_a_prefix_costs_what_is_read_of_it(share: float, read: int) -> None:
    blend = dataclasses.replace(MANIFEST, seq_length=64)
    config = es_config(preset="paper", scorer="prefix", prefix_share=share)
    found = plan_run(config, blend, B, 2, 2040)
    assert found.scored_share == read / 64
    assert found.cost == found.sequences_scored * read / 64 + 3 * found.sequences_trained


def test_a_measured_cost_of_scoring_leaves_a_budget_more_to_train_on() -> None:
    kept = {cost: plan(budget=0.625, anneal=0, scoring_cost=cost).kept for cost in (None, 1.0, 0.5)}
    assert kept == {None: 10, 1.0: 10, 0.5: 16}  # 60 = 32 * cost + 3 b, rounded up to a multiple of 2
    assert plan(scoring_cost=0.5).break_even_gain == pytest.approx(1 + 0.5 * 32 / (3 * 8))
    with pytest.raises(ConfigError, match=r"`scorer\.cost` must be > 0"):
        plan(scoring_cost=0.0)
