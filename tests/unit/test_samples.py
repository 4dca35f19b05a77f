"""Samples in the spellings that people have, what is told of those that are none, and datasets of one's own."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from es_megatron import ConfigError, DataError, EvolvedSamplingConfig, Manifest, blend_of, plan_run
from es_megatron.data.manifest import Component
from es_megatron.frameworks.samples import IGNORED, MicroBatch, Samples, checked_losses, completed

T = 6
TOKENS = [5, 3, 8, 2, 9, 4]
NEXT = [3, 8, 2, 9, 4, 7]


def listed(sample: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in sample.items()}


def test_a_whole_sample_stays_as_it_is() -> None:
    given = {
        "tokens": torch.tensor(TOKENS),
        "labels": torch.tensor(NEXT),
        "loss_mask": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 1.0]),
        "position_ids": torch.tensor([0, 1, 2, 0, 1, 2]),
    }
    assert listed(completed(given, T, "row 0")) == listed(given)


def test_lists_arrays_other_names_and_missing_positions_are_understood() -> None:
    given = {"input_ids": np.asarray(TOKENS, np.int32), "labels": [3, IGNORED, 2, 9, 4, 7], "text": "hello", "n": 6}
    found = completed(given, T, "row 0")
    assert listed(found) == {
        "tokens": TOKENS,
        "labels": [3, IGNORED, 2, 9, 4, 7],
        "loss_mask": [1, 0, 1, 1, 1, 1],
        "position_ids": [0, 1, 2, 3, 4, 5],
    }
    assert found["tokens"].dtype == found["labels"].dtype == torch.int64


def test_a_label_of_minus_100_counts_for_nothing_whatever_the_mask_says() -> None:
    given = {"tokens": TOKENS, "labels": [IGNORED, *NEXT[1:]], "loss_mask": [1.0, 0.5, 1.0, 1.0, 0.0, 1.0]}
    assert completed(given, T, "row 0")["loss_mask"].tolist() == [0.0, 0.5, 1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({}, [3, 8, 2, 9, 4, IGNORED]),
        ({"labels": [IGNORED, IGNORED, 8, 2, 9, 4]}, [IGNORED, 8, 2, 9, 4, IGNORED]),
        ({"attention_mask": [1, 1, 1, 1, 0, 0]}, [3, 8, 2, IGNORED, IGNORED, IGNORED]),
    ],
    ids=["none", "given", "padded"],
)
def test_labels_of_hugging_face_are_shifted(more: dict[str, Any], labels: list[int]) -> None:
    found = completed({"input_ids": TOKENS, **more}, T, "row 0", shift_labels=True)
    assert found["labels"].tolist() == labels
    assert found["loss_mask"].tolist() == [float(label != IGNORED) for label in labels]


def test_a_short_sample_is_padded_with_what_counts_for_nothing() -> None:
    found = completed({"tokens": TOKENS[:4], "labels": NEXT[:4], "attention_mask": [1, 1, 1, 1]}, T, "row 0")
    assert listed(found) == {
        "tokens": [*TOKENS[:4], 0, 0],
        "labels": [*NEXT[:4], IGNORED, IGNORED],
        "attention_mask": [1, 1, 1, 1, 0, 0],
        "loss_mask": [1, 1, 1, 1, 0, 0],
        "position_ids": [0, 1, 2, 3, 0, 0],
    }


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": "hello"}, r"row 7 has \[\] and no `tokens`.*`labels\[t\]` is the token after"),
        ({"input_ids": TOKENS}, r"row 7 has \['tokens'\] and no `labels`.*shift_labels=True"),
        ({"tokens": TOKENS, "labels": NEXT[:5]}, r"`labels` of row 7 must have the shape of its tokens, \[6\].*\[5\]"),
        ({"tokens": [*TOKENS, 1], "labels": [*NEXT, 1]}, r"T at most 6, the `seq_length` of the blend, but have \[7\]"),
        ({"tokens": [TOKENS], "labels": [NEXT]}, r"must have the shape \[T\].*\[1, 6\]"),
        ({"tokens": TOKENS, "labels": TOKENS}, "are its own tokens.*Shift them by one, or use `blend_of"),
        ({"tokens": TOKENS, "labels": [IGNORED, *TOKENS[1:]]}, "are its own tokens"),
        ((TOKENS, NEXT), "must be a mapping of names to sequences.*row 7 is tuple"),
    ],
    ids=["no-tokens", "no-labels", "labels-length", "too-long", "two-dimensions", "unshifted", "masked", "tuple"],
)
def test_what_is_no_sample_is_told_with_what_is_expected(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        completed(item, T, "row 7")


def test_one_token_over_and_over_is_no_mistake() -> None:
    assert completed({"tokens": [4] * T, "labels": [4] * T}, T, "row 0")["loss_mask"].tolist() == [1.0] * T


def test_a_micro_batch_knows_the_other_name_and_tells_of_a_wrong_one() -> None:
    batch = MicroBatch(tokens=torch.ones(2, T), labels=torch.ones(2, T))
    assert batch["input_ids"] is batch["tokens"]
    with pytest.raises(DataError, match=r"asks a micro-batch for `input`, but samples have \['labels', 'tokens'\]"):
        batch["input"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.tensor(2.0), r"\[B, T\] = \[2, 6\], but gives \[\] instead: a mean over the batch.*reduction=\"none\""),
        (torch.zeros(12), r"gives \[12\] instead: give them the shape of the labels"),
        (torch.zeros(6, 2), r"gives \[6, 2\] instead: give them the shape"),
        (torch.zeros(2, 5), r"gives \[2, 5\] instead: labels are those of the next tokens already"),
        (torch.zeros(2), r"gives \[2\] instead: give one loss for each label"),
        (SimpleNamespace(logits=None), "gives SimpleNamespace instead: .*huggingface_token_losses"),
        (2.0, "gives float instead"),
    ],
    ids=["mean", "flat", "transposed", "shifted-again", "sequences", "output", "float"],
)
def test_losses_of_another_shape_are_told_with_the_cure(found: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_losses(found, torch.ones(2, T))


class Texts:
    """A map-style dataset in Hugging Face's form: `input_ids` of one length or another."""

    def __init__(self, count: int, seed: int, *, restless: bool = False) -> None:
        self.count, self.seed, self.restless, self.reads = count, seed, restless, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        random = np.random.default_rng((self.seed, index, self.reads * self.restless))
        return {"input_ids": random.integers(1, 50, T - index % 2).tolist(), "text": "hello"}


def pad_together(items: list[Any]) -> dict[str, torch.Tensor]:
    """A data collator as people write them."""
    tokens = torch.tensor([item["input_ids"] for item in items])
    return {"input_ids": tokens, "labels": tokens.clone()}


@pytest.mark.parametrize("collate", [None, pad_together], ids=["plain", "collate"])
def test_datasets_of_ones_own_make_a_blend(collate: Any) -> None:
    datasets = {"a": Texts(30, 1), "b": Texts(12, 2)}
    blend = blend_of(datasets, T, weights={"b": 3.0, "a": 1.0}, collate=collate, shift_labels=True)
    assert [(each.name, each.samples, each.weight) for each in blend.manifest.components] == [
        ("a", 30, 1.0),
        ("b", 12, 3.0),
    ]
    assert len(blend.rows) == blend.manifest.total == 42
    rows = pickle.loads(pickle.dumps(blend.rows))  # as a loader worker that is spawned has them
    tokens = datasets["b"][3]["input_ids"]
    assert len(tokens) == T - 1
    assert rows[33]["tokens"].tolist() == [*tokens, 0]
    assert rows[33]["labels"].tolist() == [*tokens[1:], IGNORED, IGNORED]
    assert {tensor.shape for n in range(42) for tensor in rows[n].values()} == {(T,)}


def test_a_changed_dataset_is_told_from_the_same_one() -> None:
    def fingerprint(dataset: Any, length: int = T) -> str:
        return blend_of({"a": dataset}, length, shift_labels=True).manifest.components[0].fingerprint

    assert fingerprint(Texts(30, 1)) == fingerprint(Texts(30, 1))
    others = [fingerprint(Texts(30, 1)), fingerprint(Texts(31, 1)), fingerprint(Texts(30, 2))]
    assert len({*others, fingerprint(Texts(30, 1), T + 2)}) == 4


@pytest.mark.parametrize(
    ("datasets", "options", "message"),
    [
        ({"a": iter([1])}, {}, "Dataset `a` must be map-style.*list_iterator.*without streaming"),
        ({"a": Texts(9, 1, restless=True)}, {"shift_labels": True}, "Row 0 of dataset `a` must be the same each time"),
        ({"a": Texts(9, 1)}, {}, "Dataset `a`: A sample must have .*no `labels`.*shift_labels=True"),
        ({"a": []}, {}, "Component `a` must have at least 1 sample"),
        ({"a": Texts(9, 1)}, {"weights": {"b": 1.0}}, r"`weights` must have the names of the datasets, \['a'\]"),
        ({"a": [{"input_ids": TOKENS}]}, {"collate": lambda items: items[0]}, r"must make tensors \[1, n\].*list"),
    ],
    ids=["stream", "random", "unshifted", "empty", "weights", "collate"],
)
def test_datasets_that_cannot_be_trained_on_are_refused(datasets: Any, options: Any, message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        blend_of(datasets, T, **options)


BLEND = SimpleNamespace(manifest=Manifest((Component("a", "", 1000, 1.0, "x"),), T))
EVOLVED = {"preset": "paper", "selection": {"keep_ratio": 0.5, "anneal": 0.1}, "pruning": {"ratio": 0.25}}
JSON = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "evolved_sampling": EVOLVED}


def test_a_plan_needs_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_run(BLEND, train_samples=3000, deepspeed=JSON)
    assert (plan.meta_batch, plan.kept, plan.plain_iterations) == (16, 8, 188)
    assert plan.iterations < plan.plain_iterations, "pruned epochs are shorter"
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(JSON))
    assert plan_run(BLEND, train_samples=3000, deepspeed=path).iterations == plan.iterations
    config = EvolvedSamplingConfig.from_mapping(EVOLVED, "test")
    given = plan_run(BLEND, train_samples=3000, config=config, global_batch_size=16, micro_batch_size=2)
    assert given.iterations == plan.iterations
    auto = {**JSON, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    monkeypatch.setenv("WORLD_SIZE", "4")
    auto_plan = plan_run(BLEND, train_samples=3000, deepspeed=auto, global_batch_size=16, micro_batch_size=2)
    assert auto_plan.iterations == given.iterations
    steps = {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2, "evolved_sampling": EVOLVED}
    assert plan_run(BLEND, train_samples=3000, deepspeed=steps).meta_batch == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deepspeed": {**JSON, "train_batch_size": "auto"}, "data_parallel": 3}, None),
        ({"deepspeed": {"train_batch_size": 16, "evolved_sampling": {}}}, "`micro_batch_size` must be known before"),
        ({}, "`global_batch_size` and `micro_batch_size` must be known before a run is planned, but only {} is given"),
        ({"deepspeed": JSON, "data_parallel": 3}, "is 16 with a micro-batch of 2, any number of steps and 3 ranks"),
        ({"deepspeed": {**JSON, "gradient_accumulation_steps": 3}, "data_parallel": 2}, "3 steps and 2 ranks"),
        ({"deepspeed": {**JSON, "evolved_sampling": None}}, 'must have a block `"evolved_sampling"'),
        ({"deepspeed": "missing.json"}, "`deepspeed` must be a JSON file, but `missing.json` is not"),
        ({"deepspeed": JSON, "data_parallel": 8}, "`selection.keep_ratio` times the meta-batch must be a multiple of"),
    ],
    ids=["fine", "no-micro", "nothing", "ranks", "steps", "no-block", "no-file", "indivisible"],
)
def test_batch_sizes_that_do_not_agree_are_told(arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert plan_run(BLEND, train_samples=3000, **arguments, global_batch_size=12).meta_batch == 12
        return
    with pytest.raises(ConfigError, match=message):
        plan_run(BLEND, train_samples=3000, **arguments)


def test_rows_are_read_lazily() -> None:
    dataset = Texts(10_000, 1)
    samples = Samples(dataset, T, shift_labels=True)
    assert len(samples) == 10_000
    assert dataset.reads == 0
