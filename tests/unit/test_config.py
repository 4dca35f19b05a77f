"""Settings: defaults of the paper, every range, and errors that name the key and the cure."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.config import EvolvedSamplingConfig, build
from es_megatron.config.names import FLAT_NAMES, HEADS
from es_megatron.errors import ConfigError, EsError
from es_megatron.scoring import arm_of
from es_megatron.scoring.arms import prunes as prunes_epochs
from tests.es_config import es_config


def now(name: str) -> str:
    """What a setting of before is called by now."""
    return ".".join(FLAT_NAMES.get(name, (name, HEADS[name]) if name in HEADS else (name,)))


def test_presets_fill_in_what_is_not_given():
    default, paper = es_config(), es_config(preset="paper")
    assert (default.scorer.kind, default.selection.keep_ratio, default.correction) == ("history", 0.5, "debiased")
    assert (paper.scorer.kind, paper.selection.keep_ratio, paper.correction) == ("fresh", 0.25, "paper")
    given = es_config(preset="paper", scorer="prefix", keep_ratio=0.5)
    assert (given.scorer.kind, given.selection.keep_ratio) == ("prefix", 0.5)
    assert dataclasses.replace(paper, arm="uniform").selection.keep_ratio == 0.25
    with pytest.raises(ConfigError, match=r"`preset` must be one of default, paper, but is 'papr' .*`paper`"):
        es_config(preset="papr")  # pyright: ignore[reportArgumentType]


def test_the_preset_of_the_paper():
    config = es_config(preset="paper")
    assert (config.arm, config.scores.beta1, config.decay, config.selection.keep_ratio) == ("es", 0.2, 0.9, 0.25)
    assert (config.pruning.ratio, config.selection.anneal, config.scorer.kind) == (0.0, 0.05, "fresh")
    assert es_config(preset="paper", pruning_ratio=0.2).decay == 0.8
    assert es_config(preset="paper", pruning_ratio=0.2, beta2=0.9).decay == 0.9
    assert es_config(preset="paper", beta2=0.0).decay == 0.0


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("beta1", -0.01, "in [0, 1]"),
        ("beta1", 1.01, "in [0, 1]"),
        ("beta1", math.nan, "in [0, 1]"),
        ("beta2", 1.0, "in [0, 1)"),
        ("beta2", -0.1, "in [0, 1)"),
        ("beta2", math.nan, "in [0, 1)"),
        ("keep_ratio", 0.0, "in (0, 1]"),
        ("keep_ratio", 1.3, "in (0, 1]"),
        ("keep_ratio", math.nan, "in (0, 1]"),
        ("pruning_ratio", 1.0, "in [0, 1)"),
        ("pruning_ratio", -0.2, "in [0, 1)"),
        ("anneal", 0.51, "in [0, 0.5]"),
        ("anneal", -0.1, "in [0, 0.5]"),
        ("score_every", 0, ">= 1"),
        ("scoring_micro_batch_size", 0, ">= 1"),
        ("weight_floor", 1.1, "in [0, 1]"),
        ("weight_floor", -0.1, "in [0, 1]"),
        ("mask_lag", 0, ">= 1"),
        ("max_bad_losses", 1.5, "in [0, 1]"),
        ("max_bad_losses", -0.5, "in [0, 1]"),
        ("seed", -1, "in [0, 2^63)"),
        ("seed", 1 << 63, "in [0, 2^63)"),
    ],
)
def test_value_out_of_range_is_named_with_its_range(name, value, rule):
    with pytest.raises(ConfigError) as caught:
        es_config(preset="paper", **{name: value})
    assert str(caught.value) == f"`{now(name)}` must be {rule}, but is {value!r} instead."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta1", 0.0),
        ("beta1", 1.0),
        ("beta2", 0.0),
        ("beta2", 0.999),
        ("keep_ratio", 1.0),
        ("keep_ratio", 1e-9),
        ("pruning_ratio", 0.0),
        ("pruning_ratio", 0.999),
        ("anneal", 0.0),
        ("anneal", 0.5),
        ("score_every", 1),
        ("scoring_micro_batch_size", 1),
        ("weight_floor", 1.0),
        ("mask_lag", 1),
        ("max_bad_losses", 0.0),
        ("max_bad_losses", 1.0),
        ("seed", 0),
        ("seed", (1 << 63) - 1),
    ],
)
def test_ends_of_a_range_belong_to_it(name, value):
    assert es_config(preset="paper", **{name: value}).value(now(name)) == value


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("arm", "unifrom", "uniform"),
        ("scorer", "every_k", "every-k"),
        ("granularity", "micro-batch", "microbatch"),
        ("score_correction", "debias", "debiased"),
    ],
)
def test_unknown_choice_names_the_choices_and_the_nearest(name, value, near):
    with pytest.raises(ConfigError, match=rf"`{now(name)}` must be one of .*{near}.*Did you mean `{near}`\?"):
        es_config(preset="paper", **{name: value})
    with pytest.raises(ConfigError, match=r"but is 17 instead\.$"):
        es_config(preset="paper", **{name: 17})


def test_settings_that_cannot_work_together():
    with pytest.raises(ConfigError, match=r"`selection.inclusion_weights` must be off .* Use `granularity: sample`"):
        es_config(preset="paper", inclusion_weights=True, granularity="microbatch")
    with pytest.raises(ConfigError, match=r"`scores.initial` must be given with `scorer: external`"):
        es_config(preset="paper", scorer="external")
    with pytest.raises(ConfigError, match=r"`selection.parts` must be off with `granularity: microbatch`"):
        es_config(preset="paper", selection_parts=2, granularity="microbatch")
    assert es_config(preset="paper", inclusion_weights=True).selection.inclusion_weights


def test_debiasing_needs_visits_that_saturate_in_time():
    edge = 1e-6 ** (1 / 255)
    assert es_config(preset="paper", score_correction="debiased", beta2=edge - 1e-4).scores.beta2
    with pytest.raises(
        ConfigError, match=r"`scores.beta2` must be below 0\.9473 .* but is 0\.95 instead.*correction: paper"
    ):
        es_config(preset="paper", score_correction="debiased", beta2=0.95)
    assert es_config(preset="paper", score_correction="paper", beta2=0.95).scores.beta2 == 0.95


@pytest.mark.parametrize(
    ("arm", "scores", "selects", "prunes"),
    [
        ("es", True, True, True),
        ("shuffled", True, True, True),
        ("uniform", False, True, False),
        ("uniform-prune", False, True, True),
        ("plain", False, False, False),
        ("shortened", False, False, False),
    ],
)
def test_what_an_arm_does(arm, scores, selects, prunes):
    config = es_config(preset="paper", arm=arm, pruning_ratio=0.2)
    assert (arm_of(config).scores, arm_of(config).selects, prunes_epochs(config)) == (scores, selects, prunes)
    assert not prunes_epochs(es_config(preset="paper", arm=arm))


def test_config_cannot_be_changed_behind_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        es_config(preset="paper").scores.beta1 = 3.0  # type: ignore[misc]


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    path: Path = Path()
    tags: tuple[str, ...] = ()
    parts: tuple[Inner, ...] = ()
    on: bool = False
    maybe: Inner | None = None
    counts: list[int] = field(default_factory=list)


def test_nested_settings_are_built_and_converted():
    found = build(
        Outer,
        {
            "inner": {"size": 3, "rate": 1, "name": None},
            "path": "data/books",
            "tags": ["a", "b"],
            "parts": [{"size": 1}, {"size": 2, "rate": "1e-4"}],
            "on": True,
            "maybe": {"size": 9},
            "counts": [1, 2],
        },
        "x.yaml",
    )
    parts = (Inner(1), Inner(2, 1e-4))
    assert found == Outer(Inner(3, 1.0), Path("data/books"), ("a", "b"), parts, True, Inner(9), [1, 2])
    assert isinstance(found.inner.rate, float)
    assert isinstance(found.path, Path)
    assert build(Outer, {"inner": {"size": 1}, "maybe": None}, "x.yaml") == Outer(Inner(1))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"inner": {"size": 1}, "taggs": []}, "Unknown key `taggs` in `x.yaml`. Did you mean `tags`?"),
        (
            {"inner": {"size": 1}, "zzz": 1},
            "Unknown key `zzz` in `x.yaml`. Known keys: inner, path, tags, parts, on, maybe, counts.",
        ),
        ({"inner": {"sise": 1}}, "Unknown key `sise` in `x.yaml: inner`. Did you mean `size`?"),
        (
            {"inner": {"size": 1}, 5: 1},
            "Unknown key `5` in `x.yaml`. Known keys: inner, path, tags, parts, on, maybe, counts.",
        ),
        ({}, "Key `inner` is missing in `x.yaml`. Add it."),
        ({"inner": {}}, "Key `size` is missing in `x.yaml: inner`. Add it."),
        ({"inner": {"size": "3"}}, "`x.yaml: inner: size` must be of type int, but is '3' instead."),
        ({"inner": {"size": 3.0}}, "`x.yaml: inner: size` must be of type int, but is 3.0 instead."),
        ({"inner": {"size": True}}, "`x.yaml: inner: size` must be of type int, but is True instead."),
        ({"inner": {"size": None}}, "`x.yaml: inner: size` must be of type int, but is None instead."),
        ({"inner": {"size": 1, "rate": True}}, "`x.yaml: inner: rate` must be of type float, but is True instead."),
        ({"inner": {"size": 1, "rate": "fast"}}, "`x.yaml: inner: rate` must be of type float, but is 'fast' instead."),
        ({"inner": {"size": 1, "name": 4}}, "`x.yaml: inner: name` must be of type str, but is 4 instead."),
        ({"inner": 5}, "`x.yaml: inner` must be a mapping of settings, but is 5 instead."),
        ({"inner": {"size": 1}, "on": 1}, "`x.yaml: on` must be of type bool, but is 1 instead."),
        ({"inner": {"size": 1}, "on": "yes"}, "`x.yaml: on` must be of type bool, but is 'yes' instead."),
        ({"inner": {"size": 1}, "tags": "abc"}, "`x.yaml: tags` must be a list, but is 'abc' instead."),
        ({"inner": {"size": 1}, "tags": [1]}, "`x.yaml: tags` must be of type str, but is 1 instead."),
        (
            {"inner": {"size": 1}, "parts": [{"size": "1"}]},
            "`x.yaml: parts: size` must be of type int, but is '1' instead.",
        ),
        ({"inner": {"size": 1}, "path": 3}, "`x.yaml: path` must be of type Path, but is 3 instead."),
    ],
)
def test_key_or_type_that_is_wrong_is_named_with_its_source(mapping, message):
    with pytest.raises(ConfigError) as caught:
        build(Outer, mapping, "x.yaml")
    assert str(caught.value) == message
    assert isinstance(caught.value, EsError)


@pytest.mark.parametrize("source", [None, [], "text", 4])
def test_source_that_is_no_mapping_is_refused(source):
    with pytest.raises(ConfigError, match=r"`x\.yaml` must be a mapping of settings"):
        EvolvedSamplingConfig.from_mapping(source, "x.yaml")


def test_ranges_hold_through_the_builder_too():
    assert EvolvedSamplingConfig.from_mapping({"beta1": 0, "beta2": None, "arm": "plain"}, "c").scores.beta1 == 0.0
    with pytest.raises(ConfigError, match=r"`selection.keep_ratio` must be in \(0, 1\], but is 2.0 instead"):
        EvolvedSamplingConfig.from_mapping({"keep_ratio": 2}, "c")
    with pytest.raises(ConfigError, match="`arm` must be one of"):
        EvolvedSamplingConfig.from_mapping({"arm": "esx"}, "c")
    with pytest.raises(ConfigError, match=r"Unknown key `keep_ration` in `c`\. Did you mean `selection.keep_ratio`"):
        EvolvedSamplingConfig.from_mapping({"keep_ration": 0.5}, "c")


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)
NAMES = [entry.name for entry in dataclasses.fields(EvolvedSamplingConfig)] + list(FLAT_NAMES)


@settings(max_examples=300, deadline=None)
@given(mapping=st.dictionaries(st.sampled_from([*NAMES, "colour"]), VALUES, max_size=3))
def test_any_mapping_gives_a_config_of_the_declared_types_or_a_config_error(mapping):
    try:
        config = EvolvedSamplingConfig.from_mapping(mapping, "c")
    except ConfigError as error:
        assert str(error)  # noqa: PT017
        return
    assert "colour" not in mapping
    assert type(config.seed) is type(config.scorer.every) is type(config.guard.window) is int
    assert type(config.scores.beta1) is type(config.selection.keep_ratio) is type(config.selection.anneal) is float
    assert type(config.selection.inclusion_weights) is bool
    assert 0 < config.selection.keep_ratio <= 1
