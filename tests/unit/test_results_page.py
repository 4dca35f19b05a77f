"""The page of results is what the results files say, and `plan` tells the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page, stages
from benchmarks.findings import DAMAGED, Findings, interval, level
from es_megatron.bench.results import conclude
from es_megatron.bench.runs import Outcome, Task
from es_megatron.bench.spec import Spec, read_spec
from es_megatron.bench.statistics import PairedDifference
from es_megatron.cli import main
from es_megatron.forecast import expected
from tests.unit.test_compare_results import summary
from tests.unit.test_compare_spec import PATH, changed

ARMS = {name: {"training.clip_grad": number + 1.0} for number, name in enumerate(("uniform", "plain", "static"))}
RULED = {
    **ARMS,
    "excess": {},
    **{name: {"training.clip_grad": 0.5 + at / 10} for at, name in enumerate(("residual", "band", "history", "paper"))},
}


def test_nothing_on_the_page_is_stale() -> None:
    for path, text in page.pages(page.read()).items():
        assert (page.ROOT / path).read_text(encoding="utf-8") == text, f"{path}: run `python -m benchmarks.page`"
    for name in page.pictured(page.read()):
        assert (page.ROOT / page.PAGES / f"{name}.png").is_file()


def spec_of(cases: list[str]) -> Spec:
    entries = {"cases": {case: {"blend": "clean"} for case in cases}, "arms": RULED, "seeds": [1, 2, 3]}
    return read_spec(
        changed(**entries, references=["uniform", "plain", "static"], learning_rates=[1e-3], search_seeds=[]), PATH
    )


def findings_of(losses: dict[str, dict[str, dict[str, float]]]) -> Findings:
    """Three seeds of each arm, a hair apart, by spec, case and arm."""
    found: dict[str, Any] = {}
    for name, cases in losses.items():
        spec = spec_of(list(cases))
        runs = {
            Task(case, arm, 1e-3, seed): Outcome(
                summary(
                    loss + 0.1 * seed + 0.001 * (seed if arm == "uniform" else 0), domains=[("a", loss), ("b", loss)]
                )
            )
            for case, arms in cases.items()
            for arm, loss in arms.items()
            for seed in (1, 2, 3)
        }
        found[name] = conclude(spec, runs)
    return Findings(found)


def even(**others: float) -> dict[str, float]:
    return {**dict.fromkeys(RULED, 4.0), **others}


def test_the_best_rule_is_chosen_on_tuning_blends_alone() -> None:
    findings = findings_of(
        {
            "tuning": {"damaged": even(band=3.9), "wiki-damaged": even(residual=3.95)},
            "proving": {"damaged": even(excess=3.0)},
        }
    )
    assert findings.rule == "band"
    assert findings.told(DAMAGED[2:], "excess").startswith("proving blend -1.002 [")
    assert "not run yet" in findings.told(DAMAGED, "nobody")


def test_aims_are_met_missed_or_open() -> None:
    good = even(band=3.9, plain=3.89)
    whole = {"tuning": {"damaged": good, "wiki-damaged": good, "clean": good}, "proving": {"damaged": good}}
    verdicts = {aim.what: aim.verdict for aim in findings_of(whole).aims()}
    assert verdicts["40% damaged: 0.05 below uniform, or more"] == "met"
    assert verdicts["40% damaged: level with plain on one blend"] == "missed"
    assert verdicts["40% damaged: below the static filter by the same reference"] == "met"
    assert verdicts["clean text, 4 passes: below uniform"] == "open", "the proving blend is missing"
    assert verdicts["no domain's lower end above +0.02 against uniform"] == "met"
    near = {**whole, "proving": {"damaged": even(band=3.9, plain=3.9)}}
    verdicts = {aim.what: aim.verdict for aim in findings_of(near).aims()}
    assert verdicts["40% damaged: level with plain on one blend"] == "met"
    whole["proving"]["damaged"] = even(band=4.1)
    verdicts = {aim.what: aim.verdict for aim in findings_of(whole).aims()}
    assert verdicts["40% damaged: 0.05 below uniform, or more"] == "missed"
    assert verdicts["no domain's lower end above +0.02 against uniform"] == "missed"


def test_a_wide_interval_alone_is_not_level() -> None:
    assert level(PairedDifference(0.01, -0.01, 0.03, 5))
    assert not level(PairedDifference(0.051, -0.025, 0.127, 5))
    assert not level(PairedDifference(0.01, 0.005, 0.015, 5))


def test_what_else_was_tried_is_told_of_what_was_missed() -> None:
    whole = {
        "tuning": {case: even(band=3.9) for case in ("damaged", "wiki-damaged", "clean")},
        "proving": {case: even(band=4.1, excess=3.98) for case in ("damaged", "clean")},
    }
    tried = {aim.what: aim.tried for aim in findings_of(whole).aims()}
    assert tried["clean text, 4 passes: below uniform"].startswith(
        "`history` -0.002 / -0.002; `excess` -0.002 / -0.022; "
    )
    assert "`band`" not in tried["clean text, 4 passes: below uniform"]
    assert "(a in damaged of tuning)" in tried["no domain's lower end above +0.02 against uniform"]
    assert not tried["copies: below plain"], "it is open"


def test_advice_is_chosen_on_the_tuning_blends_alone() -> None:
    findings = findings_of(
        {
            "tuning": {
                "damaged": even(band=3.9, excess=3.8),
                "wiki-damaged": even(band=3.9, excess=4.1),
                "clean": even(history=4.1, paper=4.1),
                "wiki": even(),
            },
            "proving": {case: even(residual=3.0) for case in ("damaged", "clean", "ten")},
        }
    )
    told = {each.case: (each.arm, [place.case for place in each.tuning]) for each in findings.advice()}
    assert told["damaged"] == ("band", ["damaged", "wiki-damaged"]), "excess lost on one of the two"
    assert told["clean"][1] == ["clean", "wiki"]
    assert told.keys() == {"damaged", "clean"}
    assert findings.tally("excess", ["tuning"]) == "better in 1 cases, not told apart in 2, worse in 1"


def test_an_interval_says_how_much_is_missing() -> None:
    spec = spec_of(["clean"])
    runs = {Task("clean", arm, 1e-3, 1): Outcome(summary(4.0)) for arm in ("excess", "uniform")}
    arm = conclude(spec, runs).cases[0].arms["excess"]
    assert interval(arm.against["uniform"]) == "+0.000 (1 seeds so far)"
    assert interval(None) == "not run yet"


FLAGS = ["--samples", "40000", "--seq-length", "128", "--global-batch-size", "64", "--micro-batch-size", "4"]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms of the shipped tables with numbers of a test's own."""
    shipped = json.loads((Path(expected.__file__).parent / "expected.json").read_text(encoding="utf-8"))
    assert {"history", "uniform", "excess", "paper"} <= shipped["arms"].keys()
    numbers = {"uniform": [-0.03, -0.02, -0.01], "plain": [0.1, 0.2, 0.3]}
    told = {
        "arms": shipped["arms"],
        "cases": {
            "clean": {"history": numbers},
            "once-damaged": {"history": numbers},
        },
        "best": {
            "clean": {"arm": "history", "proving": [-0.03, -0.02, -0.01]},
            "damaged": {"arm": "excess", "proving": [-0.05, -0.04, -0.03]},
            "copies": {"arm": "paper", "proving": None},
            "once-damaged": {"arm": None, "proving": None},
        },
    }
    monkeypatch.setattr(expected, "measured", lambda: told)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            ["--passes", "4", "--es-selection-keep-ratio", "0.5625"],
            ["clean text: -0.020 [-0.030, -0.010] against uniform, +0.200 [+0.100, +0.300] against plain"],
        ),
        (["--passes", "4", "--es-selection-keep-ratio", "0.5625"], ["40% damaged: not measured"]),
        (
            ["--passes", "4", "--es-selection-keep-ratio", "0.5625"],
            [
                "40% damaged: best on the tuning blends was `excess` with a reference, `es-megatron reference`",
                "(docs/references.md), -0.040 [-0.050, -0.030] against uniform on the proving blend",
                "half near copies: best on the tuning blends was `paper`, not proved",
            ],
        ),
        (
            ["--passes", "1", "--es-selection-keep-ratio", "0.5625"],
            [
                "40% damaged: -0.020 [-0.030, -0.010]",
                "40% damaged: nothing was better than `arm: uniform` on the tuning blends",
            ],
        ),
        (["--passes", "4", "--es-selection-keep-ratio", "0.25"], ["not measured for such a run (cost 32.5% of plain"]),
        (
            ["--passes", "20", "--es-selection-keep-ratio", "0.5625"],
            ["not measured for such a run", "over several passes: try a reference, `es-megatron reference`"],
        ),
        (["--passes", "4", "--es-pruning-ratio", "0.2"], ["not measured for such a run"]),
        (["--passes", "4", "--es-arm", "plain"], ["as of plain training"]),
    ],
)
def test_plan_tells_what_was_measured_of_the_loss(flags: list[str], lines: list[str], capsys: Any) -> None:
    capsys.readouterr()
    assert main(["plan", *FLAGS, *flags]) == 0
    told = capsys.readouterr().out
    for line in lines:
        assert line in told
    assert told.splitlines()[1].split()[0] == "loss"
    assert "clean text: best" not in told, "it is what the run does"


def test_the_sample_in_the_documents_is_what_plan_says(capsys: Any) -> None:
    shown = (page.ROOT / "docs" / "plan-and-report.md").read_text(encoding="utf-8")
    begin = shown.index("$ es-megatron plan --config configs/small.yaml") + len("$ es-megatron ")
    command = shown[begin : shown.index("plan: arm", begin)].replace("\\\n", " ")
    config = str(page.ROOT / "configs" / "small.yaml")
    assert main([config if word == "configs/small.yaml" else word for word in command.split()]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line in shown


def test_a_mean_that_is_missing_is_no_number() -> None:
    assert math.isnan(findings_of({"tuning": {"damaged": even()}}).mean(DAMAGED[2], "band"))


def test_the_time_of_a_run_over_stages() -> None:
    # 2 of 10 iterations train all 8 sequences, 8 train 3 of them at 0.7 of a plain iteration; the plain run has 20
    told = {"sequences_trained": 2 * 8 + 8 * 3, "meta_batch": 8, "iterations": 10, "plain_iterations": 20}
    assert stages.run_time(told, 3, 0.7) == pytest.approx((2 + 8 * 0.7) / 20)


def test_prices_over_stages_are_those_of_the_files() -> None:
    two, eight = (stages.prices(page.MEASURED)[count] for count in (2, 8))
    measured = json.loads(page.MEASURED.read_text(encoding="utf-8"))
    assert two["merged-2"] == 1 - measured["0.375"]["pipeline_2"]["arms"]["merged"]["saving"]
    assert two["history"] == 1 - measured["0.625"]["pipeline_2"]["arms"]["history"]["saving"]
    # 8 stages, 8 micro-batches, backward = 2 forward: (5 + 7) * 3 of (8 + 7) * 3; the same for merged by simulation
    assert eight["history"] == pytest.approx(12 / 15)
    assert eight["merged-8"] == pytest.approx(36 / 45)
