"""Runs of a comparison: their settings, their folders, which are finished, and which are next."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from es_megatron.bench.entries import mapping
from es_megatron.bench.identity import same_run, settings_identity
from es_megatron.bench.rates import Point
from es_megatron.bench.spec import FINALISTS, Overrides, Spec
from es_megatron.checkpoint.es_state import read_manifest
from es_megatron.checkpoint.reference_losses import fingerprint_of
from es_megatron.checkpoint.transfer import find_scores
from es_megatron.config import build
from es_megatron.data.manifest import Manifest
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.trainer.settings import PretrainSettings


class Task(NamedTuple):
    """One run."""

    case: str
    arm: str
    rate: float
    """Highest learning rate."""
    seed: int
    decay: float | None = None
    """Weight decay; None: that of the settings."""

    @property
    def point(self) -> Point:
        """Learning rate and weight decay."""
        return Point(self.rate, self.decay)

    @property
    def folder(self) -> Path:
        """Where it stands inside the folder of the comparison."""
        decay = "" if self.decay is None else f"-wd{self.decay:g}"
        return Path("runs", self.case, self.arm, f"lr{self.rate:g}{decay}-seed{self.seed}")

    def __str__(self) -> str:
        """For people."""
        return f"{self.case} {self.arm} {self.point} seed {self.seed}"


class Outcome(NamedTuple):
    """How a run ended."""

    summary: Mapping[str, Any]
    """What the trainer's `summary.json` holds; empty for a failed run."""
    error: str = ""

    @property
    def loss(self) -> float:
        """Mean validation loss over the domains, nats per token; infinite where there is none."""
        loss = float((self.summary.get("validation") or {}).get("mean", math.inf))
        return loss if math.isfinite(loss) else math.inf


Outcomes = Mapping[Task, Outcome]

BUDGET_DIGITS = 4
RUN = "run"
"""Folder of a reference's training run, beside its losses."""


@dataclass(frozen=True)
class CaseBlend:
    """The data of a case."""

    file: Path
    identity: Mapping[str, Any]
    references: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Losses of the spec's reference models for this blend, by name."""
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    """What training each of them and scoring the blend with it cost, as a share of the plain run's cost."""


def settings_of(spec: Spec, task: Task, blend: CaseBlend, folder: Path) -> dict[str, Any]:
    """The settings of a run as a mapping: base, case, arm, rate and seed, in this order.

    Raises:
        ConfigError: the settings are not those of a run; names the arm.
    """
    made: dict[str, Any] = copy.deepcopy(dict(spec.base))
    apply(made, spec.cases[task.case].overrides)
    apply(made, spec.arms[task.arm])
    own = {
        "data.blend": str(blend.file),
        "training.lr": task.rate,
        "training.min_lr": spec.final_rate * task.rate,
        **({} if task.decay is None else {"training.weight_decay": task.decay}),
        "training.seed": task.seed,
        "model.init_seed": task.seed,
        "evolved_sampling.seed": task.seed,
        "run.directory": str(folder),
        "run.save_interval": None,
        "run.resume": False,
        "run.progress": False,
    }
    apply(made, own)
    weights = weights_of(made)
    if weights in blend.references:
        made["model"]["weights"] = str(blend.references[weights].with_name(RUN))
    reference = reference_of(made)
    if reference in blend.references:
        made["evolved_sampling"]["reference"]["folder"] = str(blend.references[reference])
        selection = made["evolved_sampling"].get("selection") or {}
        if spec.reference_runs and selection.get("budget") is not None:
            left = float(selection["budget"]) - blend.shares[reference] / spec.reference_runs
            if left <= 0:
                raise ConfigError(
                    f"{spec.path}: arm {task.arm}: reference `{reference}` costs more than the budget leaves. Give it "
                    "fewer passes, or `reference_runs` more."
                )
            selection["budget"] = round(left, BUDGET_DIGITS)
    build(PretrainSettings, made, f"{spec.path}: arm {task.arm}")
    return made


def weights_of(settings: Mapping[str, Any]) -> Any:
    """`model.weights` of a run's settings, or nothing."""
    return (settings.get("model") or {}).get("weights")


def reference_of(settings: Mapping[str, Any]) -> Any:
    """`evolved_sampling.reference.folder` of a run's settings, or nothing."""
    group = (settings.get("evolved_sampling") or {}).get("reference") or {}
    return group.get("folder") if isinstance(group, dict) else group  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def apply(sections: dict[str, Any], overrides: Overrides) -> None:
    """Set `section.key` values in nested sections, in place."""
    for key, value in overrides.items():
        *path, last = key.split(".")
        inner = sections
        for part in path:
            inner[part] = mapping(inner.get(part), part)
            inner = inner[part]
        if isinstance(value, dict):
            inner[last] = mapping(inner.get(last), last)
            apply(inner[last], cast(Overrides, value))
        else:
            inner[last] = value


def identity_of(settings: Mapping[str, Any], blend: CaseBlend) -> dict[str, Any]:
    """What must be equal for a finished run to count: its settings with all defaults, its data, and the versions.

    Not where anything stands: initial scores and reference losses are told by their content.

    Raises:
        CheckpointError: there are no such initial scores.
    """
    told = settings_identity(build(PretrainSettings, dict(settings), "settings"))
    scores = told["evolved_sampling"]["scores"]["initial"]
    if scores is not None:
        told["evolved_sampling"]["scores"]["initial"] = scores_identity(Path(scores))
    reference = told["evolved_sampling"]["reference"]["folder"]
    made_here = {str(path): path.parent.name.rpartition("-")[2] for path in blend.references.values()}
    runs = {str(Path(path).with_name(RUN)): made for path, made in made_here.items()}
    told["model"]["weights"] = runs.get(told["model"]["weights"], told["model"]["weights"])
    if reference in made_here:  # a folder of `make_reference` ends in the digest of all that it was made from
        told["evolved_sampling"]["reference"]["folder"] = made_here[reference]
    elif reference is not None and Path(reference).is_dir():
        told["evolved_sampling"]["reference"]["folder"] = fingerprint_of(read_manifest(find_scores(Path(reference))))
    versions = {name: importlib.metadata.version(name) for name in ("es_megatron", "torch", "megatron-core")}
    return json.loads(json.dumps({"settings": told, "blend": blend.identity, "versions": versions}, default=str))


def scores_identity(path: Path) -> dict[str, Any]:
    """What makes saved scores what they are, wherever they stand: checksums of them, and the samples they belong to."""
    document = read_manifest(find_scores(path))
    blend = Manifest.from_json(document["data_manifest"])
    return {
        "scores": {name: entry["crc32"] for name, entry in document["tensors"].items() if not name.startswith("mask")},
        "samples": [[component.name, component.samples, component.fingerprint] for component in blend.components],
    }


def first_task(spec: Spec, case: str, arm: str) -> Task:
    """Any run of an arm, for what all of its runs have in common."""
    rate, decay = spec.given(case, arm) or Point(spec.learning_rates[0], spec.decays[0])
    return Task(case, arm, rate, [*spec.seeds, *spec.search_seeds][0], decay)


def check_arms(spec: Spec, blends: Mapping[str, CaseBlend]) -> None:
    """Refuse arms whose settings or files cannot be, before anything runs; `ConfigError` names the arm."""
    for case in spec.cases:
        for arm in spec.arms:
            task = first_task(spec, case, arm)
            try:
                settings = settings_of(spec, task, blends[case], Path())
                made = build(PretrainSettings, settings, f"arm {arm}")
                identity_of(settings, blends[case])
                if made.training.eval_samples < 1:
                    raise ConfigError(
                        "`training.eval_samples` must be >= 1, but is 0 instead: arms are compared by their validation "
                        "losses. Leave it out."
                    )
            except (ConfigError, CheckpointError) as error:
                raise (
                    error if f"arm {arm}" in str(error) else ConfigError(f"{spec.path}: arm {arm}: {error}")
                ) from error


def prepare_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the empty folder of a run that is about to start."""
    (folder / "summary.json").unlink(missing_ok=True)  # before the rest: a kill in between leaves no half-true folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def read_outcome(folder: Path, identity: Mapping[str, Any]) -> Outcome | None:
    """How the run in a folder ended; None if it did not, or was made with other settings or data."""
    try:
        if not same_run(json.loads((folder / "identity.json").read_text(encoding="utf-8")), identity):
            return None
        if (folder / "error.txt").exists():
            return Outcome({}, (folder / "error.txt").read_text(encoding="utf-8").strip())
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        return None
    return Outcome(summary) if summary["finished"] else None


def searched(spec: Spec, outcomes: Outcomes, case: str, arm: str) -> list[Task]:
    """The runs among which learning rate and weight decay are chosen, as far as they are known.

    On the first search seed all rates with the first weight decay, then the other decays with the best rate; on the
    other seeds its best points (`FINALISTS`), since those are told apart by less than a seed's luck.
    """
    if not spec.searches:
        return []
    first, *others = spec.search_seeds
    found = [Task(case, arm, rate, first, spec.decays[0]) for rate in spec.learning_rates]
    best = _best(outcomes, found)
    if best is not None:
        found += [Task(case, arm, best.rate, first, decay) for decay in spec.decays[1:]]
    if best is not None and all(task in outcomes for task in found):
        means = search_losses(outcomes, found)
        finalists = sorted(filter(lambda point: math.isfinite(means[point]), means), key=lambda point: means[point])
        found += [Task(case, arm, point.rate, seed, point.decay) for point in finalists[:FINALISTS] for seed in others]
    return found


def best_point(spec: Spec, outcomes: Outcomes, case: str, arm: str) -> Point | None:
    """The best mean loss over the search seeds; None while it is open, or if every point has failed."""
    return spec.given(case, arm) or _best(outcomes, searched(spec, outcomes, case, arm))


def search_losses(outcomes: Outcomes, tasks: Sequence[Task]) -> dict[Point, float]:
    """Mean loss by point, of those tasks that have ended."""
    found: dict[Point, list[float]] = {}
    for task in tasks:
        if task in outcomes:
            found.setdefault(task.point, []).append(outcomes[task].loss)
    return {point: math.fsum(losses) / len(losses) for point, losses in found.items()}


def _best(outcomes: Outcomes, tasks: Sequence[Task]) -> Point | None:
    """Of the points with the most seeds, the one with the best mean; one that failed or diverged cannot win."""
    if any(task not in outcomes for task in tasks):
        return None
    seeds = Counter(task.point for task in tasks)
    means = {point: mean for point, mean in search_losses(outcomes, tasks).items() if math.isfinite(mean)}
    return min(means, key=lambda point: (-seeds[point], means[point]), default=None)


def paired_tasks(spec: Spec, outcomes: Outcomes, case: str, arm: str) -> list[Task]:
    """The runs of an arm over the paired seeds; empty while its point is open."""
    point = best_point(spec, outcomes, case, arm)
    return [] if point is None else [Task(case, arm, point.rate, seed, point.decay) for seed in spec.seeds]


def open_tasks(spec: Spec, outcomes: Outcomes) -> list[Task]:
    """The runs that can start now, arm by arm: of each the search first, then the paired seeds at the best rate."""
    found: list[Task] = []
    for case in spec.cases:
        for arm in spec.arms:
            tasks = paired_tasks(spec, outcomes, case, arm) or searched(spec, outcomes, case, arm)
            found.extend(task for task in tasks if task not in outcomes)
    return found


def write_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Write a run's settings so that `es-megatron pretrain --config` can repeat it."""
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
