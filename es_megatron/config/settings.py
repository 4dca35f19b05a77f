"""All settings of Evolved Sampling, and the mappings that they are read from."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from es_megatron.config.fields import Spec, check_fields, require_choice
from es_megatron.config.groups import (
    Correction,
    GuardSettings,
    Mixture,
    OrderSettings,
    PruningSettings,
    ReferenceSettings,
    ScorerSettings,
    ScoreSettings,
    SelectionSettings,
)
from es_megatron.config.names import FLAT_NAMES, GROUPS, nested, settings_in
from es_megatron.config.reading import build
from es_megatron.errors import ConfigError

Arm = Literal["es", "plain", "uniform", "uniform-prune", "shortened", "shuffled"]
Preset = Literal["default", "paper"]

PRESETS: Mapping[Preset, Mapping[str, Mapping[str, Any]]] = {
    "default": {},
    "paper": {"scorer": {"kind": "fresh"}, "selection": {"keep_ratio": 0.25, "options": {}, "mixture": "free"}},
}
"""What differs from the fields' defaults: those are by the evidence of docs/results.md, `paper` is as published
(section 3.1)."""

PRESET_NAMES = ("scorer.kind", "selection.keep_ratio", "selection.options", "selection.mixture")
"""Settings whose default hangs on the preset."""

DEFAULT_OPTIONS: Mapping[str, Mapping[str, Any]] = {"es": {"power": 8}}
"""Options of policies for which none are given."""

MAX_SATURATION_WEIGHT = 1e-6


@dataclass(frozen=True)
class EvolvedSamplingConfig:
    """What Evolved Sampling does to a run; symbols are the paper's (arXiv 2509.23461)."""

    arm: Arm = "es"
    """`es`, or a control arm on the same code path: `plain` (train on everything), `uniform` (a random b of B, no
    scoring), `uniform-prune` (the same, and a random share of each epoch pruned), `shortened` (plain, cut to the cost
    of the `es` run), `shuffled` (placebo: weights permuted within the meta-batch, kept masks within the component)."""

    seed: Annotated[int, Spec("in [0, 2^63)")] = 1234
    """Seed of data order, pruning and selection, in [0, 2^63)."""

    selection: SelectionSettings = field(default_factory=SelectionSettings)
    """How a meta-batch is chosen from."""

    scorer: ScorerSettings = field(default_factory=ScorerSettings)
    """Where losses come from."""

    scores: ScoreSettings = field(default_factory=ScoreSettings)
    """How scores evolve, and where they are kept."""

    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    """Losses of a reference model."""

    pruning: PruningSettings = field(default_factory=PruningSettings)
    """What epochs leave out."""

    order: OrderSettings = field(default_factory=OrderSettings)
    """The order of the data."""

    guard: GuardSettings = field(default_factory=GuardSettings)
    """What to fall back to when selection does not pay."""

    def __post_init__(self) -> None:
        """Check what stands in no group, or in several."""
        check_fields(self)
        if self.scorer.kind == "external" and self.scores.initial is None and self.reference.folder is None:
            raise ConfigError(
                "`scores.initial` must be given with `scorer: external`, which chooses by them. Name a folder of "
                "scores, as `es-megatron scores import` makes one."
            )
        if self.reference.folder is not None and self.scores.correction == "paper":
            raise ConfigError(
                "`scores.correction` must be `debiased` with `reference`, since raw scores have their start value in "
                "them and a reference's losses have not, but is `paper` instead. Leave it out."
            )
        if self.correction == "debiased" and self.decay**255 >= MAX_SATURATION_WEIGHT:
            limit = MAX_SATURATION_WEIGHT ** (1 / 255)
            raise ConfigError(
                f"`scores.beta2` must be below {limit:.4f} with `correction: debiased`, but is {self.decay} instead: "
                "visits are counted up to 255 only. Use a smaller `beta2` or `correction: paper`."
            )

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any], where: str = "evolved_sampling", spell: Callable[[str], str] = str
    ) -> EvolvedSamplingConfig:
        """Read settings by group, or by the flat names they had before; `preset` says what is not given.

        Args:
            mapping: such as `{"preset": "paper", "pruning": {"ratio": 0.2}}`.
            where: names the source in errors.
            spell: how the source spells a setting's name.

        Raises:
            ConfigError: an unknown key, or a value that is out of range or of another type.
        """
        given = nested(mapping, where, spell)
        preset = given.pop("preset", "default")
        require_choice("preset", preset, Preset)
        for key in given.keys() - {each.name for each in dataclasses.fields(cls)}:
            raise ConfigError(f"Unknown key `{key}` in `{where}`. {_nearest(str(key))}")
        merged = {key: dict(value) for key, value in PRESETS[preset].items()}
        for key, value in given.items():
            known = merged.get(key)
            merged[key] = {**known, **value} if known is not None and isinstance(value, Mapping) else value
        return build(cls, merged, where)

    def to_mapping(self) -> dict[str, Any]:
        """What differs from the defaults or hangs on the preset, by group; `from_mapping` gives the same back."""
        found: dict[str, Any] = {}
        usual = type(self)()
        for setting in settings_in(type(self)):
            value = self.value(setting.name)
            if (setting.name in PRESET_NAMES and value is not None) or value != usual.value(setting.name):
                inside = found if len(setting.path) == 1 else found.setdefault(setting.path[0], {})
                inside[setting.path[-1]] = dict(value) if isinstance(value, Mapping) else value
        return found

    def value(self, name: str) -> Any:
        """A setting by its name, such as `selection.keep_ratio`; the policy's options with their default filled in."""
        if name == "selection.options":
            return self.policy_options
        group, dot, last = name.partition(".")
        return getattr(getattr(self, group), last) if dot else getattr(self, group)

    def replaced(self, values: Mapping[str, Any]) -> EvolvedSamplingConfig:
        """The same settings but for some, by name: `replaced({"order.mask_lag": 16})`."""
        config = self
        for name, value in values.items():
            group, dot, last = name.partition(".")
            inside = dataclasses.replace(getattr(config, group), **{last: value}) if dot else value
            config = dataclasses.replace(config, **{group: inside})
        return config

    @property
    def terms(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must have in common, JSON-able."""
        return {
            "arm": self.arm,
            "anneal": self.selection.anneal,
            "pruning_ratio": self.pruning.ratio,
            "keep_ratio": self.selection.keep_ratio,
            "seed": self.seed,
            "policy": self.selection.policy,
            "pruner": self.pruning.pruner,
            "correction": self.correction,
            "decay": self.decay,
            "policy_options": option_words(self.policy_options),
            "pruner_options": option_words(self.pruning.options),
        }

    @property
    def policy_options(self) -> Mapping[str, Any]:
        """`selection.options` with its default filled in."""
        given = self.selection.options
        return DEFAULT_OPTIONS.get(self.selection.policy, {}) if given is None else given

    @property
    def mixture(self) -> Mixture:
        """`selection.mixture` with its default filled in."""
        if self.selection.mixture is not None:
            return self.selection.mixture
        return "free" if self.selection.crosses_components else "kept"

    @property
    def decay(self) -> float:
        """`scores.beta2` with the paper's default filled in (section 3.1)."""
        if self.scores.beta2 is not None:
            return self.scores.beta2
        return 0.8 if self.pruning.ratio > 0 else 0.9

    @property
    def correction(self) -> Correction:
        """`scores.correction` with its default filled in."""
        if self.scores.correction is not None:
            return self.scores.correction
        raw = self.scorer.kind in ("fresh", "prefix") and self.reference.folder is None
        return "paper" if raw else "debiased"

    def filled_in(self) -> EvolvedSamplingConfig:
        """The same with every default that hangs on others written out."""
        values = {"scores.beta2": self.decay, "scores.correction": self.correction, "selection.mixture": self.mixture}
        return self.replaced({**values, "selection.options": dict(self.policy_options)})


def _nearest(key: str) -> str:
    names = {each: each for each in (*GROUPS, "preset")}
    names |= {setting.path[-1]: setting.name for setting in settings_in(EvolvedSamplingConfig)}
    names |= {flat: ".".join(path) for flat, path in FLAT_NAMES.items()}
    near = difflib.get_close_matches(key, names, n=1)
    return f"Did you mean `{names[near[0]]}`?" if near else f"Known keys: arm, seed, preset, {', '.join(GROUPS)}."


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Options as `name=value`, lists joined by `+`: as checkpoints and command lines have them."""

    def word(value: Any) -> str:
        if isinstance(value, list | tuple):
            return "+".join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    return [f"{name}={word(value)}" for name, value in options.items()]
