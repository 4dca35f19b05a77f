"""The reference of settings: the page is not stale, the schema takes what the reader takes, every source is told."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Literal

import pytest
import yaml

from es_megatron.cli import main
from es_megatron.config import EvolvedSamplingConfig, build
from es_megatron.config.fields import Spec, check_fields, facts_of, limits_of
from es_megatron.config.hints import misspelt
from es_megatron.config.names import block_in, settings_in
from es_megatron.errors import ConfigError
from es_megatron.settings_page.entries import entries
from es_megatron.settings_page.page import page
from es_megatron.settings_page.schema import schema
from es_megatron.trainer.effective import effective, filled_in
from es_megatron.trainer.settings import PretrainSettings, apply_override, load_settings

ROOT = Path(__file__).parents[2]
RUNS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "compare")
MINIMAL = {"data": {"blend": "blend.yaml"}, "training": {"passes": 1}}


def problems(content, rules, where="settings"):
    """What a value breaks of the part of JSON schema that is used here."""
    if "anyOf" in rules:
        found = [problems(content, each, where) for each in rules["anyOf"]]
        return [] if [] in found else found[0]
    if "enum" in rules:
        return [] if content in rules["enum"] else [f"{where}: {content!r}"]
    kinds = rules["type"] if isinstance(rules["type"], list) else [rules["type"]]
    if kind_of(content) not in kinds and not (kind_of(content) == "integer" and "number" in kinds):
        return [f"{where}: {content!r} is no {kinds}"]
    if isinstance(content, dict) and "properties" in rules:
        found = [f"{where}: {key} is missing" for key in rules.get("required", ()) if key not in content]
        for key, value in content.items():
            known = key in rules["properties"]
            found += problems(value, rules["properties"][key], f"{where}.{key}") if known else [f"{where}.{key}"]
        return found
    broken = isinstance(content, int | float) and not (
        rules.get("minimum", content) <= content <= rules.get("maximum", content)
        and rules.get("exclusiveMinimum", content - 1) < content < rules.get("exclusiveMaximum", content + 1)
    )
    return [f"{where}: {content!r} is out of range"] if broken else []


def kind_of(value):
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", type(None): "null"}
    return names[type(value)]


def test_the_page_is_what_the_command_writes():
    path = ROOT / "docs" / "settings.md"
    assert path.read_text() == page(), "stale: es-megatron settings > docs/settings.md"


def test_every_setting_is_on_the_page_with_its_flag_and_a_text():
    found, told = entries(), page()
    ours = {f"evolved_sampling.{each.name}" for each in settings_in(EvolvedSamplingConfig)}
    theirs = {
        f"{section}.{name}"
        for section, fact in facts_of(PretrainSettings).items()
        if dataclasses.is_dataclass(fact.hint) and section != "evolved_sampling"
        for name in facts_of(fact.hint)
    }
    assert set(found) == ours | theirs | {"backend"}
    assert all(entry.help and f"### `{name}`" in told for name, entry in found.items())
    assert found["evolved_sampling.scorer.kind"].flag == "--es-scorer"
    assert found["training.lr"].flag is None


def test_presets_are_told_apart():
    entry = entries()["evolved_sampling.selection.keep_ratio"]
    assert (entry.default, entry.paper) == (0.5, 0.25)
    assert "Default: `0.5` (preset `paper`: `0.25`)." in page()


@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.fact.spec.limits])
def test_limits_on_the_page_are_those_that_are_held(name):
    entry = entries()[name]
    limits = limits_of(entry.fact.spec.limits)
    step = 1 if entry.fact.kind is int else 1e-9
    outside = [limits.low if limits.low_open else limits.low - step]
    if limits.high < float("inf"):
        outside.append(limits.high if limits.high_open else limits.high + step)
    for value in outside:
        mapping = yaml.safe_load(yaml.safe_dump(MINIMAL))
        if name == "training.train_samples":
            del mapping["training"]["passes"]
        apply_override(mapping, f"{name}={json.dumps(value)}")
        short = name.removeprefix("evolved_sampling.") if name.startswith("evolved_sampling.") else name.split(".")[1]
        with pytest.raises(ConfigError, match=rf"^`{short}` must be "):
            build(PretrainSettings, mapping, "test")
        assert problems(mapping, schema()), value


def test_defaults_keep_their_limits_and_numbers_with_a_dimension_have_a_unit():
    for name, entry in entries().items():
        if entry.fact.spec.limits and isinstance(entry.default, int | float):
            assert limits_of(entry.fact.spec.limits).hold(entry.default), name
        if entry.fact.kind in (int, float) and not name.endswith("seed"):
            assert entry.fact.spec.limits, name


def test_limits_that_cannot_be_read_are_an_error_of_the_code():
    with pytest.raises(ValueError, match="at most 3"):
        limits_of("at most 3")
    assert limits_of("in [0, 2^63)") == (0, 2**63, False, True)
    assert not limits_of(">= 0").hold(float("nan"))


def test_choices_are_held_and_none_is_let_pass():
    @dataclasses.dataclass
    class Some:
        how: typing.Literal["this", "that"] | None = None
        many: typing.Annotated[int | None, Spec(">= 1")] = None

    assert facts_of(Some)["how"].kind == Literal["this", "that"]
    check_fields(Some())
    with pytest.raises(ConfigError, match=r"`x\.how` must be one of this, that, but is 'thit'"):
        check_fields(Some("thit"), "x.")
    with pytest.raises(ConfigError, match=r"`many` must be >= 1, but is 0 instead"):
        check_fields(Some(many=0))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_shipped_settings_keep_to_the_schema(path):
    assert problems(yaml.safe_load(path.read_text()), schema()) == []


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("training.learning_rate=1", "settings.training.learning_rate"),
        ("training.lr=fast", "settings.training.lr"),
        ("model.normalization=Batch", "settings.model.normalization"),
        ("evolved_sampling.arm=none", "settings.evolved_sampling.arm"),
        ("evolved_sampling.guard.window=0", "settings.evolved_sampling.guard"),
        ("data.blend=null", "settings.data.blend"),
        ("extra=1", "settings.extra"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(override, where):
    mapping = yaml.safe_load(yaml.safe_dump(MINIMAL))
    assert problems(mapping, schema()) == []
    apply_override(mapping, override)
    assert [each for each in problems(mapping, schema()) if each.startswith(where)]
    with pytest.raises(ConfigError):
        build(PretrainSettings, mapping, "test")


@pytest.mark.parametrize("ours", [{"scorer": "history"}, {"keep_ratio": 0.25}, {"preset": "paper"}, {"guard": "plain"}])
def test_the_schema_takes_short_and_old_forms_as_the_reader_does(ours):
    mapping = {**MINIMAL, "evolved_sampling": ours}
    assert problems(mapping, schema()) == []
    build(PretrainSettings, mapping, "test")


def test_the_schema_names_what_must_be_given():
    assert problems({}, schema()) == ["settings: data is missing"]
    assert schema()["properties"]["data"]["required"] == ["blend"]


def test_every_value_is_printed_with_its_source_and_reads_back(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    ours = {"preset": "paper", "pruning_ratio": 0.2, "scorer": "every-k"}
    path.write_text(yaml.safe_dump({**MINIMAL, "evolved_sampling": ours}))
    overrides = ["training.lr=3e-4", "evolved_sampling.guard=plain", "model={num_layers: 2}"]
    assert main(["pretrain", "--config", str(path), "--print-config", *overrides]) == 0
    told = capsys.readouterr().out
    assert told == effective(path, overrides)
    lines = {line.strip() for line in told.splitlines()}
    assert {
        f"passes: 1.0  # {path}",
        "lr: 0.0003  # command line",
        "num_layers: 2  # command line",
        "num_attention_heads: 4  # command line",
        "num_query_groups: 4  # command line",
        "weight_decay: 0.1  # default",
        f"ratio: 0.2  # {path}",
        f'kind: "every-k"  # {path}',
        "keep_ratio: 0.25  # preset paper",
        "options: {}  # preset paper",
        'fallback: "plain"  # command line',
        "window: 50  # default",
        "beta2: 0.8  # follows from others",
    } <= lines
    again = tmp_path / "again.yaml"
    again.write_text(told)
    assert load_settings(again) == filled_in(load_settings(path, overrides))


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.learning_rate=1", "Did you mean `lr`?"),
        ("training.max-lr=1", "Did you mean `lr`?"),
        ("training.hidden_size=1", "Did you mean `model.hidden_size`?"),
        ("lr=1", "Did you mean `training.lr`?"),
        ("model.n_layer=1", "Did you mean `num_layers`?"),
        ("training.seq_len=1", "Did you mean `model.seq_length`?"),
        ("training.keep_ration=1", "Did you mean `evolved_sampling.selection.keep_ratio`?"),
        ("evolved_sampling.selection.ratio=1", "Did you mean `pruning.ratio`?"),
        ("evolved_sampling.keep_ration=1", "Did you mean `selection.keep_ratio`?"),
        ("run.seed=1", "Did you mean `training.seed` or `evolved_sampling.seed`?"),
        ("run.zzz=1", "Known keys: directory, save_interval"),
    ],
)
def test_a_near_miss_names_the_setting_that_is_meant(override, hint):
    mapping = yaml.safe_load(yaml.safe_dump(MINIMAL))
    apply_override(mapping, override)
    with pytest.raises(ConfigError) as raised:
        build(PretrainSettings, mapping, "test")
    assert hint in str(raised.value)


def test_a_misspelt_block_of_ours_is_not_passed_over():
    for key in ("evolved-sampling", "evolved_samplng", "Evolved_Sampling"):
        with pytest.raises(ConfigError, match=rf"`{key}` in `ds.json`. Did you mean `evolved_sampling`"):
            block_in({"train_batch_size": 8, key: {}}, "ds.json")
    assert block_in({"train_batch_size": 8}, "ds.json") is None
    assert block_in({"evolved_sampling": {"seed": 1}}, "ds.json") == {"seed": 1}
    assert misspelt({"sampling": 1}, "evolved_sampling") is None


def test_the_command_shows_some_settings_or_says_that_there_are_none(capsys):
    assert main(["settings", "keep_ratio", "training.lr", "learning_rate", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
    assert main(["settings", "keep_ratio", "learning_rate"]) == 0
    told = capsys.readouterr().out
    assert "### `evolved_sampling.selection.keep_ratio`" in told
    assert "### `training.lr`" in told
    assert told.count("###") == 2
    assert main(["settings", "training.learning_rat"]) == 2
    assert "no setting `training.learning_rat`. Did you mean `training.lr`?" in capsys.readouterr().err
