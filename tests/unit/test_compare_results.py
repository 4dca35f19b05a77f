"""Costs, flags and tables of a comparison from small summaries made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from es_megatron.bench.page import page
from es_megatron.bench.plots import draw
from es_megatron.bench.rates import Point
from es_megatron.bench.results import NOMINAL, Units, conclude, cost_share
from es_megatron.bench.runs import Outcome, Task
from es_megatron.bench.spec import read_spec
from es_megatron.bench.table import document, markdown, render
from tests.unit.test_compare_spec import PATH, changed

ARMS = {"plain": {"evolved_sampling.arm": "plain"}, "es": {}, "uniform": {"evolved_sampling.arm": "uniform"}}


def summary(loss=4.0, *, scored=0, trained=80, ratio=2.0, scoring=1.0, domains=(), **more):
    """A run of 10 plain iterations of B = 8 and 16 tokens."""
    return {
        "finished": True,
        "plain_iterations": 10,
        "meta_batch": 8,
        "sequences_scored": scored,
        "sequences_trained": trained,
        "tokens_scored": scored * 16,
        "tokens_trained": trained * 16,
        "chosen": {"a": trained // 4, "b": trained - trained // 4},
        "scored_share": 1.0,
        "passes": {"a": 1.0, "b": 0.5},
        "layout": {
            "micro_batches": 4,
            "scoring_micro_batches": 1,
            "forward": 0.5,
            "backward": 0.5 * ratio,
            "scoring_forward": 2.0 * scoring,
        },
        "seconds": {"step": 2.0, "train": 1.5},
        "validation": {"iteration": 10, **dict(domains), "mean": loss},
        **more,
    }


@pytest.fixture
def spec():
    return read_spec(
        changed(
            arms=ARMS,
            references=["uniform", "plain"],
            equal_cost=["es", "uniform"],
            seeds=[1, 2, 3],
            learning_rates=[1e-3],
            search_seeds=[],
        ),
        PATH,
    )


def outcomes_of(losses, **kinds):
    """One outcome for each arm and seed; `kinds` are further arguments of `summary` by arm."""
    return {
        Task("clean", arm, 1e-3, seed): Outcome(summary(loss, **kinds.get(arm, {})))
        for arm, list_ in losses.items()
        for seed, loss in enumerate(list_, 1)
    }


def test_cost_is_scored_plus_trained_in_forward_units():
    one = summary(scored=72, trained=26)
    # nominal: (72 + 26 * 3) / (80 * 3); at backward = 1.5 forward: (72 + 26 * 2.5) / (80 * 2.5)
    assert cost_share(one, NOMINAL) == pytest.approx(150 / 240)
    assert cost_share(one, Units(1.5, 1.0)) == pytest.approx(137 / 200)
    assert cost_share(one, Units(1.5, 0.5)) == pytest.approx(101 / 200)
    assert cost_share({**one, "scored_share": 0.125}, NOMINAL) == pytest.approx(87 / 240)


def test_differences_and_verdicts(spec):
    losses = {"plain": [4.0, 4.1, 4.2], "uniform": [4.1, 4.2, 4.3], "es": [4.05, 4.15, 4.251]}
    arm = conclude(spec, outcomes_of(losses)).cases[0].arms["es"]
    assert arm.against["uniform"].verdict == "wins"
    assert arm.against["uniform"].mean == pytest.approx((-0.05 - 0.05 - 0.049) / 3)
    assert arm.against["plain"].verdict == "loses"
    assert arm.lossless is False
    assert arm.loss == pytest.approx(sum(losses["es"]) / 3)


def test_lossless_is_an_upper_bound_of_five_thousandths(spec):
    losses = {"plain": [4.0, 4.1, 4.2], "uniform": [4.1, 4.2, 4.3], "es": [4.001, 4.101, 4.201]}
    assert conclude(spec, outcomes_of(losses)).cases[0].arms["es"].lossless is True


def test_only_seeds_that_both_have_are_paired(spec):
    outcomes = outcomes_of({"plain": [4.0, 4.1, 4.2], "uniform": [9.0], "es": [4.0, 4.1, 4.2]})
    found = conclude(spec, outcomes)
    assert found.cases[0].arms["es"].against["uniform"].seeds == 1
    assert found.cases[0].arms["es"].against["uniform"].verdict == "open"
    assert "one seed" in render(found)
    assert "uniform: 1 of 3 seeds so far." in render(found)


def test_the_ratio_is_the_median_of_all_runs(spec):
    outcomes = outcomes_of(
        {"plain": [4.0, 4.0, 4.0], "es": [4.0], "uniform": [4.0]},
        es={"ratio": 9.0, "scoring": 0.25},
        uniform={"ratio": 1.0, "scoring": 1.5},
    )
    found = conclude(spec, outcomes)
    assert found.units == Units(2.0, 1.0)
    assert found.ranges == ((1.0, 9.0), (0.25, 1.5))
    assert "backward 2.00 forward (1.00 to 9.00) and scoring 1.00 forward (0.25 to 1.50)" in render(found)


def test_a_seed_that_failed_or_broke_leaves_the_verdict_open(spec):
    losses = {"plain": [4.0, 4.1, 4.2], "uniform": [4.1, 4.2, 4.3], "es": [3.0, 3.1, math.nan]}
    arms = conclude(spec, outcomes_of(losses)).cases[0].arms
    assert arms["es"].against["uniform"].verdict == "open"
    assert arms["es"].lossless is None
    failed = outcomes_of({**losses, "es": [3.0, 3.1]})
    failed[Task("clean", "es", 1e-3, 3)] = Outcome({}, "LossError: too many")
    arms = conclude(spec, failed).cases[0].arms
    assert arms["es"].against["uniform"].verdict == "open"
    assert arms["es"].lossless is None
    assert "open (2 seeds)" in render(conclude(spec, failed))


def test_costs_that_are_not_equal_are_flagged_in_the_unit_where_they_are_not(spec):
    losses = {"plain": [4.0] * 3, "uniform": [4.0] * 3, "es": [4.0] * 3}
    kinds = {"es": {"scored": 72, "trained": 26, "ratio": 1.5}, "uniform": {"trained": 50, "ratio": 1.5}}
    found = conclude(spec, outcomes_of(losses, plain={"ratio": 1.5}, **kinds))
    # nominal 150 against 150; calibrated 72 + 26 * 2.5 = 137 against 50 * 2.5 = 125
    assert found.cases[0].arms["uniform"].off == {"calibrated": pytest.approx(125 / 137 - 1)}
    assert found.cases[0].arms["es"].off == {}
    assert "! uniform: calibrated cost -8.8% against es, not equal." in render(found)


def test_what_a_budget_left_to_a_reference_counts_where_costs_are_to_be_equal(spec):
    shared = dataclasses.replace(spec, reference_runs=2)
    losses = {"plain": [4.0] * 3, "uniform": [4.0] * 3, "es": [4.0] * 3}
    outcomes = outcomes_of(losses, es={"trained": 40}, uniform={"trained": 50})  # of 80: 50% and 62.5%
    assert conclude(shared, outcomes, {("clean", "es"): 0.25}).cases[0].arms["uniform"].off == {}
    assert set(conclude(shared, outcomes).cases[0].arms["uniform"].off) == {"calibrated", "nominal"}
    assert set(conclude(spec, outcomes, {("clean", "es"): 0.25}).cases[0].arms["uniform"].off) == {
        "calibrated",
        "nominal",
    }


def test_a_search_whose_best_rate_is_at_an_end_is_flagged():
    spec = read_spec(changed(learning_rates=[1e-3, 2e-3, 4e-3]), PATH)
    outcomes = {
        Task("clean", "es", rate, 100): Outcome(summary(loss)) for rate, loss in ((1e-3, 3), (2e-3, 2), (4e-3, 1))
    }
    outcomes |= {Task("clean", "es", 4e-3, seed): Outcome(summary(1.0)) for seed in (1, 2)}
    outcomes |= {Task("clean", "plain", rate, 100): Outcome(summary(abs(rate - 2e-3))) for rate in spec.learning_rates}
    found = conclude(spec, outcomes)
    assert found.cases[0].arms["es"].edge == "highest rate"
    assert found.cases[0].arms["plain"].edge == ""
    assert found.cases[0].arms["es"].search == {Point(1e-3, None): 3, Point(2e-3, None): 2, Point(4e-3, None): 1}
    assert "0.004*" in render(found)


def test_the_tables_have_everything_and_the_json_is_plain(spec):
    domains = {"books": 4.5, "code": 3.5}
    kinds = {arm: {"domains": domains.items()} for arm in ARMS}
    outcomes = outcomes_of({"plain": [4.0, 4.1, 4.2], "uniform": [4.0, 4.1, 4.3]}, **kinds)
    outcomes[Task("clean", "es", 1e-3, 1)] = Outcome({}, "LossError: too many")
    found = conclude(spec, outcomes)
    text = render(found)
    assert "failed: clean es lr 0.001 seed 1: LossError: too many" in text
    assert "4.5000 (+0.0000)" in text
    assert "25.0%  75.0%" in text
    table = markdown(found).splitlines()
    assert table[2].startswith("| arm | lr | cost |")
    assert table[3].count("---") == table[2].count("|") - 1
    told = json.loads(json.dumps(document(found), allow_nan=False))
    assert told["cases"]["clean"]["plain"]["domains"]["books"] == {"1": 4.5, "2": 4.5, "3": 4.5}
    assert told["cases"]["clean"]["es"]["loss"] is None
    assert told["cases"]["clean"]["uniform"]["against"]["plain"]["verdict"] == "ties"


def test_a_reference_is_charged_to_the_arm_that_has_it(spec):
    """A reference that cost a tenth of the plain run."""
    found = conclude(spec, outcomes_of({"plain": [4.0], "es": [4.0]}), {("clean", "es"): 0.1})
    arms = found.cases[0].arms
    assert (arms["plain"].reference, arms["es"].reference) == (0.0, pytest.approx(0.1))
    text = render(found)
    assert "of ten runs" in text
    assert "10.0%   1.0%" in " ".join(text.split()).replace("10.0% 1.0%", "10.0%   1.0%")
    assert "of ten runs" not in render(conclude(spec, outcomes_of({"plain": [4.0]})))


def test_nothing_finished_is_a_table_too(spec):
    assert "plain" in render(conclude(spec, {}))


@pytest.mark.filterwarnings("default")  # matplotlib's own
def test_plots_of_each_case(spec, tmp_path):
    pytest.importorskip("matplotlib")
    domains = {"books": 4.5, "code": 3.5}
    kinds = {arm: {"domains": domains.items()} for arm in ARMS}
    outcomes = outcomes_of({"plain": [4.0, 4.1, 4.2], "uniform": [4.0], "es": [4.0, 4.1, 4.3]}, **kinds)
    files = draw(conclude(spec, outcomes), tmp_path / "plots")
    assert [file.name for file in files] == ["clean-loss.png", "clean-differences.png"]
    assert all(file.stat().st_size > 5000 for file in files)
    assert draw(conclude(spec, {}), tmp_path / "plots") == []


def test_the_page_shows_every_arm_and_its_place(spec):
    pytest.importorskip("jinja2")
    losses = {"plain": [4.0, 4.1, 4.2], "uniform": [4.1, 4.2, 4.3], "es": [4.05, 4.15, 4.251]}
    found = page(conclude(spec, outcomes_of(losses)))
    assert "es: 0.050 nats below uniform" in found
    assert "plain: 0.100 nats below uniform" in found
    assert "not told" not in found
    zero = float(re.search(r'class="zero" style="left:([0-9.]+)%', found)[1])
    dots = [float(place) for place in re.findall(r'class="dot wins" style="left:([0-9.]+)%', found)]
    assert len(dots) == 2
    assert max(dots) < zero <= 100 - 4
    assert "&lt;" in page(conclude(dataclasses.replace(spec, path=Path("a<b.yaml")), outcomes_of(losses)))
    assert "<section>" not in page(conclude(spec, {}))
