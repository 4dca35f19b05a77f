"""Runs of a comparison: what is finished, what is next, and what happens to failures."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from es_megatron.bench import comparison
from es_megatron.bench.crew import Answer, Crew
from es_megatron.bench.kept import KeptRuns
from es_megatron.bench.rates import Point, rates_document
from es_megatron.bench.recipe import Sources
from es_megatron.bench.results import conclude
from es_megatron.bench.runs import (
    CaseBlend,
    Outcome,
    Task,
    best_point,
    identity_of,
    open_tasks,
    prepare_folder,
    read_outcome,
    settings_of,
)
from es_megatron.bench.spec import read_spec
from es_megatron.checkpoint import ScoreRange, save_es_state
from es_megatron.config.settings import DEFAULT_OPTIONS
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.rank_grid import RankGrid
from tests.unit.naive import make_manifest
from tests.unit.test_compare_spec import PATH, changed

BLEND = CaseBlend(Path("data/blend.yaml"), {"demo": True})


@pytest.fixture
def spec():
    return read_spec(changed(learning_rates=[1e-3, 2e-3, 4e-3], search_seeds=[100, 101]), PATH)


def ended(loss: float) -> Outcome:
    return Outcome({"finished": True, "validation": {"iteration": 9, "mean": loss}})


def searched(arm, losses):
    """Outcomes of a search: the losses of each rate, by search seed."""
    return {
        Task("clean", arm, rate, seed): ended(loss)
        for rate, each in losses.items()
        for seed, loss in zip((100, 101), each, strict=False)
    }


def test_an_arm_is_searched_before_its_paired_runs_and_nobody_waits_for_another_arm(spec):
    assert len(open_tasks(spec, {})) == 2 * 3
    outcomes = searched("plain", {1e-3: (4.0, 4.2), 2e-3: (3.9, 4.0), 4e-3: (4.1,)})
    found = open_tasks(spec, outcomes)
    assert found[:2] == [Task("clean", "plain", 2e-3, 1), Task("clean", "plain", 2e-3, 2)]
    assert {task.arm for task in found[2:]} == {"es"}
    assert len(found) == 2 + 3


def test_the_best_two_of_the_first_search_seed_are_tried_on_the_others_and_their_mean_decides(spec):
    outcomes = searched("es", {1e-3: (4.0,), 2e-3: (3.9,), 4e-3: (3.8,)})
    found = [task for task in open_tasks(spec, outcomes) if task.arm == "es"]
    assert found == [Task("clean", "es", 4e-3, 101), Task("clean", "es", 2e-3, 101)]
    assert best_point(spec, outcomes, "clean", "es") is None
    outcomes |= {found[0]: ended(4.6), found[1]: ended(4.3)}
    assert best_point(spec, outcomes, "clean", "es") == (2e-3, None), "1e-3 has a better mean, of one seed"
    assert spec.runs == 2 * (3 + 2 + 2)


def test_a_failed_or_broken_rate_cannot_win(spec):
    outcomes = searched("es", {1e-3: (4.0, 4.2), 2e-3: (1.0, 1.0), 4e-3: (math.nan,)})
    outcomes[Task("clean", "es", 2e-3, 101)] = Outcome({}, "LossError: nan")
    assert best_point(spec, outcomes, "clean", "es") == (1e-3, None)
    outcomes[Task("clean", "es", 1e-3, 101)] = Outcome({}, "LossError: nan")
    assert best_point(spec, outcomes, "clean", "es") is None


def test_an_arm_whose_every_rate_failed_has_no_paired_runs(spec):
    outcomes = {task: Outcome({}, "broken") for task in open_tasks(spec, {}) if task.arm == "es"}
    assert best_point(spec, outcomes, "clean", "es") is None
    assert {task.arm for task in open_tasks(spec, outcomes)} == {"plain"}


def test_weight_decays_are_tried_at_the_best_rate_only():
    spec = read_spec(
        changed(
            learning_rates=[1e-3, 2e-3],
            weight_decays=[0.1, 0.5, 2.0],
            search_seeds=[100],
            arms={"es": {}},
            references=[],
        ),
        PATH,
    )
    assert spec.runs == 2 + 2 + 2
    first = open_tasks(spec, {})
    assert [task.point for task in first] == [(1e-3, 0.1), (2e-3, 0.1)]
    outcomes = {task: ended(4.0 - task.rate) for task in first}
    second = open_tasks(spec, outcomes)
    assert [task.point for task in second] == [(2e-3, 0.5), (2e-3, 2.0)]
    outcomes |= {second[0]: ended(3.0), second[1]: ended(3.5)}
    assert [(task.point, task.seed) for task in open_tasks(spec, outcomes)] == [((2e-3, 0.5), 1), ((2e-3, 0.5), 2)]
    settings = settings_of(spec, open_tasks(spec, outcomes)[0], BLEND, Path())
    assert (settings["training"]["lr"], settings["training"]["weight_decay"]) == (2e-3, 0.5)


def test_rates_of_an_earlier_search_take_the_place_of_one(tmp_path):
    points = {"clean": {"es": Point(1e-3, 0.5), "plain": Point(2e-3, None)}}
    (tmp_path / "rates.json").write_text(json.dumps(rates_document(points)))
    entries = {"rates": "rates.json", "learning_rates": [], "search_seeds": []}
    cases = {"short": {"blend": "clean", "like": "clean"}}
    arms = {"plain": {"evolved_sampling.arm": "plain"}, "es": {}, "other": {}}
    spec = read_spec(changed(**entries, cases=cases, arms=arms, rates_like={"other": "es"}), tmp_path / "spec.yaml")
    found = {task.arm: task.point for task in open_tasks(spec, {})}
    assert found == {"plain": (2e-3, None), "es": (1e-3, 0.5), "other": (1e-3, 0.5)}
    assert spec.runs == 3 * 2
    for wrong, words in (
        ({"rates_like": {}}, "has nothing for arm 'other' in case 'clean'"),
        ({"rates_like": {"other": "ess"}}, "must name an arm of the search, but is 'ess'"),
        ({"rates_like": {"another": "es"}}, "must name arms of this spec"),
        ({"cases": {"short": {"blend": "clean"}}}, "cases.short.like` must name a case"),
        ({"learning_rates": [1e-3]}, "takes the place of a search"),
        ({"rates": "gone.json"}, "gone.json` cannot be read"),
    ):
        told = {**entries, "cases": cases, "arms": arms, "rates_like": {"other": "es"}, **wrong}
        with pytest.raises(ConfigError, match=re.escape(words)):
            read_spec(changed(**told), tmp_path / "spec.yaml")


def test_a_search_that_goes_on_takes_what_an_earlier_day_has_finished(tmp_path, monkeypatch):
    from tests.unit.test_compare_results import summary

    monkeypatch.setattr(comparison, "make_blend", lambda *_: BLEND)
    spec = read_spec(
        changed(
            arms={"es": {}}, references=[], learning_rates=[1e-3, 2e-3], weight_decays=[0.1, 0.5], search_seeds=[9]
        ),
        PATH,
    )
    found = comparison.Comparison(spec, tmp_path, tmp_path, Sources())
    first, late, old = (Task("clean", "es", rate, 9, decay) for rate, decay in ((1e-3, 0.1), (2e-3, 0.1), (1e-3, 0.5)))

    def end(task: Task, loss: float) -> None:
        identity = identity_of(settings_of(spec, task, BLEND, tmp_path / task.folder), BLEND)
        prepare_folder(tmp_path / task.folder, identity)
        (tmp_path / task.folder / "summary.json").write_text(json.dumps(summary(loss)))

    end(first, 3.0)
    end(old, 2.5)
    found.find(failures=False)
    assert set(found.outcomes) == {first}, "which rate is the best is open, so whether the other decay counts"
    end(late, 4.0)
    found._finish(late, Answer(""))
    assert set(found.outcomes) == {first, late, old}
    assert best_point(spec, found.outcomes, "clean", "es") == (1e-3, 0.5)


def test_kept_runs_count_wherever_they_were_run(spec, tmp_path):
    from tests.unit.test_compare_results import summary

    tasks = [Task("clean", arm, 1e-3, 1) for arm in ("es", "plain")]
    identities = [identity_of(settings_of(spec, task, BLEND, tmp_path), BLEND) for task in tasks]
    kept = KeptRuns(tmp_path / "results" / "spec.json", spec)
    assert kept.find(identities[0]) is None
    made = summary(4.123456789, iterations=10)
    for task, identity in zip(tasks, identities, strict=True):
        kept.note(task, identity, Outcome(made))
    other = {**identities[0], "blend": {"other": 1}}
    kept.note(Task("gone", "es", 1e-3, 1), other, Outcome(made))
    kept.write({("clean", "es"): 1.5, ("gone", "es"): 2.0})

    again = KeptRuns(tmp_path / "results" / "spec.json", spec)
    found = again.find(identities[1])
    assert found is not None
    assert found.loss == 4.12346
    assert again.find(other) is None, "of a case that the spec no longer has"
    assert again.charges == {("clean", "es"): 1.5}
    assert set(again.outcomes) == set(tasks)
    assert conclude(spec, again.outcomes).cases[0].arms["es"].losses == {}, (
        "seed 1 at the rate of a search that is open"
    )

    (tmp_path / "results" / "spec.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"spec.json` cannot be read"):
        KeptRuns(tmp_path / "results" / "spec.json", spec)


def test_one_rate_needs_no_search():
    spec = read_spec(changed(learning_rates=[1e-3], search_seeds=[]), PATH)
    assert [task.seed for task in open_tasks(spec, {})] == [1, 2, 1, 2]


def finish(folder: Path, identity, **summary):
    prepare_folder(folder, identity)
    (folder / "summary.json").write_text(json.dumps({"finished": True, **summary}))


def test_a_finished_run_with_equal_settings_counts_wherever_it_stands(spec, tmp_path):
    task = Task("clean", "es", 1e-3, 1)
    finish(tmp_path, identity_of(settings_of(spec, task, BLEND, tmp_path), BLEND), iterations=3)
    moved = CaseBlend(Path("elsewhere/blend.yaml"), BLEND.identity)
    again = identity_of(settings_of(spec, task, moved, Path("other")), moved)
    found = read_outcome(tmp_path, again)
    assert found is not None
    assert found.summary["iterations"] == 3


def test_a_setting_that_is_new_counts_as_its_default(spec, tmp_path):
    from tests.unit.test_compare_results import summary

    task = Task("clean", "es", 1e-3, 1)
    today = identity_of(settings_of(spec, task, BLEND, tmp_path), BLEND)
    before = copy.deepcopy(today)
    del before["settings"]["training"]["max_skipped"]  # did not exist then
    finish(tmp_path / "run", before)
    kept = KeptRuns(tmp_path / "kept.json")
    kept.note(task, before, Outcome(summary(4.0, iterations=10)))
    kept.note(task._replace(seed=2), today, Outcome(summary(5.0, iterations=10)))
    kept.write({})
    kept = KeptRuns(tmp_path / "kept.json")
    for asked, found in ((before, True), (today, True), (changed_in(today, 3), False)):
        assert (read_outcome(tmp_path / "run", asked) is not None) is found
        assert (kept.find(asked) is not None) is found
    later = copy.deepcopy(before)
    del later["settings"]["training"]["clip_grad"]
    assert read_outcome(tmp_path / "run", later) is None, "what a setting that is gone did is not known"


def changed_in(identity, skipped):
    other = copy.deepcopy(identity)
    other["settings"]["training"]["max_skipped"] = skipped
    return other


def test_another_default_or_version_makes_another_run(spec, tmp_path, monkeypatch):
    task = Task("clean", "es", 1e-3, 1)
    made = settings_of(spec, task, BLEND, tmp_path)
    before = identity_of(made, BLEND)
    # though the spec does not say it
    assert before["settings"]["evolved_sampling"]["selection"]["options"] == {"power": 8}
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
        assert identity_of(made, BLEND) != before
    monkeypatch.setitem(DEFAULT_OPTIONS, "es", {"power": 2})
    assert identity_of(made, BLEND) != before


def test_initial_scores_count_by_content_wherever_they_stand(spec, tmp_path):
    made = settings_of(spec, Task("clean", "es", 1e-3, 1), BLEND, tmp_path)
    manifest, found = make_manifest((5, 3)), []
    for name, score, seconds in (("here", 2.0, 1.0), ("there", 2.0, 7.5), ("other", 3.0, 1.0)):
        scores = ScoreRange(8, 0, np.full(8, score, np.float32), np.ones(8, np.uint8))
        save_es_state(tmp_path / name, scores, {}, {"seconds": seconds}, manifest.to_json(), RankGrid.alone())
        made["evolved_sampling"]["initial_scores"] = str(tmp_path / name)
        found.append(identity_of(made, BLEND))
    assert found[0] == found[1] != found[2], "scores and samples count, not how long it took"
    made["evolved_sampling"]["initial_scores"] = str(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="gone"):
        identity_of(made, BLEND)


def test_other_settings_or_data_or_half_a_run_do_not_count(spec, tmp_path):
    task = Task("clean", "es", 1e-3, 1)
    identity = identity_of(settings_of(spec, task, BLEND, tmp_path), BLEND)
    finish(tmp_path, identity)
    assert read_outcome(tmp_path, identity_of(settings_of(spec, task._replace(seed=2), BLEND, tmp_path), BLEND)) is None
    other = CaseBlend(BLEND.file, {"demo": False})
    assert read_outcome(tmp_path, identity_of(settings_of(spec, task, other, tmp_path), other)) is None
    finish(tmp_path, identity)
    (tmp_path / "summary.json").write_text('{"finished": false}')
    assert read_outcome(tmp_path, identity) is None
    prepare_folder(tmp_path, identity)
    assert read_outcome(tmp_path, identity) is None
    assert read_outcome(tmp_path / "none", identity) is None


def test_a_failed_run_is_told_from_its_folder(tmp_path):
    prepare_folder(tmp_path, {"a": 1})
    (tmp_path / "error.txt").write_text("LossError: nan\n")
    found = read_outcome(tmp_path, {"a": 1})
    assert found == Outcome({}, "LossError: nan")
    assert found.loss == math.inf


class Sham:
    """Workers that only note what they are asked, and fail where they are told to."""

    asked: list[Task]

    def __init__(self, log: Path) -> None:
        self.log = log

    def train(self, settings):
        Sham.asked.append(settings["task"])
        return Answer("broken" if settings["task"].rate == 2e-3 else "")

    def close(self):
        pass


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_crew_runs_everything_once_and_goes_on_after_failures(spec, monkeypatch, jobs):
    monkeypatch.setattr("es_megatron.bench.crew.Worker", Sham)
    Sham.asked = []
    outcomes: dict[Task, Outcome] = {}

    def note(task: Task, answer: Answer) -> None:
        outcomes[task] = Outcome({}, answer.error) if answer.error else ended(task.rate)

    Crew(lambda: open_tasks(spec, outcomes), lambda task: {"task": task}, note).work([Path("log")] * jobs)
    assert len(Sham.asked) == len(set(Sham.asked)) == spec.runs
    assert sum(bool(outcome.error) for outcome in outcomes.values()) == 2, "it is not tried on the other search seed"
    assert {task.rate for task in outcomes if task.seed in spec.seeds} == {1e-3}


def test_a_crew_tells_what_breaks_the_comparison_itself(spec, monkeypatch):
    monkeypatch.setattr("es_megatron.bench.crew.Worker", Sham)

    def start(task: Task):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Crew(lambda: open_tasks(spec, {}), start, lambda *_: None).work([Path("log")] * 2)
