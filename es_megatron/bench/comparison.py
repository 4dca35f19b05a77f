"""A comparison as it runs: data, runs, results, each found again where an earlier command left them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from es_megatron.bench import table
from es_megatron.bench.blends import make_blend, text_like
from es_megatron.bench.crew import Answer, Crew, Worker
from es_megatron.bench.kept import KeptRuns
from es_megatron.bench.page import page
from es_megatron.bench.plots import draw
from es_megatron.bench.rates import Point, rates_document
from es_megatron.bench.recipe import Sources
from es_megatron.bench.reference_models import forward_flops, make_reference, read_price, vocabulary_of
from es_megatron.bench.results import NOMINAL, conclude
from es_megatron.bench.runs import (
    CaseBlend,
    Outcome,
    Task,
    best_point,
    check_arms,
    first_task,
    identity_of,
    open_tasks,
    paired_tasks,
    prepare_folder,
    read_outcome,
    reference_of,
    searched,
    settings_of,
    weights_of,
    write_settings,
)
from es_megatron.bench.spec import Spec
from es_megatron.config import build
from es_megatron.core.plan import FORWARD_COST
from es_megatron.trainer.settings import PretrainSettings


class Comparison:
    """One spec in its folder."""

    def __init__(self, spec: Spec, directory: Path, data: Path, sources: Sources, kept: KeptRuns | None = None) -> None:
        """Make the blends that are not there, check all arms, and look what is finished.

        Args:
            spec: what to compare.
            directory: of runs and results.
            data: of blends, which several specs may share.
            sources: where texts stand that a spec does not bring.
            kept: runs that count as finished, wherever they were run.

        Raises:
            EsError: a blend cannot be made, or the settings of an arm cannot be.
        """
        self.spec, self.directory, self._kept = spec, directory, kept
        self._data, self._sources = data, sources
        made = {
            name: make_blend(name, sources.resolve(spec.blends[name]), data, sources.wikitext)
            for name in dict.fromkeys(case.blend for case in spec.cases.values())
        }
        self._blends: Mapping[str, CaseBlend] = {name: made[case.blend] for name, case in spec.cases.items()}
        check_arms(spec, self._blends)
        self._blends = {name: self._with_references(name, blend) for name, blend in self._blends.items()}
        self.outcomes: dict[Task, Outcome] = {}
        self._took: list[float] = []

    def _with_references(self, case: str, blend: CaseBlend) -> CaseBlend:
        """Make the reference models that the case's arms name, and tell what they cost."""
        found: dict[str, Path] = {}
        shares: dict[str, float] = {}
        for arm in self.spec.arms:
            settings = settings_of(self.spec, first_task(self.spec, case, arm), blend, self.directory)
            for name in (reference_of(settings), weights_of(settings)):
                if name not in self.spec.reference_models or name in found:
                    continue
                run = build(PretrainSettings, settings, f"arm {arm}")
                losses = self._make_reference(name, blend, run.model.seq_length)
                price = read_price(losses)
                forward = forward_flops(run.model, vocabulary_of(blend.file))
                plain = (FORWARD_COST + NOMINAL.backward) * forward * run.training.draws(price.rows)
                found[name], shares[name] = losses, price.flops / plain
        return dataclasses.replace(blend, references=found, shares=shares)

    def _make_reference(self, name: str, blend: CaseBlend, seq_length: int) -> Path:
        model = self.spec.reference_models[name]
        recipe, text = self.spec.blends.get(model.text), None
        if recipe is not None:
            resolved, folder, wikitext = self._sources.resolve(recipe), self._data, self._sources.wikitext
            text = functools.partial(text_like, model.text, resolved, blend.file, folder, wikitext)
        return make_reference(name, model, blend, seq_length, text)

    def _charges(self) -> dict[tuple[str, str], float]:
        """What the reference of each case's arm cost, as a share of the plain run's cost."""
        found: dict[tuple[str, str], float] = {}
        for case, blend in self._blends.items():
            for arm in self.spec.arms:
                settings = settings_of(self.spec, first_task(self.spec, case, arm), blend, self.directory)
                folder = reference_of(settings)
                for name, losses in blend.references.items():
                    if str(losses) == folder:
                        found[case, arm] = blend.shares[name]
        return found

    def find(self, *, failures: bool) -> None:
        """Take what has ended: searches first, since they say at which rate the paired runs are.

        Args:
            failures: whether failed runs count as ended; otherwise they will run again.
        """
        for case in self.spec.cases:
            for arm in self.spec.arms:
                self._find(case, arm, failures=failures)

    def _find(self, case: str, arm: str, *, failures: bool) -> None:
        """Take an arm's runs that have ended; what has been found says which others there are."""
        before = -1
        while before < len(self.outcomes):
            before = len(self.outcomes)
            self._read(searched(self.spec, self.outcomes, case, arm), failures=failures)
        self._read(paired_tasks(self.spec, self.outcomes, case, arm), failures=failures)

    def _read(self, tasks: list[Task], *, failures: bool) -> None:
        for task in tasks:
            if task in self.outcomes:
                continue
            _, identity = self._settings(task)
            outcome = read_outcome(self.directory / task.folder, identity)
            if outcome is None and self._kept is not None:
                outcome = self._kept.find(identity)
            if outcome is not None and (failures or not outcome.error):
                self.outcomes[task] = outcome
                self._keep(task, identity, outcome)

    def _keep(self, task: Task, identity: Mapping[str, Any], outcome: Outcome) -> None:
        if self._kept is not None and not outcome.error:
            self._kept.note(task, identity, outcome)

    def _settings(self, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings and identity of a run."""
        blend = self._blends[task.case]
        settings = settings_of(self.spec, task, blend, self.directory / task.folder)
        return settings, identity_of(settings, blend)

    def run(self) -> None:
        """Run what has not ended well."""
        self.find(failures=False)
        open_runs = self.spec.runs - len(self.outcomes)
        print(f"{self.spec.path.name}: {len(self.outcomes)} of {self.spec.runs} runs are there", flush=True)
        if open_runs:
            self._tell_hours()
            logs = [self.directory / f"worker-{number}.log" for number in range(min(self.spec.jobs, open_runs))]
            Crew(lambda: open_tasks(self.spec, self.outcomes), self._start, self._finish).work(logs)

    def _tell_hours(self) -> None:
        """Say how long the open runs will take, from what one iteration of each case takes on this machine."""
        seconds = 0.0
        worker = Worker(self.directory / "estimate.log")
        try:
            for case, blend in self._blends.items():
                first = {arm: first_task(self.spec, case, arm) for arm in self.spec.arms}
                runs = [settings_of(self.spec, task, blend, self.directory / task.folder) for task in first.values()]
                for arm, each in zip(first, worker.estimate(runs), strict=True):
                    seconds += each * self._open_runs(case, arm)
        finally:
            worker.close()
        told = minutes(seconds / self.spec.jobs)
        print(f"about {told} with {self.spec.jobs} at a time, where each has a core of its own", flush=True)

    def _open_runs(self, case: str, arm: str) -> int:
        done = sum((task.case, task.arm) == (case, arm) for task in self.outcomes)
        return self.spec.runs // (len(self.spec.cases) * len(self.spec.arms)) - done

    def _start(self, task: Task) -> dict[str, Any]:
        settings, identity = self._settings(task)
        folder = self.directory / task.folder
        prepare_folder(folder, identity)
        write_settings(settings, folder / "settings.yaml")
        return settings

    def _finish(self, task: Task, answer: Answer) -> None:
        """Note how a run ended, on disk where the trainer has not."""
        error = answer.error
        folder = self.directory / task.folder
        _, identity = self._settings(task)
        outcome = None if error else read_outcome(folder, identity)
        if outcome is None:
            error = error or "it was stopped before its end"
            (folder / "error.txt").write_text(error + "\n", encoding="utf-8")
            outcome = Outcome({}, error)
        self.outcomes[task] = outcome
        self._keep(task, identity, outcome)
        self._find(task.case, task.arm, failures=False)  # runs of another day, to which this one has led
        if self._kept is not None:
            self._kept.write(self._charges())
        told = f"FAILED: {error}" if error else f"loss {outcome.loss:.4f}"
        done = f"{len(self.outcomes)}/{self.spec.runs}"
        self._took.append(answer.seconds)
        left = (self.spec.runs - len(self.outcomes)) * statistics.fmean(self._took) / self.spec.jobs
        seconds = f"{answer.seconds:.1f} s ({answer.processor:.1f} s of processor)"
        print(f"[{done}] {task}: {told}, {seconds}; about {minutes(left)} left", flush=True)

    def _points(self) -> dict[str, dict[str, Point]]:
        """The best learning rate and weight decay of every arm whose search is at its end."""
        return {
            case: {arm: point for arm in self.spec.arms if (point := best_point(self.spec, self.outcomes, case, arm))}
            for case in self.spec.cases
        }

    def report(self) -> bool:
        """Print the tables; write them, plots, and JSON with everything; returns whether a run has failed."""
        results = conclude(self.spec, self.outcomes, self._charges())
        text = table.render(results)
        written = {
            "table.txt": text,
            "table.md": table.markdown(results),
            "results.json": json.dumps(table.document(results), indent=2),
        }
        if self.spec.searches:
            written["rates.json"] = json.dumps(rates_document(self._points()), indent=1)
        with suppress(ImportError):  # jinja2 comes with the extra `report`, as matplotlib does
            written["page.html"] = page(results)
        for name, content in written.items():
            (self.directory / name).write_text(content + "\n", encoding="utf-8")
        plots = draw(results, self.directory / "plots")
        told = f", {len(plots)} plots" if plots else "; plots need matplotlib, `pip install es_megatron[report]`"
        print(f"\n{text}\n\n{self.directory}: {', '.join(written)}{told}", flush=True)
        if "page.html" in written:
            print(f"The page to look at: {(self.directory / 'page.html').absolute()}", flush=True)
        return any(outcome.error for outcome in self.outcomes.values())


def minutes(seconds: float) -> str:
    """A time for people, in minutes or hours."""
    if not math.isfinite(seconds):
        return "an unknown time"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
