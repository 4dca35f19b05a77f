"""Specs of comparisons: what is read, and what is refused with which words."""

import argparse
import copy
from pathlib import Path

import pytest
import yaml

from es_megatron.bench.command import add_arguments, narrow
from es_megatron.bench.recipe import Recipe, Sources, identity
from es_megatron.bench.runs import CaseBlend, Task, check_arms, settings_of
from es_megatron.bench.spec import SHIPPED, Case, load_spec, read_spec
from es_megatron.errors import ConfigError
from es_megatron.resources import resource

MINIMAL = {
    "base": {"model": {"num_layers": 2}, "training": {"passes": 4}},
    "blends": {"clean": {"demo": True}},
    "arms": {"plain": {"evolved_sampling.arm": "plain"}, "es": {}},
    "references": ["plain"],
    "seeds": [1, 2],
    "search_seeds": [100],
    "learning_rates": ["4e-3", 1e-3],
}
PATH = Path("spec.yaml")
QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


def changed(**entries):
    return {**copy.deepcopy(MINIMAL), **entries}


def parser_of():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser


def test_a_minimal_spec():
    spec = read_spec(changed(), PATH)
    assert spec.learning_rates == (1e-3, 4e-3)
    assert spec.cases == {"clean": Case("clean", {})}
    assert spec.blends == {"clean": Recipe(demo=True)}
    assert (spec.final_rate, spec.jobs, spec.equal_cost) == (0.0, 1, ())
    assert spec.runs == 2 * (2 + 2)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"arm": {}}, "Unknown key `arm` in `spec.yaml`. Did you mean `arms`?"),
        ({"references": ["plane"]}, "has 'plane'. Did you mean `plain`?"),
        ({"equal_cost": "es"}, "`spec.yaml: equal_cost` must be a list of arms"),
        ({"seeds": [1, 100]}, "`spec.yaml: search_seeds` must differ from `seeds`"),
        (
            {"weight_decays": [0.1], "arms": {"plain": {"training.weight_decay": 0.5}}},
            "`training.weight_decay` must be left out of `spec.yaml: arms.plain`",
        ),
        ({"seeds": [0.5]}, "must be a list of whole numbers, but has 0.5"),
        ({"seeds": [], "learning_rates": [1e-3]}, "`spec.yaml: seeds` must be given with at least one entry"),
        ({"search_seeds": []}, "`spec.yaml: search_seeds` must be given with several `learning_rates`"),
        ({"learning_rates": ["fast"]}, "must be a list of numbers, but has 'fast'"),
        ({"learning_rates": [-1]}, "must be above 0"),
        ({"arms": {"es": {"keep_ratio": 0.5}}}, "`keep_ratio` in `spec.yaml: arms.es` must be of the form section.key"),
        ({"arms": {"es": {"training.seed": 5}}, "references": []}, "`training.seed` must be left out of"),
        ({"arms": {"es": {"training": {"seed": 5}}}, "references": []}, "`training.seed` must be left out of"),
        ({"arms": {"es": {"training.passes": 8}}, "references": []}, "`training.passes` must be left out of"),
        ({"arms": {"es": {"model": {"num_layers": 8}}}, "references": []}, "`model` must be left out of"),
        ({"base": {"training": {"lr": 1}}}, "`training.lr` must be left out of `spec.yaml: base`"),
        ({"cases": {"four": {"blend": "claen"}}}, "but is 'claen'. Did you mean `clean`?"),
        ({"blends": {"clean": {"demo": True, "vocabsize": 1}}}, "Unknown key `vocabsize`"),
        ({"blends": {"clean": {}}}, "Exactly one of `blend`, `demo`, `wikitext` and `components` must be given"),
        ({"blends": {"clean": {"demo": True, "damage": {"kinds": ["word"]}}}}, "Did you mean `words`?"),
        ({"blends": {"clean": {"demo": True, "duplicates": {"share": 1}}}}, r"`duplicates.share` must be in \(0, 1\)"),
        ({"jobs": 0}, "must be >= 1"),
        (
            {"reference_models": {"clean": {"text": "others"}}},
            r"text` must be one of same, apart, or a blend of this spec, but is 'others'",
        ),
        ({"reference_models": {"clean": {"setings": {}}}}, "Unknown key `setings`"),
        ({"blends": {"clean": {"demo": True, "set_aside": 1}}}, r"`set_aside` must be in \[0, 1\)"),
    ],
)
def test_bad_specs_name_the_key(entries, words):
    with pytest.raises(ConfigError, match=words):
        read_spec(changed(**entries), PATH)


def test_a_missing_part_is_named():
    content = changed()
    del content["base"]
    with pytest.raises(ConfigError, match="Key `base` is missing in"):
        read_spec(content, PATH)


def test_a_file_that_is_not_there_or_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="must be YAML"):
        load_spec(tmp_path / "bad.yaml")


def test_settings_are_base_case_arm_rate_and_seed_in_this_order():
    cases = {
        "long": {"blend": "clean", "overrides": {"training.passes": 10, "evolved_sampling.selection.keep_ratio": 0.5}}
    }
    arms = {"es": {"evolved_sampling.selection.keep_ratio": 0.25}}
    spec = read_spec(changed(cases=cases, arms=arms, references=[], final_rate=0.1), PATH)
    made = settings_of(spec, Task("long", "es", 4e-3, 7), CaseBlend(Path("b.yaml"), {}), Path("out"))
    assert made["training"] == {"passes": 10, "lr": 4e-3, "min_lr": 4e-4, "seed": 7}
    assert made["evolved_sampling"] == {"selection": {"keep_ratio": 0.25}, "seed": 7}
    assert made["model"] == {"num_layers": 2, "init_seed": 7}
    assert (made["data"]["blend"], made["run"]["directory"]) == ("b.yaml", "out")
    assert spec.base["model"] == {"num_layers": 2}  # untouched


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            {"evolved_sampling.keep_ration": 1},
            "Unknown key `keep_ration` in `spec.yaml: arm es.*Did you mean `selection.keep_ratio",
        ),
        ({"evolved_sampling.arm": "uniforn"}, "arm es: `arm` must be one of .* Did you mean `uniform`?"),
        ({"evolved_sampling.scores.initial": "/nowhere"}, "arm es: .*/nowhere"),
    ],
)
def test_an_arm_that_cannot_be_is_named_before_anything_runs(override, words):
    spec = read_spec(changed(arms={"es": override}, references=[]), PATH)
    with pytest.raises(ConfigError, match=words):
        check_arms(spec, {"clean": CaseBlend(Path("b.yaml"), {})})


def test_arms_without_validation_are_refused():
    spec = read_spec(changed(base={"training": {"passes": 4, "eval_samples": 0}}), PATH)
    with pytest.raises(ConfigError, match=r"arm plain: `training.eval_samples` must be >= 1"):
        check_arms(spec, {"clean": CaseBlend(Path("b.yaml"), {})})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "1", "100"], "`search_seeds` must differ|search_seeds` must differ from `seeds`"),
        (["--jobs", "-1"], "jobs` must be >= 1"),
    ],
)
def test_the_command_line_is_checked_like_the_file(words, told):
    arguments = parser_of().parse_args([str(PATH), *words])
    with pytest.raises(ConfigError, match=told):
        narrow(read_spec(changed(), PATH), arguments)


def test_seeds_of_the_command_line_count_once():
    arguments = parser_of().parse_args([str(PATH), "--seeds", "3", "3", "4"])
    assert narrow(read_spec(changed(), PATH), arguments).seeds == (3, 4)


@pytest.mark.parametrize(
    "path", [*sorted(QUALITY.glob("*.yaml")), resource("configs") / SHIPPED], ids=lambda path: path.stem
)
def test_the_specs_that_are_shipped_can_run(path):
    spec = load_spec(path)
    check_arms(spec, {case: CaseBlend(Path("blend.yaml"), {}) for case in spec.cases})
    assert spec.jobs == 2


def test_a_spec_adds_to_the_one_that_it_extends(tmp_path):
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(changed(), sort_keys=False))
    more = {"extends": "first.yaml", "arms": {"other": {}, "es": {"training.clip_grad": 0.5}}, "seeds": [7]}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(more))
    spec = load_spec(tmp_path / "second.yaml")
    assert list(spec.arms) == ["plain", "es", "other"]
    assert spec.arms["es"] == {"training.clip_grad": 0.5}
    assert (spec.seeds, spec.learning_rates) == ((7,), (1e-3, 4e-3))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({**more, "arms": {"other": {}, "es": None}}))
    assert list(load_spec(tmp_path / "second.yaml").arms) == ["plain", "other"]
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({"extends": "second.yaml"}))
    with pytest.raises(ConfigError, match="extends itself"):
        load_spec(tmp_path / "second.yaml")


def test_texts_are_found_in_the_folder_that_the_command_line_names(tmp_path):
    recipe = Recipe(components=("a={corpora}/a.jsonl",))
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text('{"text": "one"}\n')
    found = [Sources(corpora=tmp_path / folder).resolve(recipe) for folder in ("here", "there")]
    assert found[0].components == (f"a={tmp_path}/here/a.jsonl",)
    assert identity(found[0], None) == identity(found[1], None)
    (tmp_path / "there" / "a.jsonl").write_text('{"text": "two"}\n')
    assert identity(found[0], None) != identity(found[1], None)
    with pytest.raises(ConfigError, match=r"`--corpora DIR` must be given"):
        Sources().resolve(recipe)
