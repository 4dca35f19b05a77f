"""Blend files and prepared text, read as one-epoch rows and by unmodified megatron-core."""

from __future__ import annotations

import json
import math
import os
import pickle
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentencepiece import SentencePieceProcessor

from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.megatron_data import BlendedRows, OneEpochDataset, load_blend
from es_megatron.prepare.command import PrepareSettings, prepare
from es_megatron.prepare.corpus import documents
from es_megatron.prepare.finding import find_corpus
from tests.contract.test_megatron_data import T, build, stock_dataset


def write_blend(folder: Path, **changes: Any) -> Path:
    build(folder / "a.train", [100, 200])
    build(folder / "a.valid", [50])
    build(folder / "b.train", [90])
    entries: list[dict[str, Any]] = [
        {"name": "a", "train": "a.train", "validation": "a.valid", "weight": None},
        {"name": "b", "train": "b.train"},
    ]
    content = {"vocab_size": 500, "components": entries, **changes}
    path = folder / "blend.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_blend_has_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "blend"
    folder.mkdir()
    path = write_blend(folder)
    monkeypatch.chdir(tmp_path)  # paths are relative to the file, not to where one stands
    blend = load_blend(path.relative_to(tmp_path), T)
    assert [component.name for component in blend.manifest.components] == ["a", "b"]
    assert [component.samples for component in blend.manifest.components] == [299 // T, 89 // T]
    assert {name: len(rows) for name, rows in blend.validation.items()} == {"a": 49 // T}
    assert (blend.tokenizer, blend.vocab_size) == (None, 500)
    rows: BlendedRows = blend.rows
    assert len(rows) == blend.manifest.total
    for key in range(len(rows)):
        component, row = (0, key) if key < 299 // T else (1, key - 299 // T)
        for sample in (rows[key], rows[component, row]):
            assert torch.equal(sample["tokens"], blend.datasets[component][row]["tokens"])
    assert pickle.loads(pickle.dumps(rows))[3]["tokens"].tolist() == rows[3]["tokens"].tolist()


def test_given_weights_are_kept(tmp_path: Path) -> None:
    entries = [{"name": "a", "train": "a.train", "weight": 0.25}, {"name": "b", "train": "b.train", "weight": 3}]
    blend = load_blend(write_blend(tmp_path, components=entries), T)
    assert [component.weight for component in blend.manifest.components] == [0.25, 3.0]


A = {"name": "a", "train": "a.train"}
B = {"name": "b", "train": "b.train"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"components": []}, ConfigError, "blend.yaml.*`components` must be a list with at least one entry"),
        ({"component": [A]}, ConfigError, "Unknown key `component` in .*blend.yaml.*Did you mean `components`"),
        ({"components": [{"name": "a"}]}, ConfigError, "Key `train` is missing in .*blend.yaml"),
        ({"components": [{**A, "wieght": 1}]}, ConfigError, "Unknown key `wieght` in .*Did you mean `weight`"),
        ({"components": [{**A, "weight": -1}]}, ConfigError, "`weight` must be above 0 and finite, or null, but is -1"),
        ({"components": [{**A, "weight": math.inf}]}, ConfigError, "`weight` must be above 0 and finite"),
        (
            {"components": [A, {**B, "weight": 1}]},
            ConfigError,
            r"`weight` must be given for every .* is given for \['b'\] only",
        ),
        ({"components": [A, A]}, ConfigError, "Names of `components` must differ"),
        ({"vocab_size": None}, ConfigError, "`tokenizer` or `vocab_size` must be given"),
        ({"vocab_size": 1}, ConfigError, "`vocab_size` must be at least 2, but is 1"),
        ({"tokenizer": "none.model"}, DataError, r"Tokenizer `.*none.model` of .* does not exist"),
        ({"tokenizer": "a.train.bin", "vocab_size": None}, DataError, "must be a sentencepiece model"),
        ({"components": [{**A, "train": "c.train"}]}, DataError, r"c.train.idx` does not exist"),
        ({"components": [{**A, "validation": "c.valid"}]}, DataError, r"c.valid.idx` does not exist"),
    ],
)
def test_bad_blend_files_are_named(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_blend(write_blend(tmp_path, **changes), T)


def test_blend_files_that_are_no_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"blend.yaml` does not exist: write it with `es-megatron prepare"):
        load_blend(tmp_path / "blend.yaml", T)
    for content in ("a: [", "just text", ""):
        (tmp_path / "blend.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"blend.yaml` must be"):
            load_blend(tmp_path / "blend.yaml", T)


def test_prepared_text_loads_here_and_upstream(tmp_path: Path) -> None:
    texts = [f"Document {i}:\n  {' '.join(str(i * k) for k in range(30))}\n" for i in range(80)]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "out"
    prepare(
        PrepareSettings(out, (f"numbers={tmp_path}/n.jsonl",), vocab_size=280, validation_share=0.2, progress=False)
    )
    blend = load_blend(out / "blend.yaml", 32)
    tokenizer = SentencePieceProcessor(model_file=str(blend.tokenizer))
    assert blend.vocab_size == tokenizer.vocab_size() == 280
    (dataset,) = blend.datasets
    inputs = np.concatenate([dataset[row]["tokens"].numpy() for row in range(len(dataset))])
    decoded = "".join(
        tokenizer.decode(document.tolist())
        for document in np.split(inputs, np.flatnonzero(inputs == tokenizer.eos_id()))
    )
    train = "".join(texts[i] for i in range(80) if texts[i] in decoded)
    assert train
    assert decoded.startswith(train), "text, in file order; the last row may end within a document"
    check_upstream(out / "numbers.train", dataset, tmp_path / "cache")


def check_upstream(prefix: Path, dataset: OneEpochDataset, cache: Path) -> None:
    """Unmodified upstream reads the same documents, packed in its own order."""
    stock = stock_dataset(prefix, dataset.seq_length, cache)
    assert len(stock) == len(dataset)
    documents = [stock.dataset[int(i)] for i in stock.document_index]
    tokens = np.concatenate(documents).astype(np.int64)
    for i in range(min(len(stock), 50)):
        row = int(stock.shuffle_index[i])
        expected = tokens[row * dataset.seq_length : (row + 1) * dataset.seq_length]
        assert np.array_equal(stock[i]["tokens"].numpy(), expected)
    ours = np.fromfile(f"{prefix}.bin", dataset.file.dtype)
    assert np.array_equal(np.sort(tokens), np.sort(ours.astype(np.int64)))


def real_text(corpora: str | None) -> dict[str, str]:
    """Component -> path: the standard library's sources, which are everywhere, or the JSON lines of a folder."""
    if corpora is not None:
        return {path.name.partition(".")[0]: str(path) for path in sorted(Path(corpora).glob("*.jsonl.gz"))}
    library = Path(sysconfig.get_path("stdlib"))
    return {name: f"{library / name}/**/*.py" for name in ("asyncio", "email", "concurrent")}


def test_real_text_comes_back(tmp_path: Path) -> None:
    components = real_text(os.environ.get("ES_MEGATRON_TEST_CORPORA"))
    out = tmp_path / "out"
    settings = PrepareSettings(
        out,
        tuple(f"{name}={path}" for name, path in components.items()),
        vocab_size=1_500,
        max_megabytes=0.5,
        validation_share=0.2,
        progress=False,
    )
    prepare(settings)
    blend = load_blend(out / "blend.yaml", 64)
    tokenizer = SentencePieceProcessor(model_file=str(blend.tokenizer))
    for name, dataset in zip(components, blend.datasets, strict=True):
        originals = set(documents(find_corpus(name, [components[name]])))
        for prefix in (f"{name}.train", f"{name}.valid"):
            ids = np.fromfile(out / f"{prefix}.bin", np.uint16)
            ends = np.flatnonzero(ids == tokenizer.eos_id()) + 1
            for document in np.split(ids, ends[:-1]):
                assert tokenizer.decode(document[:-1].tolist()) in originals
        check_upstream(out / f"{name}.train", dataset, tmp_path / "cache")
