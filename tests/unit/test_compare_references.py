"""Reference models of comparisons: what they cost, when they are made, and when they are found."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from es_megatron.bench import reference_models
from es_megatron.bench.blends import apart_of, make_blend, text_like, tokenizer_of
from es_megatron.bench.recipe import Recipe
from es_megatron.bench.reference_models import forward_flops, make_reference, read_price
from es_megatron.bench.runs import CaseBlend, Task, identity_of, settings_of
from es_megatron.bench.spec import ReferenceModel, read_spec
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.blend_file import read_blend_file
from es_megatron.trainer.model_settings import ModelSettings
from tests.unit.test_compare_spec import PATH, changed

LENGTH = 16


@pytest.mark.parametrize(("queries", "swiglu"), [(4, False), (2, True)])
def test_operations_are_those_that_torch_counts(queries: int, swiglu: bool) -> None:
    """Of the same matrices in plain torch, without Megatron; scores of attention are causal, and cost half."""
    model = ModelSettings(
        num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=queries, seq_length=LENGTH, swiglu=swiglu
    )
    width, head, ffn, vocabulary = 32, 8, model.ffn_size, 100
    x = torch.zeros(LENGTH, width)
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            x @ torch.zeros(width, width + 2 * head * queries)  # queries, keys and values
            x @ torch.zeros(width, width)
            x @ torch.zeros(width, ffn * (2 if swiglu else 1))
            torch.zeros(LENGTH, ffn) @ torch.zeros(ffn, width)
            for _ in range(4):
                score = torch.zeros(LENGTH, head) @ torch.zeros(head, LENGTH)
                score @ torch.zeros(LENGTH, head)
        x @ torch.zeros(width, vocabulary)
    attention = 3 * 4 * 2 * 2 * LENGTH * LENGTH * head
    assert forward_flops(model, vocabulary) == counter.get_total_flops() - attention / 2


class Commands:
    """Stands in for the two commands, and writes what they leave behind."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.seen = code, list[list[str]]()

    def __call__(self, command: list[str], **_: Any) -> Any:
        arguments = command[4:]
        self.seen.append(arguments)
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "train":
            settings = {"model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": LENGTH}}
            settings |= {"training": {"passes": 1}, "data": {"blend": arguments[arguments.index("--train-blend") + 1]}}
            (output / "settings.yaml").write_text(json.dumps(settings))
            (output / "summary.json").write_text(json.dumps({"sequences_trained": 20, "seconds": {"step": 3.0}}))
        else:
            (output / "manifest.json").write_text(json.dumps({"samples": 50}))
        return subprocess.CompletedProcess(command, self.code, "", "es-megatron: error: no luck\n")


def blend_of(folder: Path, *, apart: bool) -> CaseBlend:
    file = folder / "made-1" / "blend.yaml"
    for each in (file, apart_of(file)) if apart else (file,):
        each.parent.mkdir(parents=True)
        each.write_text("vocab_size: 64\ncomponents: [{name: a, train: a}]\n")
    return CaseBlend(file, {"made": 1})


def test_a_reference_is_made_once_and_charged_for_training_and_scoring(tmp_path: Path, monkeypatch: Any) -> None:
    commands = Commands()
    monkeypatch.setattr(reference_models.subprocess, "run", commands)
    blend = blend_of(tmp_path, apart=True)
    model = ReferenceModel("apart", {"model.num_layers": 1})
    losses = make_reference("tiny", model, blend, LENGTH)
    train, score = commands.seen
    assert train[train.index("--train-blend") + 1] == str(apart_of(blend.file))
    assert train[-1] == "model.num_layers=1"
    assert score[score.index("--output") + 1] == str(losses)
    price = read_price(losses)
    settings = ModelSettings(num_layers=1, hidden_size=8, num_attention_heads=1, seq_length=LENGTH)
    assert price.flops == forward_flops(settings, 64) * (3 * 20 + 50)
    assert (price.seconds, price.rows) == (3.0, 50)
    assert make_reference("tiny", model, blend, LENGTH) == losses
    assert len(commands.seen) == 2
    other = make_reference("tiny", ReferenceModel("same", {"model.num_layers": 1}), blend, LENGTH)
    assert other != losses
    assert commands.seen[2][commands.seen[2].index("--train-blend") + 1] == str(blend.file)


def test_a_reference_of_another_text_is_another_one(tmp_path: Path, monkeypatch: Any) -> None:
    commands = Commands()
    monkeypatch.setattr(reference_models.subprocess, "run", commands)
    blend = blend_of(tmp_path, apart=False)
    files = [tmp_path / f"made-1-of-other-{number}" / "blend.yaml" for number in (1, 2)]
    for file in files:
        file.parent.mkdir()
        file.write_text(blend.file.read_text())
    made = [make_reference("tiny", ReferenceModel("other"), blend, LENGTH, lambda file=file: file) for file in files]
    assert made[0] != made[1]
    trained = [each[each.index("--train-blend") + 1] for each in commands.seen if each[0] == "train"]
    assert trained == [str(file) for file in files]


def test_text_of_a_recipe_in_the_tokens_of_another_blend(tmp_path: Path) -> None:
    words = [f"the {number}th document says {number * number} and no more\n" for number in range(40)]
    for name in ("one", "other"):
        lines = [json.dumps({"text": f"{name} {word}"}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    sizes: dict[str, Any] = {"vocab_size": 300, "validation_share": 0.2}
    one, other = (Recipe(components=(f"a={tmp_path}/{name}.jsonl",), **sizes) for name in ("one", "other"))
    blend = make_blend("one", one, tmp_path / "data", None)
    text = text_like("other", other, blend.file, tmp_path / "data", None)
    assert text == text_like("other", other, blend.file, tmp_path / "data", None)
    assert tokenizer_of(text).read_bytes() == tokenizer_of(blend.file).read_bytes()
    assert [entry.validation for entry in read_blend_file(text).components] == [None]
    with pytest.raises(ConfigError, match="Blend `there` is prepared already"):
        text_like("there", Recipe(blend=blend.file), blend.file, tmp_path / "data", None)


def test_runs_begin_with_the_weights_of_a_reference_model(tmp_path: Path) -> None:
    cases = {"clean": {"blend": "clean", "overrides": {"model.weights": "taught"}}}
    spec = read_spec(changed(reference_models={"taught": {"text": "clean"}}, cases=cases, references=[]), PATH)
    arm, losses = next(iter(spec.arms)), tmp_path / "made-taught-abc" / "losses"
    blend = CaseBlend(tmp_path / "blend.yaml", {}, {"taught": losses}, {"taught": 0.1})
    made = settings_of(spec, Task("clean", arm, 1e-3, 1), blend, tmp_path)
    assert made["model"]["weights"] == str(tmp_path / "made-taught-abc" / "run")
    assert identity_of(made, blend)["settings"]["model"]["weights"] == "abc"
    with pytest.raises(ConfigError, match=r"taught.text` must be one of same, apart, or a blend of this spec"):
        read_spec(changed(reference_models={"taught": {"text": "claen"}}), PATH)


def test_a_reference_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    blend = blend_of(tmp_path, apart=False)
    with pytest.raises(ConfigError, match="Reference model `tiny` must have text of its own"):
        make_reference("tiny", ReferenceModel(), blend, LENGTH)
    monkeypatch.setattr(reference_models.subprocess, "run", Commands(code=2))
    with pytest.raises(DataError, match="`es-megatron reference train` failed: es-megatron: error: no luck"):
        make_reference("tiny", ReferenceModel("same"), blend, LENGTH)


def test_a_budget_is_what_a_runs_share_of_the_price_leaves(tmp_path: Path) -> None:
    entries = {
        "reference_models": {"tiny": {}},
        "arms": {"es": {"evolved_sampling.selection.budget": 0.6, "evolved_sampling.reference.folder": "tiny"}},
        "references": [],
    }
    blend = CaseBlend(tmp_path / "blend.yaml", {}, {"tiny": tmp_path / "made" / "losses"}, {"tiny": 0.12})
    for runs, budget in ((0, 0.6), (1, 0.48), (10, 0.588)):
        spec = read_spec(changed(**entries, reference_runs=runs), PATH)
        made = settings_of(spec, Task("clean", "es", 1e-3, 1), blend, tmp_path)
        assert made["evolved_sampling"]["selection"]["budget"] == budget
    dear = CaseBlend(blend.file, {}, blend.references, {"tiny": 0.7})
    with pytest.raises(ConfigError, match="arm es: reference `tiny` costs more than the budget leaves"):
        settings_of(read_spec(changed(**entries, reference_runs=1), PATH), Task("clean", "es", 1e-3, 1), dear, tmp_path)


def test_a_reference_counts_by_what_it_was_made_from_wherever_it_stands(tmp_path: Path) -> None:
    arms = {"es": {"evolved_sampling.reference.folder": "tiny", "evolved_sampling.selection.policy": "reducible"}}
    spec = read_spec(changed(reference_models={"tiny": {}}, arms=arms, references=[]), PATH)
    found: list[Any] = []
    for folder in ("here/clean-tiny-0a1b", "there/clean-tiny-0a1b", "here/clean-tiny-2c3d"):
        blend = CaseBlend(tmp_path / "blend.yaml", {}, {"tiny": tmp_path / folder / "losses"})
        found.append(identity_of(settings_of(spec, Task("clean", "es", 1e-3, 1), blend, tmp_path), blend))
    assert found[0] == found[1] != found[2]
