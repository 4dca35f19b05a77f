"""The answer of a report: a run beside its control, and the time that it is said to have saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.algorithm.evolution import usable_scores
from es_megatron.checkpoint import ScoreRange, save_es_state
from es_megatron.cli import main
from es_megatron.rank_grid import RankGrid
from es_megatron.report.analysis import MOST_POINTS, analyse, thin
from es_megatron.report.control import headline, read_side
from es_megatron.report.drawing import WIDE, broken, curve
from es_megatron.report.score_figures import draw_scores
from es_megatron.report.words import amount, duration
from es_megatron.score_files.files import AGES, ScoreFiles, count_by_age, middles_of
from es_megatron.trainer.metrics_file import NAME, read_metrics
from tests.metrics_run import B, finish, plan_of, write_run
from tests.unit.naive import make_manifest

SETTINGS = {"model": {"num_layers": 2}, "training": {"lr": 0.001}, "run": {"directory": "a"}}
ES, PLAIN = plan_of(anneal=0.1, pruning_ratio=0.2), plan_of(arm="plain")


def sides(folder: Path, above: float = 0.0, plan: Any = ES, control: Any = PLAIN, **changes: Any) -> Any:
    """A finished run and its finished control, read."""
    write_run(folder / "run", plan, plan.schedule.iterations, above=above)
    write_run(folder / "control", control, control.schedule.iterations)
    finish(folder / "run", {**SETTINGS, **changes})
    finish(folder / "control", {**SETTINGS, "run": {"directory": "b"}})
    return read_side(folder / "run"), read_side(folder / "control")


def test_a_lower_loss_for_less_work_is_a_yes(tmp_path: Path) -> None:
    run, control = sides(tmp_path, above=-1.0)
    told = headline(run, control)
    less = 1 - run.work / control.work
    assert 0.3 < less < 0.5
    assert told.answer.startswith("Yes, on this pair: ")
    assert f"for {less:.1%} less work" in told.answer
    loss = [max(side.analysis.validation.items())[1]["c0"] for side in (run, control)]
    assert f"{loss[1] - loss[0]:.4f} nats lower loss than plain" in told.answer
    assert any(f"{loss[0]:.4f} nats per token" in line for line in told.lines)
    assert any("one pair of runs" in line for line in told.lines)
    assert any(f"{run.work / control.work:.1%} of the control's work" in line for line in told.lines)


def test_a_higher_loss_is_a_trade_or_a_no(tmp_path: Path) -> None:
    run, control = sides(tmp_path / "small")
    assert headline(run, control).answer.startswith("A trade, on this pair: ")
    run, control = sides(tmp_path / "large", above=1.0)
    told = headline(run, control)
    assert told.answer.startswith("No, on this pair: for no more work plain already had as low a loss")
    # The other way round: more work than the control, and a higher loss; then more work and a lower one.
    worse = sides(tmp_path / "swapped", above=1.0, plan=PLAIN, control=ES)
    assert "No, on this pair" in headline(*worse).answer
    assert "more work" in headline(*worse).answer
    better = sides(tmp_path / "bought", above=-1.0, plan=PLAIN, control=ES)
    assert headline(*better).answer.startswith("Bought with work")


@pytest.mark.parametrize(("above", "answer"), [(-0.1, "Better"), (0.1, "Worse"), (0.0, "No better")])
def test_equal_work_is_judged_by_the_loss(tmp_path: Path, above: float, answer: str) -> None:
    run, control = sides(tmp_path, above=above, plan=ES, control=ES)
    assert headline(run, control).answer.startswith(f"{answer} than es, fresh scores at equal work, on this pair")


def test_without_a_control_nothing_is_answered(tmp_path: Path) -> None:
    run, _ = sides(tmp_path)
    told = headline(run, None)
    assert told.answer.startswith("Not answered: without a control")
    assert any("--control RUN" in line for line in told.lines)


def test_what_cannot_be_compared_is_not(tmp_path: Path) -> None:
    run, control = sides(tmp_path / "model", model={"num_layers": 4})
    assert headline(run, control).answer == "Not answered: the control has another `model.num_layers`."
    other = plan_of(make_manifest((400, 90, 21)), arm="plain")
    assert "the blend of the control is another" in headline(*sides(tmp_path / "blend", control=other)).answer
    path = tmp_path / "model" / "control" / NAME
    lines = [line for line in path.read_text().splitlines(keepends=True) if "validation" not in line]
    path.write_text("".join(lines))
    finish(tmp_path / "model" / "run", SETTINGS)
    again = [read_side(tmp_path / "model" / name) for name in ("run", "control")]
    assert "no validation losses in common" in headline(*again).answer


def test_a_run_that_goes_on_is_not_judged(tmp_path: Path) -> None:
    run, control = sides(tmp_path, above=-1.0)
    write_run(tmp_path / "half", ES, 40, above=-1.0)
    assert headline(read_side(tmp_path / "half"), control).answer.startswith("Not answered yet: this run has not")
    (tmp_path / "control" / "summary.json").unlink()
    assert "the control has not come to its end" in headline(run, read_side(tmp_path / "control")).answer


def test_work_that_is_not_known_is_not_compared(tmp_path: Path) -> None:
    run, _ = sides(tmp_path, above=-1.0)
    path = tmp_path / "control" / NAME
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"iteration": 25,' not in line))
    assert "the metrics of one run are not whole" in headline(run, read_side(tmp_path / "control")).answer


def test_the_page_lays_the_control_over_the_run(tmp_path: Path, capsys: Any) -> None:
    sides(tmp_path, above=-1.0, training={"lr": 0.002})
    page = tmp_path / "page.html"
    words = ["report", str(tmp_path / "run"), "--control", str(tmp_path / "control"), "--output", str(page)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "Yes, on this pair" in told
    text = page.read_text()
    assert "training.lr 0.002 instead of 0.001" in text
    assert "run.directory" not in text
    assert "Dashed: the control, control" in text
    with_control = (tmp_path / "run" / "report" / "worth.png").read_bytes()
    assert main(words[:2]) == 0
    assert (tmp_path / "run" / "report" / "worth.png").read_bytes() != with_control
    assert main([*words[:3], str(tmp_path / "none")]) == 2
    assert "but does not exist" in capsys.readouterr().err


def saving(folder: Path, plan: Any = ES, **how: Any) -> Any:
    write_run(folder, plan, plan.schedule.iterations, **how)
    return analyse(read_metrics(folder)).saving


def test_time_is_said_to_be_saved_at_one_load_only(tmp_path: Path) -> None:
    evolving = ES.schedule.phases.evolving
    last = ES.schedule.iterations - 3
    for name, load, told in (
        (
            "plain steps loaded",
            lambda n: 1.0 if evolving(n) else 2.0,
            "would have saved 70.6%, where 41.7% is possible",
        ),
        ("loaded at the end", lambda n: 2.0 if n >= last else 1.0, "unselecting iterations took between 303 ms and"),
        ("loaded in between", lambda n: 2.0 if 20 < n < 30 else 1.0, "selecting iterations took between"),
    ):
        found = saving(tmp_path / name, load=load)
        assert told in found.doubt, name
        assert np.isnan(found.measured)
        assert np.isnan(found.measured_selecting)
        assert found.counted == pytest.approx(found.nominal, abs=0.02)
    assert "no iterations of the run trained on a whole" in saving(tmp_path / "none", plan_of(anneal=0)).doubt
    assert saving(tmp_path / "steady", load=lambda n: 1.1 if n % 2 else 1.0).doubt == ""
    assert saving(tmp_path / "slower", load=lambda _: 3.0).measured == pytest.approx(saving(tmp_path / "same").measured)


def test_processes_that_share_no_kind_of_iteration_are_not_compared(tmp_path: Path) -> None:
    first = next(n for n in range(ES.schedule.iterations) if ES.schedule.phases.evolving(n))
    write_run(tmp_path, ES, first)
    write_run(tmp_path, ES, first + 20, start=first)
    assert "no process of the run has made both" in analyse(read_metrics(tmp_path)).saving.doubt


def test_no_line_goes_across_what_was_not_measured(tmp_path: Path) -> None:
    write_run(tmp_path, ES, 60, interval=1)
    stretches = [s for s in read_metrics(tmp_path).stretches if s.iteration not in (30, 31)]
    x, y = broken(stretches, [None if 40 <= s.iteration < 43 else 1.0 for s in stretches])
    assert x[np.isnan(y)].tolist() == [31, 40, 41, 42]
    assert all(30 not in range(s.iteration - s.iterations + 1, s.iteration + 1) for s in thin(stretches, 7))
    _, (axes,) = WIDE.panels(1)
    alone = [np.nan, 1.0, np.nan, *[2.0] * MOST_POINTS, np.nan]
    curve(axes, range(len(alone)), alone)
    assert axes.lines[0].get_markevery() == [1]
    curve(axes, [1, 2], [np.nan, np.nan])
    assert len(axes.lines) == 1


def test_scores_are_shown_without_the_start_value(tmp_path: Path) -> None:
    manifest, decay = make_manifest((500, 20)), 0.9
    random = np.random.default_rng(0)
    visits = random.integers(0, 12, manifest.total).astype(np.uint8)
    loss = random.uniform(3, 4, manifest.total)
    left = decay**visits
    score = np.where(visits > 0, left / manifest.total + (1 - left) * loss, 0).astype(np.float32)
    state = {"engine": {"iteration": 40, "terms": {"decay": decay}}}
    folder = tmp_path / "es_state"
    save_es_state(folder, ScoreRange(manifest.total, 0, score, visits), {}, state, manifest.to_json(), RankGrid.alone())
    files = ScoreFiles(tmp_path)
    counts = count_by_age(files, 0, lambda s, v: usable_scores(s, v, decay, 1 / manifest.total, "debiased", 0.0))
    seen = np.flatnonzero(counts.sum(axis=0))
    assert counts.sum() == np.count_nonzero(visits[:500])
    assert middles_of(seen).min() > 2.97  # as stored, a single visit leaves a tenth of the loss
    assert middles_of(np.flatnonzero(count_by_age(files, 0)[AGES.index((1, 1))])).max() < 0.45
    histogram = draw_scores(files)[0]
    assert "beta2 = 0.9" in histogram.caption
    low, high = histogram.draw(WIDE).axes[0].get_xlim()
    assert 2.7 < low < high < 4.5


def test_a_resumed_file_of_an_older_version_has_no_norms(tmp_path: Path) -> None:
    write_run(tmp_path, ES, 20)
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    for line in lines:
        line.pop("grad_norm", None)
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {s.grad_norm for s in read_metrics(tmp_path).stretches} == {None}
    assert not analyse(read_metrics(tmp_path)).saving.doubt


def test_numbers_have_units_that_a_person_reads() -> None:
    assert [amount(n) for n in (0, B, 999, 999.6, 337_000, 1.234e9, 3.34e13)] == [
        "0",
        "32",
        "999",
        "1 k",
        "337 k",
        "1.23 G",
        "33.4 T",
    ]
    times = (2e-5, 0.126, 3.456, 111.2, 200, 5000, 86400, 1e6, float("nan"))
    assert [duration(s) for s in times] == [
        "20 µs",
        "126 ms",
        "3.46 s",
        "111 s",
        "3.33 min",
        "83.3 min",
        "24 h",
        "11.6 days",
        "unknown",
    ]
