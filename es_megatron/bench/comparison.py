"""A comparison as it runs: data, runs, results, each found again where an earlier command left them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from es_megatron.bench import table
from es_megatron.bench.blends import make_blend
from es_megatron.bench.crew import Answer, Crew
from es_megatron.bench.plots import draw
from es_megatron.bench.reference_models import forward_flops, make_reference, read_price, vocabulary_of
from es_megatron.bench.results import conclude
from es_megatron.bench.runs import (
    CaseBlend,
    Outcome,
    Task,
    best_rate,
    check_arms,
    identity_of,
    open_tasks,
    prepare_folder,
    read_outcome,
    reference_of,
    searched,
    settings_of,
    write_settings,
)
from es_megatron.bench.spec import Spec
from es_megatron.config import build
from es_megatron.trainer.model_settings import ModelSettings


class Comparison:
    """One spec in its folder."""

    def __init__(self, spec: Spec, directory: Path, data: Path, wikitext: Path | None) -> None:
        """Make the blends that are not there, check all arms, and look what is finished.

        Args:
            spec: what to compare.
            directory: of runs and results.
            data: of blends, which several specs may share.
            wikitext: the file of `--wikitext`.

        Raises:
            EsError: a blend cannot be made, or the settings of an arm cannot be.
        """
        self.spec, self.directory = spec, directory
        made = {
            name: make_blend(name, spec.blends[name], data, wikitext)
            for name in dict.fromkeys(case.blend for case in spec.cases.values())
        }
        self._blends: Mapping[str, CaseBlend] = {name: made[case.blend] for name, case in spec.cases.items()}
        check_arms(spec, self._blends)
        self._blends = {name: self._with_references(name, blend) for name, blend in self._blends.items()}
        self.outcomes: dict[Task, Outcome] = {}

    def _with_references(self, case: str, blend: CaseBlend) -> CaseBlend:
        """Make the reference models that the case's arms name."""
        found: dict[str, Path] = {}
        for arm in self.spec.arms:
            settings = settings_of(self.spec, Task(case, arm, self.spec.learning_rates[0], 0), blend, self.directory)
            name = reference_of(settings)
            if name in self.spec.reference_models and name not in found:
                length = int(settings["model"].get("seq_length", ModelSettings.seq_length))
                found[name] = make_reference(name, self.spec.reference_models[name], blend, length)
        return dataclasses.replace(blend, references=found)

    def _charges(self) -> dict[tuple[str, str], float]:
        """What the reference of each case's arm cost, in forward passes of the run over a sequence."""
        found: dict[tuple[str, str], float] = {}
        for case, blend in self._blends.items():
            for arm in self.spec.arms:
                settings = settings_of(
                    self.spec, Task(case, arm, self.spec.learning_rates[0], 0), blend, self.directory
                )
                losses = next((path for path in blend.references.values() if str(path) == reference_of(settings)), None)
                if losses is not None:
                    model = build(ModelSettings, settings["model"], "model")
                    found[case, arm] = read_price(losses).flops / forward_flops(model, vocabulary_of(blend.file))
        return found

    def find(self, *, failures: bool) -> None:
        """Take what has ended: searches first, since they say at which rate the paired runs are.

        Args:
            failures: whether failed runs count as ended; otherwise they will run again.
        """
        for case in self.spec.cases:
            for arm in self.spec.arms:
                self._read(searched(self.spec, case, arm), failures=failures)
                rate = best_rate(self.spec, self.outcomes, case, arm)
                if rate is not None:
                    self._read([Task(case, arm, rate, seed) for seed in self.spec.seeds], failures=failures)

    def _read(self, tasks: list[Task], *, failures: bool) -> None:
        for task in tasks:
            _, identity = self._settings(task)
            outcome = read_outcome(self.directory / task.folder, identity)
            if outcome is not None and (failures or not outcome.error):
                self.outcomes[task] = outcome

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
            logs = [self.directory / f"worker-{number}.log" for number in range(min(self.spec.jobs, open_runs))]
            Crew(lambda: open_tasks(self.spec, self.outcomes), self._start, self._finish).work(logs)

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
        told = f"FAILED: {error}" if error else f"loss {outcome.loss:.4f}"
        done = f"{len(self.outcomes)}/{self.spec.runs}"
        seconds = f"{answer.seconds:.1f} s ({answer.processor:.1f} s of processor)"
        print(f"{time.strftime('%H:%M:%S')} [{done}] {task}: {told}, {seconds}", flush=True)

    def report(self) -> bool:
        """Print the tables; write them, plots, and JSON with everything; returns whether a run has failed."""
        results = conclude(self.spec, self.outcomes, self._charges())
        text = table.render(results)
        written = {
            "table.txt": text,
            "table.md": table.markdown(results),
            "results.json": json.dumps(table.document(results), indent=2),
        }
        for name, content in written.items():
            (self.directory / name).write_text(content + "\n", encoding="utf-8")
        plots = draw(results, self.directory / "plots")
        told = f", {len(plots)} plots" if plots else "; plots need matplotlib, `pip install es_megatron[report]`"
        print(f"\n{text}\n\n{self.directory}: {', '.join(written)}{told}", flush=True)
        return any(outcome.error for outcome in self.outcomes.values())
