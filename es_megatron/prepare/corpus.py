"""Documents of a corpus: which files hold them, how they are read, which are kept, and on which side they stand.

Everything here is a pure function of the files and the settings: no random numbers, no dependence on worker processes.

Shapes: N documents of one corpus, in file order, those without text left out.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from es_megatron.errors import ConfigError, DataError

LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
"""Suffixes of files with one JSON object a line; any other file is one document of plain text."""

IN_FOLDERS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".txt", ".txt.gz", ".md", ".rst")
"""Suffixes looked for in a folder."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Corpus:
    """A component's name and its files, in the order in which they are read."""

    name: str
    """Name of the component, and of its files."""

    files: tuple[Path, ...]
    """JSON lines or plain text, gzipped or not."""

    text_key: str = "text"
    """The field of a JSON line that holds the text."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus has found."""

    bytes_N: NDArray[np.int64]
    """Size of each document in UTF-8."""

    hashes_N: NDArray[np.uint64]
    """Hash of each document's text; equal texts have equal hashes."""

    empty: int
    """Documents left out because they hold no text or white space alone."""

    @property
    def duplicates(self) -> int:
        """Documents whose text stood before."""
        return len(self.hashes_N) - len(np.unique(self.hashes_N))


def parse_component(argument: str) -> tuple[str, str]:
    """Split `NAME=PATH` of the command line.

    Raises:
        ConfigError: There is no `=`, or the name cannot be the name of a file.
    """
    name, equals, path = argument.partition("=")
    if not equals or not path or not _NAME.fullmatch(name):
        raise ConfigError(
            f"`--component` must be NAME=PATH with a NAME of letters, digits, `_`, `-` and `.`, but is {argument!r} "
            "instead."
        )
    return name, path


def find_corpus(name: str, paths: Sequence[str], text_key: str = "text") -> Corpus:
    """Find the files of a component: each path is a file, a folder (searched in depth), or a glob pattern.

    Raises:
        DataError: Nothing is there, or a folder has no file of a known suffix.
    """
    files: list[Path] = []
    for path in paths:
        if Path(path).is_dir():
            files.extend(_folder_files(name, Path(path)))
            continue
        matches = [path] if Path(path).exists() else glob.glob(path, recursive=True)
        found = sorted(Path(match) for match in matches if Path(match).is_file())
        if not found:
            raise DataError(f"`{path}` of component `{name}` does not exist: correct the path or the pattern.")
        files.extend(found)
    return Corpus(name, tuple(dict.fromkeys(files)), text_key)


def _folder_files(name: str, folder: Path) -> list[Path]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(IN_FOLDERS) and path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise DataError(
            f"Folder `{folder}` of component `{name}` must have files ending in one of {', '.join(IN_FOLDERS)}, but "
            f"has none: give a pattern for other plain text, such as `{name}={folder}/**/*.py`."
        )
    return files


def read_documents(corpus: Corpus) -> Iterator[str]:
    """Read all documents of a corpus, empty ones too.

    Raises:
        DataError: A file cannot be read, is broken gzip or not UTF-8, or a line is not a JSON object with the key.
    """
    for path in corpus.files:
        try:
            yield from _read_lines(path, corpus.text_key) if path.name.endswith(LINES) else _read_text(path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"`{path}` is broken gzip ({error}): download or compress it again.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"`{path}` must be UTF-8 text, but byte {error.start} is not: convert it (`iconv -t UTF-8`), or "
                "leave it out."
            ) from error
        except OSError as error:
            raise DataError(f"`{path}` cannot be read: {error.strerror or error}. Check its permissions.") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def _read_text(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield file.read().decode("utf-8-sig")  # a byte-order mark is no text


def _read_lines(path: Path, key: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"Line {number} of `{path}`"
            try:
                entry = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{where} must be UTF-8, but is not: convert the file, or remove the line.") from error
            except ValueError as error:
                raise DataError(
                    f"{where} must be a JSON object, but is not ({error}): correct or remove it."
                ) from error
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                keys = sorted(entry)[:10] if isinstance(entry, dict) else type(entry).__name__
                raise DataError(
                    f"{where} must be a JSON object with a string under `{key}`, but has {keys} instead: name the key "
                    "that holds the text with `--text-key`."
                )
            text: str = entry[key]
            # JSON may spell half a surrogate pair, which UTF-8 and the tokenizer cannot.
            yield _SURROGATE.sub("\ufffd", text)


def documents(corpus: Corpus) -> Iterator[str]:
    """Read the documents that a `Survey` counts: those that are more than white space."""
    return (text for text in read_documents(corpus) if text.strip())


def survey(corpus: Corpus, report: Callable[[int], object] = lambda _: None) -> Survey:
    """Read a corpus once, checking every line, before hours of work rest on it.

    Args:
        corpus: What to read.
        report: Called with the bytes of text of each document.

    Raises:
        DataError: See `read_documents`; or the corpus has no text at all.
    """
    sizes: list[int] = []
    hashes: list[int] = []
    empty = 0
    for text in read_documents(corpus):
        if not text.strip():
            empty += 1
            continue
        encoded = text.encode("utf-8")
        sizes.append(len(encoded))
        hashes.append(_hash(encoded))
        report(len(encoded))
    if not sizes:
        raise DataError(
            f"Component `{corpus.name}` has no document with text in its {len(corpus.files)} file(s): leave it out."
        )
    return Survey(np.asarray(sizes, np.int64), np.asarray(hashes, np.uint64), empty)


def hash_text(text: str) -> int:
    """The hash by which a document is held out or not; equal texts have equal ones."""
    return _hash(text.encode("utf-8"))


def _hash(encoded: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def choose_evenly(bytes_N: NDArray[np.int64], limit: int | None) -> NDArray[np.bool_]:
    """Choose documents evenly over a corpus, whatever their sizes, of at most `limit` bytes together.

    Args:
        bytes_N: Size of each document.
        limit: In bytes; None keeps all.

    Returns:
        Which documents are kept, bool [N]; none if the first one tried is larger than the limit.
    """
    kept_N = np.ones(len(bytes_N), np.bool_)
    count, total = len(bytes_N), int(bytes_N.sum())
    while limit is not None and total > limit:
        count = min(count - 1, int(count * limit / total))
        kept_N[:] = False
        # Middles of `count` equal stretches of the corpus.
        kept_N[((2 * np.arange(count) + 1) * len(bytes_N)) // (2 * max(count, 1))] = True
        total = int(bytes_N[kept_N].sum())
    return kept_N


def choose_validation(hashes_N: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Choose the documents held out for validation by their text alone, bool [N].

    A text stands on the same side in every corpus and every preparation with this share, so that exact duplicates never
    straddle the split; a larger share only adds to the held-out texts.
    """
    # 53 bits: exact in float64
    return (hashes_N >> np.uint64(11)).astype(np.float64) < share * 2.0**53
