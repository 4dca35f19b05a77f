"""The one-epoch rows against real megatron-core, on files made by real megatron-core."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.megatron_data import (
    OneEpochDataset,
    fingerprint_token_file,
    open_component,
    open_token_file,
)
from es_megatron.frameworks.megatron_lm_data import lengths_of

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


def test_lengths_of_the_sequences_in_a_row(files: tuple[Path, list[np.ndarray]]) -> None:
    prefix, documents = files
    _, dataset = open_component("a", prefix, T)
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    found = [lengths_of(dataset, row) for row in range(len(dataset))]
    expected = [np.unique(owner[r * T : r * T + T + 1], return_counts=True)[1].tolist() for r in range(len(dataset))]
    assert found == expected
    assert max(map(len, found)) > 1


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
        "long document": (tokens, index[:34] + struct.pack("<I", 3_000_000_000) + index[38:]),
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
        ("long document", r"a.idx` has a sequence of -1294967296 tokens\. .* fewer than 2\^31"),
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
