"""Text to token files: reading, splitting, choosing, tokenising."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from es_megatron.errors import DataError
from es_megatron.frameworks.megatron_data import open_token_file
from es_megatron.frameworks.token_hash import read_hash, take_hash
from es_megatron.prepare import command, writing
from es_megatron.prepare import corpus as corpora
from es_megatron.prepare.command import PrepareSettings, prepare
from es_megatron.prepare.finding import find_corpus
from es_megatron.prepare.tokenizer import tokenize, train_tokenizer

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew odd potions in Zürich 北京 12 34"
WORDS = TEXT.split()


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of random words with line breaks, indents and trailing white space."""
    random = np.random.default_rng(seed)
    return [
        f"  Document {i}\n\n\t" + " ".join(random.choice(WORDS, random.integers(5, 60))) + "\r\n end  "
        for i in range(count)
    ]


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    content = "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_back(folder: Path, prefix: str) -> list[str]:
    """Decode a token file with numpy alone."""
    header = np.fromfile(folder / f"{prefix}.idx", np.uint8)
    count = int(header[18:26].view(np.int64)[0])
    lengths = header[34 : 34 + 4 * count].view(np.int32)
    ids = np.fromfile(folder / f"{prefix}.bin", np.uint16)
    tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    assert all(document[-1] == tokenizer.eos_id() for document in documents)
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def write_two_components(tmp_path: Path) -> tuple[str, str]:
    """A file of JSON lines and a folder of text, as `--component` takes them."""
    write_lines(tmp_path / "a.jsonl.gz", make_texts(120, seed=1))
    (tmp_path / "b").mkdir()
    for i, text in enumerate(make_texts(60, seed=2)):
        (tmp_path / "b" / f"{i:03}.txt").write_bytes(text.encode())
    return f"first={tmp_path / 'a.jsonl.gz'}", f"second={tmp_path / 'b'}"


@pytest.fixture
def two_components(tmp_path: Path) -> tuple[str, str]:
    return write_two_components(tmp_path)


def small(tmp_path: Path, *components: str, **changes: Any) -> PrepareSettings:
    values: dict[str, Any] = {"vocab_size": 330, "validation_share": 0.2, "workers": 1, "progress": False}
    return PrepareSettings(**{"output": tmp_path / "out", "components": components, **values, **changes})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "prepare.json"}


def test_text_comes_back_and_stands_on_one_side(tmp_path: Path, two_components: tuple[str, str]) -> None:
    report = prepare(small(tmp_path, *two_components))
    out = tmp_path / "out"
    for name, texts in (("first", make_texts(120, seed=1)), ("second", make_texts(60, seed=2))):
        train, validation = read_back(out, f"{name}.train"), read_back(out, f"{name}.valid")
        assert sorted(train + validation) == sorted(texts)
        assert train == [text for text in texts if text in set(train)], "the order of the documents is kept"
        assert not set(train) & set(validation)
        assert 0 < len(validation) < len(train)
    blend = yaml.safe_load((out / "blend.yaml").read_text())
    assert blend["components"][1] == {
        "name": "second", "train": "second.train", "validation": "second.valid", "weight": None,
    }  # fmt: skip
    assert json.loads((out / "prepare.json").read_text()) == json.loads(json.dumps(report))
    first = report["components"][0]
    assert first["train"]["tokens"] * 2 == (out / "first.train.bin").stat().st_size
    assert first["train"]["bytes"] + first["validation"]["bytes"] == sum(
        len(t.encode()) for t in make_texts(120, seed=1)
    )


@pytest.mark.parametrize("limit", [None, 0.005])
def test_output_does_not_depend_on_workers(
    tmp_path: Path, two_components: tuple[str, str], limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("es_megatron.prepare.tokenizer._BATCH", 400)  # dozens of batches
    for workers in (1, 3):
        prepare(small(tmp_path, *two_components, output=tmp_path / str(workers), workers=workers, max_megabytes=limit))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_exact_duplicates_never_straddle_the_split(tmp_path: Path) -> None:
    texts = make_texts(40)
    one, two = write_lines(tmp_path / "1.jsonl", texts * 3), write_lines(tmp_path / "2.jsonl", texts[::-1])
    report = prepare(small(tmp_path, f"one={one}", f"two={two}"))
    out = tmp_path / "out"
    held = set(read_back(out, "one.valid"))
    assert held
    assert held == set(read_back(out, "two.valid"))
    assert not held & set(read_back(out, "one.train") + read_back(out, "two.train"))
    assert [entry["found"]["duplicate_documents"] for entry in report["components"]] == [80, 0]


def test_a_larger_share_only_adds_held_out_documents() -> None:
    hashes_N = np.random.default_rng(0).integers(0, 1 << 64, 20_000, np.uint64)
    small_N, large_N = (corpora.choose_validation([hashes_N], share)[0] for share in (0.02, 0.3))
    assert not (small_N & ~large_N).any()
    assert small_N.mean() == pytest.approx(0.02, abs=0.004)
    assert large_N.mean() == pytest.approx(0.3, abs=0.015)
    assert not corpora.choose_validation([hashes_N], 0.0)[0].any()


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=300), st.integers(1, 200_000))
def test_a_subset_is_even_and_within_its_limit(sizes: list[int], limit: int) -> None:
    bytes_N = np.asarray(sizes, np.int64)
    kept_N = corpora.choose_evenly(bytes_N, limit)
    assert bytes_N[kept_N].sum() <= limit
    if bytes_N.sum() <= limit:
        assert kept_N.all()
    kept = np.flatnonzero(kept_N)
    if len(kept) > 1:
        gaps = np.diff(kept)
        assert gaps.max() - gaps.min() <= 1, "evenly spread"
        assert kept[0] <= gaps.max()
        assert len(sizes) - kept[-1] <= gaps.max() + 1


def test_a_subset_uses_its_limit() -> None:
    bytes_N = np.random.default_rng(0).integers(100, 2_000, 5_000).astype(np.int64)
    kept_N = corpora.choose_evenly(bytes_N, 500_000)
    assert 0.9 * 500_000 < bytes_N[kept_N].sum() <= 500_000


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(make_texts(50), 330)


@settings(max_examples=200)
@given(st.lists(st.sampled_from([" ", "\u2581", "\n", "a b"]) | st.text(max_size=20), max_size=30).map("".join))
def test_any_text_comes_back_from_a_trained_tokenizer(model: bytes, text: str) -> None:
    ((ids, lengths),) = tokenize([text], model, 1)
    tokenizer = SentencePieceProcessor(model_proto=model)
    assert lengths.tolist() == [len(ids)]
    assert ids[-1] == tokenizer.eos_id()
    assert tokenizer.eos_id() not in ids[:-1]
    assert tokenizer.decode(ids[:-1].tolist()) == text


def test_training_a_tokenizer_is_deterministic(model: bytes) -> None:
    assert train_tokenizer(make_texts(50), 330) == model
    assert train_tokenizer(make_texts(50, seed=5), 330) != model


def test_errors_of_the_text_come_through_training() -> None:
    def texts() -> Iterator[str]:
        yield "some text"
        raise DataError("the text is bad")

    with pytest.raises(DataError, match="the text is bad"):
        train_tokenizer(texts(), 330)


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path, two_components: tuple[str, str], model: bytes) -> None:
    (tmp_path / "mine.model").write_bytes(model)
    prepare(small(tmp_path, *two_components, tokenizer=tmp_path / "mine.model", vocab_size=None))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model


def test_formats_patterns_and_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", ["b0", "b1"], key="content")
    write_lines(tmp_path / "a.jsonl.gz", ["a0", " \n", "a1"], key="content")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress("\ufeffc0".encode()))
    (tmp_path / "sub" / ".hidden.txt").write_text("no")
    (tmp_path / "sub" / "d.py").write_text("d0")
    folder = find_corpus("x", [str(tmp_path)], "content")
    assert list(corpora.documents(folder)) == ["a0", "a1", "b0", "b1", "c0"]
    assert corpora.survey(folder).tally.empty == 1
    assert list(corpora.documents(find_corpus("x", [f"{tmp_path}/**/*.py"]))) == ["d0"]
    twice = find_corpus("x", [f"{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl"], "content")
    assert list(corpora.documents(twice)) == ["b0", "b1"], "a file that is named twice is read once"


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y \\ud83d\\ude00"}\n')
    assert list(corpora.documents(find_corpus("x", [str(tmp_path / "a.jsonl")]))) == ["x\ufffdy \U0001f600"]


def test_a_dead_worker_is_told(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("es_megatron.prepare.tokenizer._work", _die)
    with pytest.raises(DataError, match="fewer `--workers`"):
        list(tokenize(["x"] * 10, model, 2))


def _die(_: list[str]) -> None:
    import os

    os._exit(9)


def test_without_validation_the_blend_says_so(tmp_path: Path, two_components: tuple[str, str]) -> None:
    prepare(small(tmp_path, *two_components, validation_share=0.0))
    blend = yaml.safe_load((tmp_path / "out" / "blend.yaml").read_text())
    assert [entry["validation"] for entry in blend["components"]] == [None, None]
    assert not list((tmp_path / "out").glob("*.valid.*"))


def test_the_command_line_reaches_every_setting(
    tmp_path: Path, two_components: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = {action.dest for action in parser._actions}
    assert {name.replace("components", "component") for name in PrepareSettings.__dataclass_fields__} <= options
    arguments = [
        "--output",
        str(tmp_path / "out"),
        "--vocab-size",
        "330",
        "--validation-share",
        "0.2",
        "--workers",
        "1",
    ]
    for component in two_components:
        arguments += ["--component", component]
    assert command.run_prepare(parser.parse_args([*arguments, "--no-progress"])) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert f"{report['components'][1]['train']['tokens']:,}" in printed
    assert str(tmp_path / "out" / "blend.yaml") in printed


def test_what_is_read_is_accounted_for_and_sealed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = make_texts(60, seed=3)
    path = write_lines(folder / "a.jsonl", [*texts, " ", texts[0]])
    path.write_bytes(path.read_bytes() + b'{"text": null}\n{"body": "x"}\n')
    write_lines(folder / "b.jsonl.gz", texts[:2])
    (folder / "c.pdf").write_bytes(b"%PDF")
    (folder / ".git").mkdir()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = ["--output", str(tmp_path / "out"), "--component", f"c={folder}", "--vocab-size", "330", "--workers", "1"]
    given += ["--validation-share", "0.1", "--max-megabytes", "0.01", "--no-progress", "--on-bad-line", "skip"]
    assert command.run_prepare(parser.parse_args(given)) == 3
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "prepare.json").read_text())
    (entry,) = report["components"]
    found, written = entry["found"], entry["train"]["documents"] + entry["validation"]["documents"]
    assert found["read"] == 66 == written + found["beyond_limit"] + 3
    assert found["beyond_limit"] > 0
    assert (found["empty_documents"], found["bad_entries"]) == (1, {"null": 1, "no such field": 1})
    assert f"c: 66 read from 2 files = {entry['train']['documents']} training + " in printed
    assert " + 1 empty + 1 null + 1 no such field + " in printed
    assert "c: 3 of the documents stood before, word for word\nc:   2 of " in printed
    assert f"c: NOT READ: {folder}/c.pdf is of no known form" in printed
    assert f"c: not read: {folder}/.git is a hidden folder" in printed
    for side in ("train", "valid"):
        file = open_token_file(tmp_path / "out" / f"c.{side}")
        assert read_hash(file) == take_hash(file)
        assert len(read_back(tmp_path / "out", f"c.{side}")) == file.documents


def test_two_texts_are_enough_and_one_stands_on_either_side(tmp_path: Path) -> None:
    for share in (1e-9, 0.999):
        path = write_lines(tmp_path / "a.jsonl", make_texts(2) * 30)
        prepare(small(tmp_path, f"a={path}", output=tmp_path / str(share), validation_share=share))
        train, held = (set(read_back(tmp_path / str(share), f"a.{side}")) for side in ("train", "valid"))
        assert len(train) == len(held) == 1
        assert train != held


def test_documents_that_do_not_come_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", make_texts(30))
    monkeypatch.setattr(writing, "_seal", lambda *_: 1)
    with pytest.raises(DataError, match="30 entries of component `a` were read, but 2 documents were written and 0"):
        prepare(small(tmp_path, f"a={path}"))
