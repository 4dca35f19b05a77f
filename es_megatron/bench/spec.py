"""What a comparison is told: a base run, blends, arms, seeds and learning rates, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from es_megatron.bench.entries import check_keys, integers, mapping, nearest, numbers
from es_megatron.bench.rates import Point, read_rates
from es_megatron.bench.recipe import Recipe
from es_megatron.config import build, require
from es_megatron.config.names import grouped, override_path
from es_megatron.errors import ConfigError

Overrides = Mapping[str, Any]
"""Values by `section.key`."""

KEYS = (
    "base",
    "blends",
    "cases",
    "arms",
    "references",
    "reference_models",
    "reference_runs",
    "equal_cost",
    "seeds",
    "search_seeds",
    "learning_rates",
    "weight_decays",
    "rates",
    "rates_like",
    "final_rate",
    "jobs",
)
FINALISTS = 2
"""Points that a search tries on more than its first seed."""
SHIPPED = Path("compare") / "demo.yaml"
"""The spec of the demo, below the shipped `configs`."""

MERGED = ("blends", "arms", "reference_models", "rates_like")
"""Mappings to which a spec adds entries of its own where it extends another, or takes entries out with null."""

OWN = (
    "training.lr",
    "training.min_lr",
    "training.seed",
    "model.init_seed",
    "evolved_sampling.seed",
    "data.blend",
    "run",
)
"""Settings that a comparison makes itself, for every arm alike."""

DECAY = "training.weight_decay"

TEXTS = ("same", "apart")
"""What a reference model is trained on, beside the blends of a spec."""

SHARED = ("model", "data", "training.passes", "training.train_samples", "training.global_batch_size")
"""Settings that decide what the plain run costs, so that no arm may have its own."""


@dataclass(frozen=True)
class Case:
    """One blend and the settings in which all arms are compared."""

    blend: str
    """Name of a blend of the spec."""

    overrides: Overrides
    """Settings over the base run, for all arms."""

    like: str | None = None
    """Case of the file `rates` whose learning rates and weight decays the arms take here."""


@dataclass(frozen=True)
class ReferenceModel:
    """A model that is trained first.

    Arms that name it as `evolved_sampling.reference.folder` are given its losses, runs that name it as `model.weights`
    its weights.
    """

    text: str = "apart"
    """Trained on the blend itself (`same`), on the text that its recipe sets aside (`apart`), or on that of another
    blend of the spec, by its name."""

    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """`section.key` values of its run, over those of `es-megatron reference train`."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A whole comparison."""

    path: Path
    """Where it was read from."""

    base: Mapping[str, Any]
    """Sections of `PretrainSettings` that all runs share."""

    blends: Mapping[str, Recipe]
    """How the data is made."""

    cases: Mapping[str, Case]
    """By name; in the file they may be left out, then every blend is one."""

    arms: Mapping[str, Overrides]
    """What each arm changes."""

    reference_models: Mapping[str, ReferenceModel]
    """By name."""

    reference_runs: int
    """Runs that share a reference: the budget of an arm with one is what its share of the price leaves; 0: the price is
    told, and not taken off."""

    references: tuple[str, ...]
    """Arms that the others are compared with. One of them may be `plain`, which `lossless` refers to."""

    equal_cost: tuple[str, ...]
    """Arms that claim the same cost; the first is the yardstick."""

    seeds: tuple[int, ...]
    """Paired seeds: each sets initial weights, data order and selection, the same for every arm."""

    search_seeds: tuple[int, ...]
    """Seeds of the search for a learning rate, apart from the paired ones; the first tries the whole grid."""

    learning_rates: tuple[float, ...]
    """Highest learning rates tried for every arm, ascending, with the first weight decay."""

    weight_decays: tuple[float, ...]
    """Weight decays tried for every arm, the others with its best learning rate; empty: that of the settings."""

    rates: Mapping[str, Mapping[str, Point]]
    """What an earlier search has found, by its case and arm; then nothing is searched."""

    rates_like: Mapping[str, str]
    """Arm of the search whose point an arm takes, where it is not its own."""

    final_rate: float
    """Learning rate at a run's end as a share of the highest, in [0, 1]."""

    jobs: int
    """Runs at a time."""

    @property
    def decays(self) -> tuple[float | None, ...]:
        """Weight decays tried; None is that of the settings."""
        return self.weight_decays or (None,)

    @property
    def searches(self) -> bool:
        """Whether learning rates and weight decays are searched for."""
        return not self.rates and len(self.learning_rates) + len(self.decays) > 2

    @property
    def runs(self) -> int:
        """Runs of the whole comparison."""
        tried = len(self.learning_rates) + len(self.decays) - 1
        search = tried + min(FINALISTS, tried) * (len(self.search_seeds) - 1) if self.searches else 0
        return len(self.cases) * len(self.arms) * (search + len(self.seeds))

    def given(self, case: str, arm: str) -> Point | None:
        """What an arm runs with in a case where nothing is searched; None where it is."""
        if self.searches:
            return None
        if not self.rates:
            return Point(self.learning_rates[0], self.decays[0])
        return self.rates[self.cases[case].like or case][self.rates_like.get(arm, arm)]


def load_spec(path: Path) -> Spec:
    """Read a spec, over the one that it `extends`.

    Entries of mappings are added to its, those that are null are taken out of it, anything else is replaced.

    Raises:
        ConfigError: no such file, not YAML, or a key is unknown, missing, of another type or out of range.
    """
    return read_spec(_load(path, ()), path)


def _load(path: Path, before: tuple[Path, ...]) -> dict[str, Any]:
    if path in before:
        raise ConfigError(f"Spec `{path}` extends itself. Remove its `extends`.")
    try:
        content = mapping(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ConfigError(f"Spec `{path}` cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Spec `{path}` must be YAML, but is not: {error}") from error
    if "extends" not in content:
        return content
    extended = _load(path.parent / str(content.pop("extends")), (*before, path))
    for key in MERGED:
        if key in extended and key in content:
            entries = {**extended[key], **mapping(content[key], f"{path}: {key}")}
            content[key] = {name: entry for name, entry in entries.items() if entry is not None}
    return {**extended, **content}


def read_spec(content: Any, path: Path) -> Spec:
    """Check what was read from `path`; see `load_spec`."""
    content = mapping(content, str(path))
    check_keys(content, KEYS, str(path))
    blends = {name: _recipe(entry, f"{path}: blends.{name}") for name, entry in _part(content, "blends", path).items()}
    arms = {name: _arm(entry, f"{path}: arms.{name}") for name, entry in _part(content, "arms", path).items()}
    cases = {name: Case(name, {}) for name in blends}
    if "cases" in content:
        entries = mapping(content["cases"], f"{path}: cases")
        cases = {name: _case(entry, blends, f"{path}: cases.{name}") for name, entry in entries.items()}
    entries = mapping(content.get("reference_models"), f"{path}: reference_models")
    models = {name: _reference_model(entry, f"{path}: reference_models.{name}") for name, entry in entries.items()}
    spec = Spec(
        path=path,
        base=_base(_part(content, "base", path), f"{path}: base"),
        blends=blends,
        cases=cases,
        arms=arms,
        reference_models=models,
        reference_runs=integers([content.get("reference_runs", 0)], f"{path}: reference_runs")[0],
        references=_names(content.get("references", ()), arms, f"{path}: references"),
        equal_cost=_names(content.get("equal_cost", ()), arms, f"{path}: equal_cost"),
        seeds=integers(content.get("seeds", []), f"{path}: seeds"),
        search_seeds=integers(content.get("search_seeds", []), f"{path}: search_seeds"),
        learning_rates=tuple(sorted(numbers(content.get("learning_rates", []), f"{path}: learning_rates"))),
        weight_decays=numbers(content.get("weight_decays", []), f"{path}: weight_decays"),
        rates=read_rates(path.parent / str(content["rates"])) if "rates" in content else {},
        rates_like={
            arm: str(other) for arm, other in mapping(content.get("rates_like"), f"{path}: rates_like").items()
        },
        final_rate=numbers([content.get("final_rate", 0.0)], f"{path}: final_rate")[0],
        jobs=integers([content.get("jobs", 1)], f"{path}: jobs")[0],
    )
    check(spec)
    return spec


def check(spec: Spec) -> None:
    """Check what goes together; raises `ConfigError`."""
    where = spec.path
    needed = ("blends", "cases", "arms", *(() if spec.searches else ("seeds",)))
    for name in (*needed, *(() if spec.rates else ("learning_rates",))):
        require(len(getattr(spec, name)) > 0, f"{where}: {name}", "given with at least one entry", getattr(spec, name))
    require(min(spec.seeds, default=0) >= 0, f"{where}: seeds", ">= 0", spec.seeds)
    require(min(spec.learning_rates, default=1) > 0, f"{where}: learning_rates", "above 0", spec.learning_rates)
    require(min(spec.weight_decays, default=0) >= 0, f"{where}: weight_decays", ">= 0", spec.weight_decays)
    _check_rates(spec)
    for name, model in spec.reference_models.items():
        if model.text not in (*TEXTS, *spec.blends):
            raise ConfigError(
                f"`{where}: reference_models.{name}.text` must be one of {', '.join(TEXTS)}, or a blend of this spec, "
                f"but is {model.text!r} instead. {nearest(model.text, [*TEXTS, *spec.blends])}"
            )
    require(0 <= spec.final_rate <= 1, f"{where}: final_rate", "in [0, 1]", spec.final_rate)
    require(spec.reference_runs >= 0, f"{where}: reference_runs", ">= 0", spec.reference_runs)
    require(spec.jobs >= 1, f"{where}: jobs", ">= 1", spec.jobs)
    for arm, overrides in spec.arms.items():
        if DECAY in overrides and (spec.weight_decays or spec.rates):
            raise ConfigError(
                f"`{DECAY}` must be left out of `{where}: arms.{arm}`: `weight_decays` or `rates` say what it is."
            )
    if spec.searches and not spec.search_seeds:
        raise ConfigError(
            f"`{where}: search_seeds` must be given with several `learning_rates` or `weight_decays`: add one seed."
        )
    both = sorted({*spec.seeds} & {*spec.search_seeds})
    if both:
        raise ConfigError(
            f"`{where}: search_seeds` must differ from `seeds`, but both have {both}: a rate chosen on a paired seed "
            "would fit that seed. Use others."
        )


def _check_rates(spec: Spec) -> None:
    """Every arm of every case has a point in the file of an earlier search, where one is given."""
    where = spec.path
    for arm, other in spec.rates_like.items():
        if arm not in spec.arms or not spec.rates:
            raise ConfigError(
                f"`{where}: rates_like` must name arms of this spec and go with `rates`, but has {arm!r}."
            )
        if all(other not in arms for arms in spec.rates.values()):
            raise ConfigError(f"`{where}: rates_like.{arm}` must name an arm of the search, but is {other!r}.")
    if not spec.rates:
        return
    if spec.learning_rates or spec.weight_decays or spec.search_seeds:
        raise ConfigError(
            f"`{where}: rates` takes the place of a search: leave the rates, decays and search seeds out."
        )
    for name, case in spec.cases.items():
        like = case.like or name
        if like not in spec.rates:
            raise ConfigError(f"`{where}: cases.{name}.like` must name a case of `rates`. {nearest(like, spec.rates)}")
        for arm in spec.arms:
            if spec.rates_like.get(arm, arm) not in spec.rates[like]:
                raise ConfigError(
                    f"`{where}: rates` has nothing for arm {arm!r} in case {like!r}: name an arm to take them from in "
                    "`rates_like`, or search it, too."
                )


def _part(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    if key not in content:
        raise ConfigError(f"Key `{key}` is missing in `{path}`. Add it.")
    return mapping(content[key], f"{path}: {key}")


def _recipe(entry: Any, where: str) -> Recipe:
    return build(Recipe, mapping(entry, where), where)


def _reference_model(entry: Any, where: str) -> ReferenceModel:
    return build(ReferenceModel, mapping(entry, where), where)


def _case(entry: Any, blends: Mapping[str, Recipe], where: str) -> Case:
    content = mapping(entry, where)
    check_keys(content, ("blend", "overrides", "like"), where)
    blend = str(content.get("blend", next(iter(blends), "")))
    if blend not in blends:
        raise ConfigError(
            f"`{where}: blend` must name a blend of this spec, but is {blend!r}. {nearest(blend, blends)}"
        )
    like = content.get("like")
    return Case(blend, _overrides(content.get("overrides"), f"{where}: overrides"), None if like is None else str(like))


def _overrides(entry: Any, where: str) -> Overrides:
    content = mapping(entry, where)
    for key in content:
        if "." not in key and not isinstance(content[key], dict):
            raise ConfigError(f"`{key}` in `{where}` must be of the form section.key, such as evolved_sampling.arm.")
        for each in _keys(content, key):
            _refuse_own(each, where)
    return {".".join(override_path(key, value, where)): value for key, value in grouped(content, where).items()}


def _arm(entry: Any, where: str) -> Overrides:
    content = _overrides(entry, where)
    for key in (each for own in content for each in _keys(content, own)):
        if any(key == shared or key.startswith(f"{shared}.") for shared in SHARED):
            raise ConfigError(
                f"`{key}` must be left out of `{where}`: costs are shares of one plain run, so arms share it. "
                "Put it into `base`, or into the `overrides` of a case."
            )
    return content


def _keys(content: Mapping[str, Any], key: str) -> list[str]:
    """A key of overrides, and those inside of it where its value is a section."""
    inner = content[key]
    return [key, *(f"{key}.{name}" for name in cast(dict[Any, Any], inner))] if isinstance(inner, dict) else [key]


def _base(content: dict[str, Any], where: str) -> dict[str, Any]:
    for section, entry in content.items():
        _refuse_own(section, where)
        for key in mapping(entry, f"{where}.{section}") if isinstance(entry, dict) else ():
            _refuse_own(f"{section}.{key}", where)
    return grouped(content, where)


def _refuse_own(key: str, where: str) -> None:
    if key in OWN or key.startswith("run."):
        raise ConfigError(
            f"`{key}` must be left out of `{where}`: a comparison sets it itself, from `seeds`, `learning_rates`, "
            "`final_rate` and `blends`."
        )


def _names(value: Any, arms: Mapping[str, Overrides], where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"`{where}` must be a list of arms, but is {value!r} instead.")
    names = tuple(str(name) for name in cast(list[Any], value))
    for name in names:
        if name not in arms:
            raise ConfigError(f"`{where}` must name arms of this spec, but has {name!r}. {nearest(name, arms)}")
    return names
