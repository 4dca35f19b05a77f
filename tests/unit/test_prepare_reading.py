"""Every form that text comes in is read whole, or named: nothing is lost without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.errors import ConfigError, DataError
from es_megatron.prepare import corpus as corpora
from es_megatron.prepare import reading, unpacking
from es_megatron.prepare.finding import OnBadLine, find_corpus

TEXTS = [f"Text {number}: Zürich, 北京" for number in range(30)]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def parquet(texts: list[str | None]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), buffer)
    return buffer.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def read(path: Path, on_bad_line: OnBadLine = "error") -> list[str]:
    return list(corpora.documents(find_corpus("c", [str(path)], on_bad_line=on_bad_line)))


@pytest.mark.parametrize("form", ["lines", "array", "indented"])
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.json", "part-00000", "a.jsonl.1", "a.unknown", "a"])
@pytest.mark.parametrize("packed", ["", *PACKERS, ".GZ", "unnamed"])
def test_json_is_read_by_its_content(tmp_path: Path, form: str, name: str, packed: str) -> None:
    array = json.dumps([{"text": text} for text in TEXTS], indent=2 if form == "indented" else None).encode()
    content = lines(TEXTS) if form == "lines" else array
    path = tmp_path / (name if packed == "unnamed" else name + packed)
    pack = gzip.compress if packed == "unnamed" else PACKERS.get(packed.lower(), bytes)
    path.write_bytes(pack(content))
    assert read(path) == TEXTS
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET", "part-0", "a.bin"])
def test_parquet_is_read_by_its_content(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(parquet([*TEXTS]))
    assert read(tmp_path / name) == read(tmp_path) == TEXTS
    with pytest.raises(DataError, match=r"must have a column `body`, but has \['id', 'text'\]"):
        list(corpora.documents(find_corpus("c", [str(tmp_path)], "body")))


def test_null_in_parquet_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(["a", None, "b"]))
    with pytest.raises(DataError, match=r"Row 2 of `.*a.parquet` must have a string under `text`, but has null"):
        read(tmp_path)
    assert read(tmp_path, "skip") == ["a", "b"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_several_streams_are_read_and_damage_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    one = PACKERS[suffix](lines(TEXTS))
    path.write_bytes(one + one)
    assert read(path) == TEXTS * 2
    flipped = bytearray(one)
    flipped[len(one) // 2] ^= 0xFF
    for content in (one[: len(one) // 2], one[:-3], one + b"garbage that follows", bytes(flipped), lines(TEXTS)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.jsonl\S*` is broken (gzip|bzip2|xz|zstd)"):
            read(path, "skip")
    path.write_bytes(PACKERS[suffix](one))
    with pytest.raises(DataError, match="is compressed twice"):
        read(path)


def test_padding_behind_a_stream_is_no_text(tmp_path: Path) -> None:
    for suffix in (".gz", ".bz2", ".xz"):
        path = tmp_path / f"a.jsonl{suffix}"
        one = PACKERS[suffix](lines(TEXTS))
        path.write_bytes(one + b"\0" * (1 << 18) + one + b"\0" * 512)
        assert read(path) == TEXTS * 2


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(["a"]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines(TEXTS)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.jsonl.zst"):
        with pytest.raises(ConfigError, match=rf"{name}` needs pyarrow: .*es_megatron\[formats\]"):
            read(tmp_path / name)


BAD: dict[str, tuple[bytes, str]] = {
    "NUL characters": (b'{"text": "a\\u0000b"}', "holds NUL characters"),
    "NUL alone": (b"\0" * 512, "holds NUL characters .nothing else"),
    "null": (b'{"text": null}', "has null there"),
    "no such field": (b'{"body": "x"}', r"has \['body'\] instead: .*--text-key"),
    "not a string": (b'{"text": ["a"]}', "has list there"),
    "no JSON object": (b'"text"', "must be a JSON object, but is not .str"),
    "not JSON": (b'{"text": "a"', "must be a JSON object, but is not .Expecting"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "must be a JSON object, but is not .Extra"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "must be UTF-8, but is not .byte 13"),
    "too long": (b'{"text": "' + b"x" * 5000 + b'"}', "must be at most"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_an_error_or_counted(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGEST", 4096)
    line, told = BAD[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:3]) + line + b"\n" + lines(TEXTS[3:]))
    with pytest.raises(DataError, match=rf"Line 4 of `.*a.jsonl` .*{told}.*--on-bad-line skip"):
        read(path)
    tally = corpora.survey(find_corpus("c", [str(path)], on_bad_line="skip")).tally
    assert (tally.read, sum(tally.bad.values())) == (len(TEXTS) + 1, 1)
    assert tally.bad_places[0].startswith(f"Line 4 of `{path}`: ")
    assert read(path, "skip") == TEXTS


def test_bad_elements_of_an_array_are_counted_and_damage_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"}, {"text": "\xff"}, 3, {"text": null}, {"text": "b"}]')
    with pytest.raises(DataError, match=r"Entry 2 of the array in .*a.json` must be UTF-8"):
        read(path)
    tally = corpora.survey(find_corpus("c", [str(path)], on_bad_line="skip")).tally
    assert tally.bad == {"not UTF-8": 1, "no JSON object": 1, "null": 1}
    assert read(path, "skip") == ["a", "b"]
    for content in (
        b'[{"text": "a"} {"text": "b"}]',
        b'[{"text": "a"}',
        b"[",
        b'[{"text": "a"}]]',
        b'[{"text": "a"},]',
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"array in `.*a.json`"):
            read(path, "skip")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=8), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_an_array_is_the_same_in_pieces_of_any_size(
    texts: list[str], piece: int, indent: int | None, raw: bool
) -> None:
    content = json.dumps([{"text": text, "n": 1e300} for text in texts], indent=indent, ensure_ascii=not raw)
    encoded = content.encode("utf-8", "surrogatepass").replace(b"\xed", b"\xee")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_HEAD", piece)
        found = list(reading._read_array(Path("a"), io.BufferedReader(io.BytesIO(encoded))))  # type: ignore[arg-type]
    assert [entry.values for entry in found] == json.loads(encoded)


def test_byte_order_marks_are_dropped_and_counted(tmp_path: Path) -> None:
    marked = b"\xef\xbb\xbf" + lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(marked + marked)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftext")
    found = corpora.survey(find_corpus("c", [str(tmp_path)]))
    assert found.tally.byte_order_marks == 3
    assert read(tmp_path) == [*TEXTS, *TEXTS, "text"]
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS).decode().encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16: convert it"):
        read(tmp_path)


def test_a_folder_is_read_whole_or_what_is_not_is_named(tmp_path: Path) -> None:
    apart, folder = tmp_path / "apart", tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / ".ipynb_checkpoints").mkdir()
    apart.mkdir()
    (folder / "a.jsonl").write_bytes(lines(["a"]))
    (folder / "sub" / "README").write_text("readme")
    (folder / ".ipynb_checkpoints" / "a.jsonl").write_bytes(lines(["copy"]))
    (folder / ".a.jsonl.swp").write_text("x")
    (folder / "x.pdf").write_bytes(b"%PDF\0")
    (folder / "picture").write_bytes(b"\x89PNG\0\0")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    (apart / "b.jsonl").write_bytes(lines(["b"]))
    (folder / "link").symlink_to(apart)
    (folder / "z.jsonl").symlink_to(apart / "b.jsonl")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "top").symlink_to(tmp_path)
    corpus = find_corpus("c", [str(folder)])
    assert [str(path.relative_to(folder)) for path in corpus.files] == ["a.jsonl", "link/b.jsonl", "sub/README"]
    told = {
        str(Path(each.path).relative_to(folder)): (each.reason.split(" /")[0], each.lost) for each in corpus.left_out
    }
    assert told == {
        ".ipynb_checkpoints": ("is a hidden folder", False),
        ".a.jsonl.swp": ("is a hidden file", False),
        "x.pdf": ("is of no known form", True),
        "picture": ("is of no known form", True),
        "gone": ("is a link to nothing, or no file", True),
        "z.jsonl": ("is the same file as", False),
        "sub/up": ("is the same folder as", False),
        "sub/top": ("is the same folder as", False),
    }


def test_folders_that_a_pattern_does_not_enter_are_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_text(name)
    corpus = find_corpus("c", [f"{tmp_path}/*"])
    assert [each.path for each in corpus.left_out if each.lost] == [str(tmp_path / "sub")]
    assert find_corpus("c", [f"{tmp_path}/**"]).left_out == ()


def test_text_files_stay_one_document(tmp_path: Path) -> None:
    content = lines(TEXTS).decode()
    for name in ("a.txt", "a.md"):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == [content]
    (tmp_path / "nb.ipynb").write_text(json.dumps({"cells": []}, indent=1))
    assert read(tmp_path / "nb.ipynb") == [json.dumps({"cells": []}, indent=1)], "one object over several lines"


def test_duplicates_are_named_by_file(tmp_path: Path) -> None:
    for name, texts in (("a", TEXTS), ("b", ["new", *TEXTS[:5]]), ("c", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(texts))
    corpus = find_corpus("c", [str(tmp_path)])
    found = corpora.survey(corpus)
    assert found.duplicates == 35
    assert found.duplicates_by_file(corpus) == {str(tmp_path / "c.jsonl"): 30, str(tmp_path / "b.jsonl"): 5}


BOMB = """
import resource, sys
from pathlib import Path
from es_megatron.prepare import corpus, reading
from es_megatron.prepare.finding import find_corpus
import pyarrow.parquet
reading.LARGEST = 8 << 20
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
for path in sys.argv[1:]:
    tally = corpus.survey(find_corpus("c", [path], on_bad_line="skip")).tally
    print(tally.read, dict(tally.bad))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks /proc how much memory is used")
def test_a_small_file_that_unpacks_to_much_takes_little_memory(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 99_000}).encode() + b"\n"
    many, long = line * 1_500, b"x" * (150 << 20)
    array = b"[" + b",".join([line] * 1_500) + b"]"
    contents = {"many.jsonl": many, "long.jsonl": line + long, "long.txt": long, "array.json": array}
    paths: list[str] = []
    for name, content in contents.items():
        pack, suffix = (zstd, ".zst") if name.startswith("many") else (lambda c: gzip.compress(c, 1), ".gz")
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(pack(content))
        assert path.stat().st_size < len(content) / 50
        paths.append(str(path))
    (tmp_path / "mixed").mkdir()
    Path(paths[2]).rename(tmp_path / "mixed" / "long.txt.gz")  # a component of this alone has no document
    (tmp_path / "mixed" / "short.txt").write_text("text")
    paths[2] = str(tmp_path / "mixed")
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BOMB, *paths], capture_output=True, text=True, env=environment, check=False, timeout=100
    )
    expected = ["1500 {}", "2 {'too long': 1}", "2 {'too long': 1}", "1500 {}"]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]


def test_xz_that_asks_for_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "_XZ_MEMORY", 1 << 20)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines(TEXTS), preset=9))
    with pytest.raises(DataError, match=r"broken xz .Memory usage limit"):
        read(tmp_path)


def test_every_corpus_of_two_texts_has_both_sides() -> None:
    random = np.random.default_rng(0)
    for size in (2, 3, 7, 50):
        for share in (1e-9, 0.2, 0.999999):
            hashes = [random.integers(0, 1 << 64, size, np.uint64) for _ in range(20)]
            for held_N in corpora.choose_validation(hashes, share):
                assert 0 < held_N.sum() < size
    same = np.full(5, 7, np.uint64)
    assert not corpora.choose_validation([same | np.uint64(1 << 63)], 0.1)[0].any(), "one text has one side"


def test_a_text_that_is_added_to_the_held_out_ones_is_held_out_everywhere() -> None:
    high = np.arange(1 << 63, (1 << 63) + 5, dtype=np.uint64)
    one, other, trained = corpora.choose_validation([high, high[::-1], high[:1]], 0.01, [True, False, False])
    assert one.tolist() == [True, False, False, False, False]
    assert other.tolist() == [False, False, False, False, True]
    assert trained.tolist() == [True]
