"""Validation documents that a reference is trained on are found, whatever stands around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from es_megatron.reference import overlap
from es_megatron.reference.overlap import held_out_and_trained


def write(prefix: Path, documents: list[Any], kind: Any = np.uint16) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", kind)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


def blend_of(folder: Path, components: dict[str, tuple[list[Any], list[Any]]], kind: Any = np.uint16) -> Path:
    """A blend file over documents for training and validation by component."""
    entries: list[dict[str, str]] = []
    for name, (train, validation) in components.items():
        write(folder / f"{name}-train", train, kind)
        entries.append({"name": name, "train": f"{name}-train"})
        if validation:
            write(folder / f"{name}-validation", validation, kind)
            entries[-1]["validation"] = f"{name}-validation"
    (folder / "blend.yaml").write_text(yaml.safe_dump({"vocab_size": 1000, "components": entries}))
    return folder / "blend.yaml"


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_documents_are_found_as_a_loop_finds_them(tmp_path: Path, monkeypatch: Any, block: int) -> None:
    monkeypatch.setattr(overlap, "BLOCK", block)
    random = np.random.default_rng(3)
    # few tokens and lengths, so that many begin alike and some are the same
    made = [random.integers(0, 2, random.integers(1, 14)) for _ in range(400)]
    held, other, train = made[:60], made[60:100], made[100:]
    blend = blend_of(tmp_path / "run", {"a": (made[:9], held), "b": (made[:9], other), "c": (made[:9], [])})
    trained = blend_of(tmp_path / "reference", {"x": (train[:150], []), "y": (train[150:], held[:1])}, np.int32)
    expected: dict[str, tuple[int, int]] = {}
    for name, documents in (("a", held), ("b", other)):
        shared = sum(any(np.array_equal(each, document) for each in train) for document in documents)
        assert 0 < shared < len(documents)
        expected[name] = (shared, len(documents))
    assert held_out_and_trained(blend, trained) == expected


def test_nothing_is_told_of_texts_of_their_own(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    made = [random.integers(0, 1000, 30) for _ in range(20)]
    blend = blend_of(tmp_path / "run", {"a": (made[:5], made[5:10])})
    trained = blend_of(tmp_path / "reference", {"x": ([*made[10:], made[5][:-1], np.append(made[6], 1)], [])})
    assert held_out_and_trained(blend, trained) == {}
