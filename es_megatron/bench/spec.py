"""What a comparison is told: a base run, blends, arms, seeds and learning rates, read from YAML and checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from es_megatron.bench.recipe import Recipe
from es_megatron.config import build, require, require_choice
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
    "equal_cost",
    "seeds",
    "search_seeds",
    "learning_rates",
    "final_rate",
    "jobs",
)
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

SHARED = ("model", "data", "training.passes", "training.train_samples", "training.global_batch_size")
"""Settings that decide what the plain run costs, so that no arm may have its own."""


@dataclass(frozen=True)
class Case:
    """One blend and the settings in which all arms are compared."""

    blend: str
    """Name of a blend of the spec."""

    overrides: Overrides
    """Settings over the base run, for all arms."""


@dataclass(frozen=True)
class ReferenceModel:
    """A small model whose losses arms may be given, by its name as `evolved_sampling.reference.folder`."""

    text: Literal["same", "apart"] = "apart"
    """Trained on the blend itself, or on the text that its recipe sets aside."""

    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """`section.key` values of its run, over those of `es-megatron reference train`."""

    def __post_init__(self) -> None:
        """Check the text."""
        require_choice("text", self.text, Literal["same", "apart"])


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

    references: tuple[str, ...]
    """Arms that the others are compared with. One of them may be `plain`, which `lossless` refers to."""

    equal_cost: tuple[str, ...]
    """Arms that claim the same cost; the first is the yardstick."""

    seeds: tuple[int, ...]
    """Paired seeds: each sets initial weights, data order and selection, the same for every arm."""

    search_seeds: tuple[int, ...]
    """Seeds of the search for a learning rate, apart from the paired ones."""

    learning_rates: tuple[float, ...]
    """Highest learning rates tried for every arm, ascending; one rate needs no search."""

    final_rate: float
    """Learning rate at a run's end as a share of the highest, in [0, 1]."""

    jobs: int
    """Runs at a time."""

    @property
    def searches(self) -> bool:
        """Whether learning rates are searched for."""
        return len(self.learning_rates) > 1

    @property
    def runs(self) -> int:
        """Runs of the whole comparison."""
        search = len(self.learning_rates) * len(self.search_seeds) if self.searches else 0
        return len(self.cases) * len(self.arms) * (search + len(self.seeds))


def load_spec(path: Path) -> Spec:
    """Read a spec.

    Raises:
        ConfigError: no such file, not YAML, or a key is unknown, missing, of another type or out of range.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Spec `{path}` cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Spec `{path}` must be YAML, but is not: {error}") from error
    return read_spec(content, path)


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
        references=_names(content.get("references", ()), arms, f"{path}: references"),
        equal_cost=_names(content.get("equal_cost", ()), arms, f"{path}: equal_cost"),
        seeds=_integers(content.get("seeds", []), f"{path}: seeds"),
        search_seeds=_integers(content.get("search_seeds", []), f"{path}: search_seeds"),
        learning_rates=tuple(sorted(_numbers(content.get("learning_rates", []), f"{path}: learning_rates"))),
        final_rate=_numbers([content.get("final_rate", 0.0)], f"{path}: final_rate")[0],
        jobs=_integers([content.get("jobs", 1)], f"{path}: jobs")[0],
    )
    check(spec)
    return spec


def check(spec: Spec) -> None:
    """Check what goes together; raises `ConfigError`."""
    where = spec.path
    for name in ("blends", "cases", "arms", "seeds", "learning_rates"):
        require(len(getattr(spec, name)) > 0, f"{where}: {name}", "given with at least one entry", getattr(spec, name))
    require(min(spec.seeds) >= 0, f"{where}: seeds", ">= 0", spec.seeds)
    require(spec.learning_rates[0] > 0, f"{where}: learning_rates", "above 0", spec.learning_rates)
    require(0 <= spec.final_rate <= 1, f"{where}: final_rate", "in [0, 1]", spec.final_rate)
    require(spec.jobs >= 1, f"{where}: jobs", ">= 1", spec.jobs)
    if spec.searches and not spec.search_seeds:
        raise ConfigError(f"`{where}: search_seeds` must be given with several `learning_rates`: add one seed.")
    both = sorted({*spec.seeds} & {*spec.search_seeds})
    if both:
        raise ConfigError(
            f"`{where}: search_seeds` must differ from `seeds`, but both have {both}: a rate chosen on a paired seed "
            "would fit that seed. Use others."
        )


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Take a mapping, None for an empty one; `ConfigError` if it is something else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"`{where}` must be a mapping, but is {value!r} instead.")
    return {str(key): entry for key, entry in cast(dict[Any, Any], value).items()}


def check_keys(content: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse an unknown key, naming the nearest one."""
    for key in content:
        if key not in known:
            raise ConfigError(f"Unknown key `{key}` in `{where}`. {nearest(key, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(known)}."


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
    check_keys(content, ("blend", "overrides"), where)
    blend = str(content.get("blend", next(iter(blends), "")))
    if blend not in blends:
        raise ConfigError(
            f"`{where}: blend` must name a blend of this spec, but is {blend!r}. {nearest(blend, blends)}"
        )
    return Case(blend, _overrides(content.get("overrides"), f"{where}: overrides"))


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


def _integers(value: Any, where: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _numbers(value, where, "whole numbers", whole=True))


def _numbers(value: Any, where: str, what: str = "numbers", *, whole: bool = False) -> tuple[float, ...]:
    """Numbers of a list, each once; YAML reads 1e-3 as a string."""
    if not isinstance(value, list):
        raise ConfigError(f"`{where}` must be a list of {what}, but is {value!r} instead.")
    numbers: list[float] = []
    for item in cast(list[Any], value):
        try:
            number = math.nan if isinstance(item, bool) else float(item)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ConfigError(f"`{where}` must be a list of {what}, but has {item!r}.")
        numbers.append(number)
    return tuple(dict.fromkeys(numbers))
