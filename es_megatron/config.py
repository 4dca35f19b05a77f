"""Settings of Evolved Sampling, checked once at construction, and the builder that reads settings from a mapping."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from es_megatron.errors import ConfigError

T = TypeVar("T")

TERMS = ("arm", "anneal", "pruning_ratio", "keep_ratio", "mask_lag", "seed", "policy", "pruner", "correction", "decay")
"""Fields, and derived values, that a checkpoint and the run that goes on from it must have in common."""

Arm = Literal["es", "plain", "uniform", "uniform-prune", "shortened", "shuffled"]
Scorer = Literal["fresh", "history", "every-k", "prefix", "external"]
Guard = Literal["off", "uniform", "plain"]
Preset = Literal["default", "paper"]
Granularity = Literal["sample", "microbatch"]
Correction = Literal["paper", "debiased"]

MAX_SATURATION_WEIGHT = 1e-6

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "default": {"scorer": "history", "keep_ratio": 0.5, "policy_options": ("power=8",)},
    "paper": {"scorer": "fresh", "keep_ratio": 0.25, "policy_options": ()},
}
"""What the fields are that are not given: by the evidence of docs/results.md, and as published (section 3.1)."""

BY_PRESET: Any = None
"""Stands for a default that `PRESETS` has."""


@dataclass(frozen=True)
class EvolvedSamplingConfig:
    """What Evolved Sampling does to a run; symbols are the paper's (arXiv 2509.23461)."""

    preset: Preset = "default"
    """Where `scorer`, `keep_ratio` and the options of policy `es` come from if they are not given: `default` (what paid
    for language models: free scores to the eighth power, half of each meta-batch; see docs/results.md) or `paper` (a
    fresh scoring pass, weights as they are, a quarter of it)."""

    arm: Arm = "es"
    """`es`, or a control arm on the same code path: `plain` (train on everything), `uniform` (a random b of B, no
    scoring), `uniform-prune` (the same, and a random share of each epoch pruned), `shortened` (plain, cut to the cost
    of the `es` run), `shuffled` (placebo: weights permuted within the meta-batch, kept masks within the component)."""

    policy: str = "es"
    """How a meta-batch is chosen from: `es`, `uniform`, `loss`, `order`, `big-loss`, `small-loss`, `grad-norm`,
    `adaboost`, `coreset-1`, `coreset-2`, `adaselection`, or the name of an entry point in `es_megatron.policies`."""

    policy_options: tuple[str, ...] = BY_PRESET
    """Options of the policy, each `option=value`, such as `power=2` (docs/policies.md has them)."""

    pruner: str = "eswp"
    """What epochs keep where `pruning_ratio` is above 0: `eswp`, `random`, `infobatch`, `ucb`, `kakurenbo`, or the name
    of an entry point in `es_megatron.pruners`."""

    pruner_options: tuple[str, ...] = ()
    """Options of the pruner, each `option=value`."""

    beta1: float = 0.2
    """Share of the old score in the sampling weight, in [0, 1] (beta_1 of eq. 2.5)."""

    beta2: float | None = None
    """Decay of the score, in [0, 1) (beta_2 of eq. 2.5). None: the paper's 0.9 without pruning, 0.8 with it."""

    keep_ratio: float = BY_PRESET
    """Share of the meta-batch that gets a backward pass, in (0, 1] (b/B). b must come out a multiple of micro-batch
    size times data-parallel size."""

    pruning_ratio: float = 0.0
    """Share of every component left out of each of its pruned epochs, in [0, 1) (r). 0 is ES, above it ESWP."""

    anneal: float = 0.05
    """Share of iterations at each end that train on the whole meta-batch, in [0, 0.5] (E_a / E)."""

    scorer: Scorer = BY_PRESET
    """Where losses come from: `fresh` (a forward pass over every meta-batch, the paper), `history` (no extra pass: the
    stored scores choose, training forwards update them), `every-k` (fresh on every `score_every`-th iteration, history
    between), `prefix` (a forward pass over the first `prefix_share` of each sequence's tokens), `external` (the
    `initial_scores` choose, and never change)."""

    score_every: int = 4
    """Period of the fresh passes of `every-k`, in iterations, >= 1."""

    prefix_share: float = 0.125
    """Share of a sequence's tokens that the `prefix` scorer reads, in (0, 1], rounded up to a multiple of 8 tokens."""

    selection_parts: int = 1
    """Parts of consecutive positions that a meta-batch is cut into, >= 1, to choose the same number from each: as if
    that many smaller meta-batches had filled one batch for the optimizer (AdaSelection, Algorithm 2)."""

    granularity: Granularity = "sample"
    """`sample` chooses sequences and packs them into new micro-batches; `microbatch` chooses whole groups of
    micro-batch-size consecutive positions by their mean weight."""

    scoring_micro_batch_size: int | None = None
    """Sequences in a micro-batch of the scoring pass, which needs no activations kept; None: the training size."""

    score_correction: Correction | None = None
    """`paper` uses scores as stored; `debiased` takes the start value 1/n out, (s - beta2^k/n) / (1 - beta2^k) after k
    visits, and counts unseen samples as the mean of those seen of their component (of all, if none is). None: `paper`
    for `fresh`, `debiased` where history chooses, since with raw scores what was never seen would hardly ever be
    chosen."""

    weight_floor: float = 0.0
    """Lower bound of a weight as a share of the mean weight, in [0, 1]; above 0 every sample stays reachable."""

    inclusion_weights: bool = False
    """Weight chosen losses by one over their inclusion probability, so that the gradient is unbiased."""

    mask_lag: int = 8
    """Iterations between the scores that decide an epoch's kept mask and its first draw, >= 1; at least what the data
    loader prefetches."""

    max_bad_losses: float = 0.1
    """Share of a meta-batch that may have a non-finite loss, in [0, 1], before the run stops."""

    budget: float | None = None
    """What the run may cost, as a share of the plain run's forward and backward work (backward = 2 forward), in (0, 1].
    `keep_ratio` is not read: as many sequences are chosen as reach it, and the run is cut to it; `plain` ignores it."""

    scoring_cost: float | None = None
    """What a scoring pass over a whole sequence costs in forward passes, where training on it costs 3, above 0; as
    measured, that is 3 * scoring / (forward + backward) seconds. `budget` and the guard count with it. None:
    1."""

    guard: Guard = "off"
    """What to fall back to when selection does not pay: `uniform` (no more scoring passes, and as many more sequences
    at random as they cost) or `plain` (whole meta-batches). Judged by the weights of `guard_window` iterations: they
    must be worth more than a scoring pass costs (Katharopoulos & Fleuret 2018)."""

    guard_window: int = 50
    """Selecting iterations before the guard may judge, and of its average, >= 1."""

    seed: int = 1234
    """Seed of data order, pruning and selection, in [0, 2^63)."""

    initial_scores: str | None = None
    """Folder of scores to begin with, from another run's checkpoint or made by `es-megatron scores import`; components
    are matched by name and fingerprint. Those whose samples nearly all have a score are pruned from epoch 0 on."""

    score_folder: str | None = None
    """Folder in which each rank maps its scores from an unnamed file (5 bytes a sample); None: in memory."""

    mask_folder: str | None = None
    """Node-local folder, such as `/dev/shm`, in which the ranks of a node share kept masks (1.15 bits a sample); None:
    each rank holds its own."""

    def __post_init__(self) -> None:
        """Fill in what the preset has, and check every field and their combinations."""
        require_choice("preset", self.preset, Preset)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is BY_PRESET:
                fitting = () if name == "policy_options" and self.policy != "es" else value
                object.__setattr__(self, name, fitting)  # the only place where a field is set: before anyone sees it
        require_choice("arm", self.arm, Arm)
        require_choice("scorer", self.scorer, Scorer)
        require_choice("granularity", self.granularity, Granularity)
        if self.score_correction is not None:
            require_choice("score_correction", self.score_correction, Correction)
        require(0 <= self.beta1 <= 1, "beta1", "in [0, 1]", self.beta1)
        require(self.beta2 is None or 0 <= self.beta2 < 1, "beta2", "in [0, 1)", self.beta2)
        require(0 < self.keep_ratio <= 1, "keep_ratio", "in (0, 1]", self.keep_ratio)
        require(0 <= self.pruning_ratio < 1, "pruning_ratio", "in [0, 1)", self.pruning_ratio)
        require(0 <= self.anneal <= 0.5, "anneal", "in [0, 0.5]", self.anneal)
        require(self.score_every >= 1, "score_every", ">= 1", self.score_every)
        require(0 < self.prefix_share <= 1, "prefix_share", "in (0, 1]", self.prefix_share)
        require(self.selection_parts >= 1, "selection_parts", ">= 1", self.selection_parts)
        require_choice("guard", self.guard, Guard)
        require(self.guard_window >= 1, "guard_window", ">= 1", self.guard_window)
        require(self.scoring_cost is None or self.scoring_cost > 0, "scoring_cost", "above 0", self.scoring_cost)
        require(self.budget is None or 0 < self.budget <= 1, "budget", "in (0, 1]", self.budget)
        require(
            self.scoring_micro_batch_size is None or self.scoring_micro_batch_size >= 1,
            "scoring_micro_batch_size",
            ">= 1",
            self.scoring_micro_batch_size,
        )
        require(0 <= self.weight_floor <= 1, "weight_floor", "in [0, 1]", self.weight_floor)
        require(self.mask_lag >= 1, "mask_lag", ">= 1", self.mask_lag)
        require(0 <= self.max_bad_losses <= 1, "max_bad_losses", "in [0, 1]", self.max_bad_losses)
        require(0 <= self.seed < 1 << 63, "seed", "in [0, 2^63)", self.seed)
        if self.granularity == "microbatch" and (self.inclusion_weights or self.selection_parts > 1):
            name = "inclusion_weights" if self.inclusion_weights else "selection_parts"
            raise ConfigError(
                f"`{name}` must be off with `granularity: microbatch`: it is about single sequences. "
                "Use `granularity: sample`."
            )
        if self.scorer == "external" and self.initial_scores is None:
            raise ConfigError(
                "`initial_scores` must be given with `scorer: external`, which chooses by them. Name a folder of "
                "scores, as `es-megatron scores import` makes one."
            )
        if self.correction == "debiased" and self.decay**255 >= MAX_SATURATION_WEIGHT:
            limit = MAX_SATURATION_WEIGHT ** (1 / 255)
            raise ConfigError(
                f"`beta2` must be below {limit:.4f} with `score_correction: debiased`, but is {self.decay} instead: "
                "visits are counted up to 255 only. Use a smaller `beta2` or `score_correction: paper`."
            )

    @property
    def terms(self) -> dict[str, Any]:
        """Settings that decide which samples come when and what saved state means, JSON-able."""
        return {
            "policy_options": list(self.policy_options),
            "pruner_options": list(self.pruner_options),
            **{name: getattr(self, name) for name in TERMS},
        }

    @property
    def decay(self) -> float:
        """beta2 with the paper's default filled in (section 3.1)."""
        if self.beta2 is not None:
            return self.beta2
        return 0.8 if self.pruning_ratio > 0 else 0.9

    @property
    def correction(self) -> Correction:
        """score_correction with its default filled in."""
        if self.score_correction is not None:
            return self.score_correction
        return "paper" if self.scorer in ("fresh", "prefix") else "debiased"


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise the usual `ConfigError` unless a setting keeps its rule."""
    if not holds:
        raise ConfigError(f"`{name}` must be {rule}, but is {value!r} instead.")


def require_choice(name: str, value: object, literal: Any) -> None:
    """Raise unless `value` is one of the strings of a `Literal`; names the nearest one."""
    choices = typing.get_args(literal)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r} instead.{hint}")


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Make a settings dataclass from a mapping, nested ones included.

    Args:
        cls: a dataclass.
        mapping: what was read from YAML or JSON.
        where: names the source in errors, such as `configs/demo.yaml`.

    Raises:
        ConfigError: unknown or missing key, or a value of another type; names key, source and the nearest key.
    """
    if not isinstance(mapping, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"`{where}` must be a mapping of settings, but is {mapping!r} instead.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls)) if field.init}
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known keys: {', '.join(fields)}."
            raise ConfigError(f"Unknown key `{key}` in `{where}`. {hint}")
    values = {key: convert(hints[key], value, f"{where}: {key}") for key, value in mapping.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in values:
            raise ConfigError(f"Key `{name}` is missing in `{where}`. Add it.")
    return cls(**values)


def convert(hint: Any, value: Any, where: str) -> Any:
    """Check a value read from YAML or JSON against a field's type; ints stand in for floats.

    Raises:
        ConfigError: the value is of another type.
    """
    if dataclasses.is_dataclass(hint):
        return build(cast(type[Any], hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return convert(next(argument for argument in arguments if argument is not type(None)), value, where)
    if origin is Literal:
        return value  # the dataclass itself names the choices
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"`{where}` must be a list, but is {value!r} instead.")
        items = [convert(arguments[0], item, where) for item in cast(list[Any], value)]
        return tuple(items) if origin is tuple else items
    if hint is float and isinstance(value, str):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"`{where}` must be of type {hint.__name__}, but is {value!r} instead.")
    return value
