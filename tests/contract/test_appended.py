"""A component that has only grown is known by the fingerprint of what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from es_megatron.data.manifest import Component
from es_megatron.frameworks.appended import appended_check
from es_megatron.frameworks.megatron_data import open_component

T = 16


def write(prefix: Path, documents: list[np.ndarray], dtype: type = np.uint16) -> Component:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return open_component("c", prefix, T)[0]


def some_documents(count: int, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 1000, random.integers(1, longest)) for _ in range(count)]


@pytest.mark.parametrize("longest", [3, 40, 300])
@pytest.mark.parametrize("cut", [25, 60, 99])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_text_appended_is_recognised(tmp_path: Path, longest: int, cut: int, dtype: type) -> None:
    documents = some_documents(100, longest=longest)
    before = write(tmp_path / "old", documents[:cut], dtype)
    now = write(tmp_path / "new", documents, dtype)
    assert now.samples >= before.samples
    assert appended_check(T)(before, now)


def test_anything_else_is_not(tmp_path: Path) -> None:
    documents = some_documents(100)
    before = write(tmp_path / "old", documents[:60])
    check = appended_check(T)
    assert not check(before, write(tmp_path / "front", [*documents[:1], *documents]))
    shuffled = [documents[1], documents[0], *documents[2:]]
    assert not check(before, write(tmp_path / "shuffled", shuffled))
    other = [*documents[:59], documents[59] + 1, *documents[60:]]
    assert not check(before, write(tmp_path / "last", other)), "the last block of the old tokens is looked at"
    longer = [*documents[:59], np.append(documents[59], 5), *documents[60:]]
    assert not check(before, write(tmp_path / "longer", longer))
    assert not appended_check(T + 1)(before, write(tmp_path / "new", documents))
    assert not check(before, Component("c", str(tmp_path / "missing"), 999, 1.0, "x"))
