"""The one-epoch rows against real megatron-core, on files made by real megatron-core."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentencepiece import SentencePieceProcessor
from torch.utils.data import DataLoader

from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.megatron_data import (
    BlendedRows,
    OneEpochDataset,
    fingerprint_token_file,
    load_blend,
    open_component,
    open_token_file,
)
from es_megatron.prepare.command import PrepareSettings, prepare
from es_megatron.prepare.corpus import find_corpus, read_documents

T = 16


def build(prefix: Path, lengths: list[int], dtype: Any = np.uint16, top: int = 500) -> list[np.ndarray]:
    """Write documents of random tokens with upstream's builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(len(lengths))
    documents = [random.integers(0, top, length) for length in lengths]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return documents


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    lengths = np.random.default_rng(0).integers(0, 40, 60).tolist()  # some documents are empty
    return tmp_path / "a", build(tmp_path / "a", [3, *lengths, 0, 5])


def stock_dataset(prefix: Path, seq_length: int, cache: Path) -> Any:
    """One epoch of the files by unmodified upstream code, through its own builder."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = SimpleNamespace(vocab_size=500, eod=1, pad=-1, unique_identifiers={"class": "test"})
    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
    return train


def test_rows_are_windows_of_upstreams_documents(files: tuple[Path, list[np.ndarray]]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix, documents = files
    stock = IndexedDataset(str(prefix))
    tokens = np.concatenate([stock[i] for i in range(len(stock))]).astype(np.int64)
    assert np.array_equal(tokens, np.concatenate(documents))
    component, dataset = open_component("a", prefix, T)
    assert len(dataset) == component.samples == (len(tokens) - 1) // T
    assert component.weight == component.samples
    for row in range(len(dataset)):
        sample = dataset[row]
        assert np.array_equal(sample["tokens"], tokens[row * T : row * T + T])
        assert np.array_equal(sample["labels"], tokens[row * T + 1 : row * T + T + 1])


def test_an_epoch_covers_every_token_once(files: tuple[Path, list[np.ndarray]]) -> None:
    prefix, documents = files
    _, dataset = open_component("a", prefix, T)
    tokens = np.concatenate(documents)
    inputs = np.concatenate([dataset[row]["tokens"].numpy() for row in range(len(dataset))])
    assert np.array_equal(inputs, tokens[: len(inputs)])
    assert 0 <= len(tokens) - 1 - len(inputs) < T, "less than a row is left over"


def test_samples_have_the_form_of_upstreams(files: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    prefix, _ = files
    stock = stock_dataset(prefix, T, tmp_path / "cache")
    _, dataset = open_component("a", prefix, T)
    assert len(stock) == len(dataset)
    theirs, ours = stock[0], dataset[0]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert ours[key].shape == value.shape
    assert torch.equal(ours["position_ids"], theirs["position_ids"])
    assert torch.equal(ours["loss_mask"], theirs["loss_mask"])


def test_documents_of_a_row(files: tuple[Path, list[np.ndarray]]) -> None:
    prefix, documents = files
    _, dataset = open_component("a", prefix, T)
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    for row in range(len(dataset)):
        window = owner[row * T : row * T + T + 1]
        found = dataset.documents_of(row)
        assert found == list(range(window[0], window[-1] + 1))
        assert set(window.tolist()) <= set(found)
    with pytest.raises(IndexError, match="`row` must be in"):
        dataset.documents_of(len(dataset))


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path / 'a'}.bin", np.int32)
    for start in range(0, 40, 8):
        builder.add_document(np.arange(start, start + 8), [3, 5])
    builder.finalize(f"{tmp_path / 'a'}.idx")
    _, dataset = open_component("a", tmp_path / "a", 4)
    assert [dataset.documents_of(row) for row in range(4)] == [[0], [0, 1], [1], [1, 2]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_every_token_type_reads_the_same(tmp_path: Path, dtype: Any) -> None:
    documents = build(tmp_path / "a", [30, 40], dtype)
    _, dataset = open_component("a", tmp_path / "a", T)
    assert dataset[1]["tokens"].tolist() == np.concatenate(documents)[T : 2 * T].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_through_data_loader_workers(files: tuple[Path, list[np.ndarray]], workers: int) -> None:
    prefix, documents = files
    _, dataset = open_component("a", prefix, T)
    dataset[0]  # opens the file in this process
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, multiprocessing_context="fork" if workers else None)
    inputs = torch.cat([batch["tokens"].flatten() for batch in loader])
    assert np.array_equal(inputs, np.concatenate(documents)[: len(inputs)])
    assert len(inputs) == len(dataset) * T


def test_pickle_holds_no_tokens(tmp_path: Path) -> None:
    build(tmp_path / "a", [200_000])
    _, dataset = open_component("a", tmp_path / "a", T)
    sample = dataset[5]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2_000
    assert torch.equal(pickle.loads(pickled)[5]["tokens"], sample["tokens"])


def test_a_file_that_is_cut_while_open_is_named(files: tuple[Path, list[np.ndarray]]) -> None:
    _, dataset = open_component("a", files[0], T)
    last = len(dataset) - 1
    assert len(dataset[last]["tokens"]) == T
    os.truncate(f"{files[0]}.bin", 200)
    with pytest.raises(DataError, match=r"a.bin` has become shorter"):
        dataset[last]
    unread = OneEpochDataset("a", dataset.file, T)
    Path(f"{files[0]}.bin").unlink()
    with pytest.raises(DataError, match=r"a.bin` cannot be read"):
        unread[0]


def test_samples_do_not_share_memory(files: tuple[Path, list[np.ndarray]]) -> None:
    _, dataset = open_component("a", files[0], T)
    sample = dataset[0]
    labels = sample["labels"].tolist()
    sample["tokens"].zero_()
    sample["loss_mask"].zero_()
    assert sample["labels"].tolist() == labels
    assert dataset[0]["tokens"].any()
    assert dataset[0]["loss_mask"].all()


def test_fingerprint_tells_files_apart_but_not_places(files: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    prefix, documents = files
    component, _ = open_component("a", prefix, T)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", elsewhere / f"b{suffix}")
    assert open_component("b", elsewhere / "b", T)[0].fingerprint == component.fingerprint
    assert open_component("a", prefix, T + 1)[0].fingerprint != component.fingerprint
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[-1] ^= 1
    (elsewhere / "b.bin").write_bytes(content)
    assert fingerprint_token_file(open_token_file(elsewhere / "b"), T) != component.fingerprint
    build(elsewhere / "c", [len(document) for document in documents[::-1]])
    assert open_component("c", elsewhere / "c", T)[0].fingerprint != component.fingerprint


def test_fingerprint_is_the_same_in_every_version(tmp_path: Path) -> None:
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 1, 2)
    (tmp_path / "a.idx").write_bytes(header + struct.pack("<iqqq", 64, 0, 0, 1))
    np.arange(64, dtype=np.uint16).tofile(tmp_path / "a.bin")
    # A new value makes every checkpoint that teams have refuse to load.
    assert fingerprint_token_file(open_token_file(tmp_path / "a"), 16) == "10d33006db047f977193bf804a97e81c"


def damage(prefix: Path, case: str) -> None:
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    tokens, index = bin_path.read_bytes(), idx_path.read_bytes()
    contents: dict[str, tuple[bytes | None, bytes | None]] = {
        "no bin": (None, index),
        "no idx": (tokens, None),
        "cut bin": (tokens[:-2], index),
        "odd bin": (tokens[:-1], index),
        "empty bin": (b"", index),
        "long bin": (tokens + b"\0\0", index),
        "cut idx": (tokens, index[:-8]),
        "cut header": (tokens, index[:20]),
        "not an idx": (tokens, b"x" * len(index)),
        "float tokens": (tokens, index[:17] + b"\7" + index[18:]),
        "wrong length": (tokens, index[:34] + bytes([index[34] + 1]) + index[35:]),
        "documents": (tokens, index[:-8] + struct.pack("<q", 2)),
    }
    for path, content in zip((bin_path, idx_path), contents[case], strict=True):
        path.unlink()
        if content is not None:
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no bin", r"a.bin` does not exist: prepare"),
        ("no idx", r"a.idx` does not exist: prepare"),
        ("cut bin", r"a.bin` is truncated: it must have \d+ bytes by `.*a.idx`, but has \d+ instead: prepare"),
        ("odd bin", r"a.bin` is truncated"),
        ("empty bin", r"a.bin` is truncated: .* has 0 instead"),
        ("long bin", r"a.bin` is longer than its index"),
        ("cut idx", r"a.idx` must have \d+ bytes by its header, but has \d+ instead"),
        ("cut header", r"a.idx` must be a Megatron index"),
        ("not an idx", r"a.idx` must be a Megatron index"),
        ("float tokens", r"a.idx` must have version 1 and an integer token type, .* type code 7"),
        ("wrong length", r"a.idx` is damaged: its sequences"),
        ("documents", r"a.idx` is damaged: its documents"),
    ],
)
def test_damaged_files_are_named(files: tuple[Path, list[np.ndarray]], case: str, message: str) -> None:
    damage(files[0], case)
    with pytest.raises(DataError, match=message):
        open_component("a", files[0], T)


def test_checks_reach_past_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "a", [5] * 100)
    monkeypatch.setattr("es_megatron.frameworks.megatron_data._BLOCK", 8)
    open_token_file(tmp_path / "a")
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[34 + 4 * 77] += 1
    index[34 + 4 * 78] -= 1
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DataError, match="do not follow each other"):
        open_token_file(tmp_path / "a")


def test_multimodal_files_are_refused(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path / 'a'}.bin", np.uint16, multimodal=True)
    builder.add_document(np.arange(40), [40], [1])
    builder.finalize(f"{tmp_path / 'a'}.idx")
    with pytest.raises(DataError, match="multimodal"):
        open_token_file(tmp_path / "a")


def test_short_empty_and_foreign_components_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "a", [T])
    with pytest.raises(DataError, match=r"`a` must have at least `seq_length` \+ 1 = 17 tokens, but .*a.bin` has 16"):
        open_component("a", tmp_path / "a", T)
    build(tmp_path / "b", [T + 1])
    component, dataset = open_component("b", tmp_path / "b", T)
    assert component.samples == len(dataset) == 1
    build(tmp_path / "even", [2 * T])
    assert len(open_component("even", tmp_path / "even", T)[1]) == 1, "a second row would want one more token"
    with pytest.raises(ConfigError, match="`seq_length` must be at least 1, but is 0"):
        open_component("b", tmp_path / "b", 0)
    build(tmp_path / "c", [])
    with pytest.raises(DataError, match="has no document"):
        open_component("c", tmp_path / "c", T)
    _, narrow = open_component("b", tmp_path / "b", T, vocab_size=10)
    with pytest.raises(DataError, match=r"`b` must be in \[0, 10\), but row 0 has"):
        narrow[0]


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
        originals = set(read_documents(find_corpus(name, [components[name]])))
        for prefix in (f"{name}.train", f"{name}.valid"):
            ids = np.fromfile(out / f"{prefix}.bin", np.uint16)
            ends = np.flatnonzero(ids == tokenizer.eos_id()) + 1
            for document in np.split(ids, ends[:-1]):
                assert tokenizer.decode(document[:-1].tolist()) in originals
        check_upstream(out / f"{name}.train", dataset, tmp_path / "cache")
