"""What `es-megatron prepare` refuses: bad text, settings and output folders, each named and nothing left behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from es_megatron.errors import ConfigError, DataError
from es_megatron.prepare import corpus as corpora
from es_megatron.prepare import output_folder
from es_megatron.prepare.command import prepare
from tests.unit.test_prepare import files_of, make_texts, small, write_lines, write_two_components


@pytest.fixture
def two_components(tmp_path: Path) -> tuple[str, str]:
    return write_two_components(tmp_path)


def bad_inputs(tmp_path: Path) -> dict[str, tuple[str, type[Exception], str]]:
    """Name -> (component, error, what the message says)."""
    good = [json.dumps({"text": text}) for text in make_texts(3)]
    (tmp_path / "nokey.jsonl").write_text("\n".join([*good, '{"body": "x"}']))
    (tmp_path / "nojson.jsonl").write_text("\n".join([*good, "", '{"text": ']))
    (tmp_path / "list.json").write_text('[\n{"text": "x"},\n{"te')
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
        "cut array": (f"a={tmp_path}/list.json", DataError, r"Entry 2 of the array in `.*list.json` must be JSON"),
        "cut gzip": (f"a={tmp_path}/cut.jsonl.gz", DataError, r"cut.jsonl.gz` is broken gzip"),
        "not gzip": (f"a={tmp_path}/plain.txt.gz", DataError, r"plain.txt.gz` is broken gzip"),
        "flipped gzip": (f"a={tmp_path}/flipped.jsonl.gz", DataError, r"flipped.jsonl.gz"),
        "not utf-8": (f"a={tmp_path}/latin.txt", DataError, "latin.txt` must be UTF-8, but is not .byte 1"),
        "line not utf-8": (f"a={tmp_path}/latin.jsonl", DataError, "Line 1 of .* must be UTF-8.*--on-bad-line skip"),
        "no text": (f"a={tmp_path}/blank.txt", DataError, "`a` has no document with text"),
        "unknown suffixes": (f"a={tmp_path}/folder", DataError, r"folder/\*\*/\*.py"),
        "one document": (f"a={one}", DataError, "validation share of 0.2: (raise|lower) `--validation-share`"),
        "no name": (f"{one}", ConfigError, "`--component` must be NAME=PATH"),
        "bad name": (f"a/b={one}", ConfigError, "`--component` must be NAME=PATH"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing path", "missing pattern", "no key", "no json", "cut array", "cut gzip", "not gzip",
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
