"""`metrics.jsonl` and `es-megatron report`: runs that go on, that resume, that have ended badly or hardly begun."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from es_megatron.cli import main
from es_megatron.errors import DataError
from es_megatron.report.analysis import analyse, merge_components, thin
from es_megatron.report.control import Headline
from es_megatron.report.drawing import Picture
from es_megatron.report.page import Page, Shown, render
from es_megatron.report.saving import step_of
from es_megatron.trainer import passes
from es_megatron.trainer.metrics_file import NAME, Stretch, read_metrics
from tests.metrics_run import MANIFEST, SECONDS, B, plan_of, write_run
from tests.ranks_helper import run_on_ranks
from tests.small_run import settings_of, train, write_blend
from tests.unit.naive import make_manifest
from tests.unit.test_scores_tools import save

ALL = ("worth", "shares", "losses", "training", "time", "saving", "throughput", "validation")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, for tests of what the page says: they take most of the time."""
    monkeypatch.setattr("es_megatron.report.page.png_of", lambda picture, form: b"")


def report(directory: Path, capsys: Any, *arguments: str) -> str:
    """The page, once the command has ended well."""
    code = main(["report", str(directory), *arguments])
    assert code == 0, capsys.readouterr().err
    return (directory / "report" / "report.html").read_text() if not arguments else ""


def pictures_of(page: str) -> list[bytes]:
    """Those of a wide page."""
    return [base64.b64decode(found) for found in re.findall(r' src="data:image/png;base64,([^"]+)"', page)]


def test_stretches_hold_iterations_of_one_kind_and_all_of_them(tmp_path: Path) -> None:
    plan = plan_of(pruning_ratio=0.2)
    count, phases = plan.schedule.iterations, plan.schedule.phases
    write_run(tmp_path, plan, count)
    metrics = read_metrics(tmp_path)
    assert metrics.plan["iterations"] == count
    assert metrics.stretches[0].iterations == 1
    begin = 0
    for stretch in metrics.stretches:
        assert stretch.iteration == begin + stretch.iterations
        assert {phases.evolving(n) for n in range(begin, stretch.iteration)} == {stretch.selecting}
        begin = stretch.iteration
    assert begin == count
    assert sum(s.trained for s in metrics.stretches) == plan.sequences_trained
    assert sum(s.scored for s in metrics.stretches) == plan.sequences_scored
    assert sum(sum(s.drawn.values()) for s in metrics.stretches) == count * B
    assert metrics.stretches[-1].stood_for == plan.schedule.stood_for(count)
    assert math.isnan(metrics.validation[5]["c1"])


def test_a_resumed_run_drops_what_it_runs_again(tmp_path: Path) -> None:
    plan = plan_of()
    count = plan.schedule.iterations
    write_run(tmp_path / "whole", plan, count)
    broken = tmp_path / "broken"
    write_run(broken, plan, 20)
    write_run(broken, plan, 33, start=20)
    with (broken / NAME).open("a") as file:
        file.write('{"iteration": 34, "iterat')
    write_run(broken, plan, count, start=20)
    whole, resumed = read_metrics(tmp_path / "whole"), read_metrics(broken)
    assert (broken / NAME).read_text().count('"plan"') == 1
    assert resumed.validation.keys() == whole.validation.keys()
    for name in ("iterations", "scored", "trained", "bad"):
        assert sum(getattr(s, name) for s in resumed.stretches) == sum(getattr(s, name) for s in whole.stretches)


def test_a_gap_in_the_metrics_changes_no_saving_but_is_told(tmp_path: Path) -> None:
    plan = plan_of()
    write_run(tmp_path, plan, plan.schedule.iterations)
    whole = analyse(read_metrics(tmp_path))
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    gone = [n for n, line in enumerate(lines) if '"iteration": 25,' in line or '"iteration": 30,' in line]
    (tmp_path / NAME).write_text("".join(line for n, line in enumerate(lines) if n not in gone))
    found = analyse(read_metrics(tmp_path))
    assert found.saving.work[-1] == pytest.approx(whole.saving.work[-1], abs=0.03)
    assert found.saving.measured == pytest.approx(whole.saving.measured, abs=0.03)
    assert any("Lines of the metrics are missing" in note for note in found.notes)
    assert not any("Lines of the metrics" in note or "resumed" in note for note in whole.notes)


def test_a_resumed_run_says_that_its_times_may_be_of_two_machines(tmp_path: Path) -> None:
    plan = plan_of()
    write_run(tmp_path, plan, 20)
    write_run(tmp_path, plan, 33, start=20)
    assert any("resumed at iteration 20" in note for note in analyse(read_metrics(tmp_path)).notes)


@pytest.mark.usefixtures("undrawn")
def test_a_prefix_counts_as_the_tokens_that_it_reads(tmp_path: Path, capsys: Any) -> None:
    plan = plan_of(scorer="prefix", prefix_share=0.5)
    count = plan.schedule.iterations
    write_run(tmp_path, plan, count)
    page = report(tmp_path, capsys)
    read = 16 * (0.5 * plan.sequences_scored + plan.sequences_trained)
    assert f"{read / 1e3:.3g} k forwarded" in page


@pytest.mark.usefixtures("undrawn")
def test_an_extended_run_is_not_finished_by_an_old_summary(tmp_path: Path, capsys: Any) -> None:
    plan = plan_of()
    write_run(tmp_path, plan, 20)
    (tmp_path / "summary.json").write_text('{"finished": true}')
    assert "iterations, not finished" in report(tmp_path, capsys)


def test_unreadable_lines_do_not_keep_a_run_from_resuming(tmp_path: Path, caplog: Any) -> None:
    plan = plan_of()
    write_run(tmp_path, plan, 20)
    path = tmp_path / NAME
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "\x00\x00\n", "[]\n", *lines[1:]]))
    with caplog.at_level(logging.WARNING):
        write_run(tmp_path, plan, 25, start=20)
    assert "line 2 of" in caplog.text
    assert read_metrics(tmp_path).stretches[-1].iteration == 25


def test_the_report_of_a_finished_run(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "a <run>"
    plan = plan_of(pruning_ratio=0.2)
    write_run(run, plan, plan.schedule.iterations)
    (run / "summary.json").write_text(json.dumps({"finished": True}))
    manifest = MANIFEST
    save(run / "checkpoints" / "iter_0000040" / "es_state", manifest)
    (run / "checkpoints" / "latest").write_text("iter_0000040\n")
    page = report(run, capsys)
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:2] == ["Not answered: without a control the loss that this cost is not known.", "Loss against cost"]
    assert {"Scores by component and age", "Age of the scores", "Losses of chosen and skipped sequences"} <= set(titles)
    names = {path.stem for path in (run / "report").glob("*.png")}
    assert names == {"selection", "scores", "ages", *ALL}
    assert {path.read_bytes() for path in (run / "report").glob("*.png")} == set(pictures_of(page))
    assert all(png.startswith(b"\x89PNG") for png in pictures_of(page))
    assert len(titles) == len(names) + 1
    assert len(re.findall(r'srcset="data:image/png', page)) == len(names)
    assert "a &lt;run&gt;" in page
    assert "iterations, finished" in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert "newest checkpoint, after 40 iterations" in page
    assert re.search(r"drawn -&gt; trained: \w+ \d+\.\d% -&gt; \d+\.\d%, \w+ ", page)


def test_the_measured_saving_is_told_against_the_runs_own_plain_steps(tmp_path: Path) -> None:
    plan = plan_of(anneal=0.1)
    write_run(tmp_path, plan, plan.schedule.iterations)
    saving = analyse(read_metrics(tmp_path)).saving
    assert saving.doubt == ""
    assert saving.plain_step == pytest.approx(SECONDS + 0.003)
    expected = 1 - (SECONDS / 3 + SECONDS / 4 + 0.003) / (SECONDS + 0.003)
    assert saving.measured_selecting == pytest.approx(expected)
    assert saving.nominal_selecting == pytest.approx(1 - (1 / 3 + 1 / 4))
    assert saving.work[-1] == pytest.approx(saving.nominal, abs=0.01)
    assert saving.measured == pytest.approx(saving.nominal, abs=0.02)


def test_a_run_that_goes_on_is_told_as_far_as_it_is(tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path, plan_of(anneal=0), 12)
    with (tmp_path / NAME).open("a") as file:
        file.write('{"iteration": 13, "iter')
    page = report(tmp_path, capsys)
    assert "12 of 64 iterations, not finished" in page
    assert "there is no checkpoint yet" in page
    assert "no iterations of the run trained on a whole meta-batch" in page
    assert "scores.png" not in {path.name for path in (tmp_path / "report").iterdir()}
    write_run(tmp_path / "new", plan_of(), 0)
    page = report(tmp_path / "new", capsys)
    assert "No iteration is finished yet" in page
    assert pictures_of(page) == []


def test_arms_without_scores_or_selection(tmp_path: Path, capsys: Any) -> None:
    for arm, missing in (("plain", {"selection"}), ("uniform", {"losses"})):
        plan = plan_of(arm=arm, anneal=0)
        write_run(tmp_path / arm, plan, 20)
        page = report(tmp_path / arm, capsys)
        assert f"Arm {arm} keeps no scores" in page
        names = {path.stem for path in (tmp_path / arm / "report").glob("*.png")}
        assert names == {"selection", *ALL} - missing


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_checkpoint_is_told_of(tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path, plan_of(), 12)
    save(tmp_path / "checkpoints" / "iter_0000040" / "es_state", MANIFEST)
    (tmp_path / "checkpoints" / "latest").write_text("iter_0000040\n")
    for file in (tmp_path / "checkpoints" / "iter_0000040" / "es_state").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    (tmp_path / "summary.json").write_text("{")
    page = report(tmp_path, capsys)
    assert "the newest checkpoint cannot be read" in page
    assert "summary.json cannot be read" in page


def test_many_components_and_many_stretches_are_put_together(tmp_path: Path, capsys: Any) -> None:
    plan = plan_of(make_manifest((400, 90, 20, *range(5, 15))))
    write_run(tmp_path, plan, plan.schedule.iterations, interval=1)
    metrics = read_metrics(tmp_path)
    page = report(tmp_path, capsys)
    assert "components with the fewest draws are shown as one" in page
    merged = merge_components(metrics.stretches, [c["name"] for c in metrics.plan["components"]])
    assert list(merged[0].drawn)[-1] == "6 others"
    few = thin(merged, 10)
    assert len(few) <= 12
    for name in ("iterations", "scored", "trained", "elapsed"):
        total = sum(getattr(s, name) for s in merged)
        assert sum(getattr(s, name) for s in few) == pytest.approx(total)
    assert sum(sum(s.chosen.values()) for s in few) == plan.sequences_trained
    assert few[-1].iteration == plan.schedule.iterations


def test_a_slow_first_iteration_is_no_plain_step(tmp_path: Path) -> None:
    write_run(tmp_path, plan_of(anneal=0.2), 12, interval=3)
    stretches = read_metrics(tmp_path).stretches
    slow = (dataclasses.replace(stretches[0], elapsed=100.0), *stretches[1:])
    assert step_of(slow, selecting=False) == pytest.approx(SECONDS + 0.003)
    assert step_of(slow[:1], selecting=False) == 100
    assert math.isnan(step_of(slow[:1], selecting=True))


@pytest.mark.usefixtures("undrawn")
def test_output_goes_where_it_is_told(tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path / "run", plan_of(), 12)
    report(tmp_path / "run", capsys, "--output", str(tmp_path / "out" / "page.html"))
    assert (tmp_path / "out" / "page.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "run" / "report" / "saving.png").is_file()
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "file" / "page.html")]) == 2
    assert "Name another file with `--output`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["matplotlib.axes", "jinja2"])
def test_a_missing_library_is_named_with_the_cure(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, plan_of(), 3)
    for loaded in [module for module in sys.modules if module.startswith("es_megatron.report.")]:
        if loaded.rpartition(".")[2] in ("page", "figures", "drawing", "loss_figures"):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delattr("es_megatron.report.page", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "must find matplotlib and jinja2" in told
    assert f"import of {name}" in told
    assert "Install `es_megatron[report]`" in told


def test_texts_of_a_page_are_escaped() -> None:
    picture = Picture("name", 'a "<title>"', "<caption>", lambda _: Figure())
    told = Headline("<answer>", ("<line>",))
    page = render(Page("<t>", "<s>", told, [("<name>", "<value>")], ["<note>"], [Shown(picture, b"png", b"narrow")]))
    for text in ("t", "s", "answer", "line", "name", "value", "note", "caption", "title"):
        assert f"&lt;{text}&gt;" in page
    assert 'alt="a &#34;&lt;title&gt;&#34;"' in page
    assert pictures_of(page) == [b"png"]
    assert base64.b64encode(b"narrow").decode() in page
    assert "<aside>" not in render(Page("t", "s", told, [], [], []))


@pytest.mark.usefixtures("undrawn")
def test_what_is_no_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    for directory, told in ((tmp_path / "none", "but does not exist"), (tmp_path, f"must hold a `{NAME}`")):
        assert main(["report", str(directory)]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--nonsense"])


@pytest.mark.parametrize("line", ["not json", "[1]", '{"iteration": 3}', '{"validation": 3}'])
def test_a_corrupt_line_is_named(tmp_path: Path, line: str) -> None:
    write_run(tmp_path, plan_of(), 12)
    path = tmp_path / NAME
    path.write_text(path.read_text() + line + "\n")
    number = len(path.read_text().splitlines())
    with pytest.raises(DataError, match=f"Line {number} of .*{NAME}.*Remove that line"):
        read_metrics(tmp_path)


def test_metrics_without_a_plan_or_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text("\n")
    with pytest.raises(DataError, match="Line 1"):
        read_metrics(tmp_path)
    path.write_text("")
    with pytest.raises(DataError, match="must begin with the plan"):
        read_metrics(tmp_path)
    write_run(tmp_path, plan_of(), 3)
    metrics = read_metrics(tmp_path)
    with pytest.raises(DataError, match=r"not of a known form .*Use the version"):
        analyse(dataclasses.replace(metrics, plan={**metrics.plan, "layout": {"other": 1}}))


def test_the_trainer_writes_what_a_report_needs(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(passes, "quickest", lambda *_: [0.008, 0.021, 0.01])
    changes = ("training.train_samples=192", "training.log_interval=4", "run.save_interval=5")
    settings = settings_of(write_blend(tmp_path / "data"), tmp_path / "run", *changes)
    history = run_on_ranks(1, train, settings)[0]
    metrics = read_metrics(tmp_path / "run")
    stretches: tuple[Stretch, ...] = metrics.stretches
    assert sum(s.iterations for s in stretches) == stretches[-1].iteration == len(history.chosen)
    assert sum(s.trained for s in stretches) == sum(map(len, history.chosen))
    assert {5, 10} <= {s.iteration for s in stretches}  # where a resumed run may begin
    totals: dict[str, int] = {name: sum(s.chosen[name] for s in stretches) for name in ("a", "b", "c")}
    assert totals == history.summary["chosen"]
    assert all(s.skipped_loss is not None for s in stretches if s.selecting)
    ends = np.cumsum([s.iterations for s in stretches]) - 1
    assert [s.grad_norm for s in stretches] == pytest.approx([history.norm[end] for end in ends])
    selecting = next(s for s in stretches if s.selecting)
    weights = selecting.trained / (selecting.iterations * settings.training.global_batch_size)
    mixed = weights * (selecting.chosen_loss or 0) + (1 - weights) * (selecting.skipped_loss or 0)
    assert mixed == pytest.approx(selecting.meta_loss, rel=1e-5)
    page = report(tmp_path / "run", capsys)
    assert "Scores by component and age" in page
    assert "iterations, finished" in page
