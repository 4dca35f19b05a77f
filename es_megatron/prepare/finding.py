"""Which files a component has: what is named, what is found in folders, and what is left out there and why."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from es_megatron.errors import ConfigError, DataError
from es_megatron.prepare.reading import LINES, TEXT, looks_readable

OnBadLine = Literal["error", "skip"]

_NO_FILE = "is a link to nothing, or no file"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class LeftOut(NamedTuple):
    """A file or folder that is not read."""

    path: str
    """Where it is."""

    reason: str
    """Why."""

    lost: bool
    """Whether there may be text in it that nobody has decided to leave out."""


@dataclass(frozen=True)
class Corpus:
    """A component's name and its files, in the order in which they are read."""

    name: str
    """Name of the component, and of its files."""

    files: tuple[Path, ...]
    """Text in any of the forms that are read, compressed or not."""

    text_key: str = "text"
    """The field of JSON or column of Parquet that holds the text."""

    on_bad_line: OnBadLine = "error"
    """What is done with an entry that is no document: an error, or left out and counted."""

    left_out: tuple[LeftOut, ...] = ()
    """What stood in its folders and is not read."""


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


def find_corpus(name: str, paths: Sequence[str], text_key: str = "text", on_bad_line: OnBadLine = "error") -> Corpus:
    """Find the files of a component: each path is a file, a folder (searched in depth), or a glob pattern.

    Raises:
        DataError: Nothing is there, or a folder has no file that can be read.
    """
    files: dict[str, Path] = {}
    left_out: list[LeftOut] = []
    for path in paths:
        if Path(path).is_dir():
            found, out = _search(name, Path(path))
            left_out += out
        else:
            matches = [path] if Path(path).exists() else glob.glob(path, recursive=True)
            found = sorted(Path(match) for match in matches if Path(match).is_file())
            left_out += _unmatched(found, matches)
            if not found:
                raise DataError(f"`{path}` of component `{name}` does not exist: correct the path or the pattern.")
        for each in found:
            first = files.setdefault(os.path.realpath(each), each)
            if first is not each and first != each:
                left_out.append(LeftOut(str(each), f"is the same file as {first}", lost=False))
    return Corpus(name, tuple(files.values()), text_key, on_bad_line, tuple(left_out))


def _unmatched(found: Sequence[Path], matches: Sequence[str]) -> Iterator[LeftOut]:
    """What a pattern names besides files; folders with files that it names too are no loss."""
    entered = {parent for path in found for parent in path.parents}
    for match in sorted(matches):
        path = Path(match)
        if path.is_dir() and path not in entered:
            yield LeftOut(match, "is a folder, which the pattern does not enter", lost=True)
        elif not path.is_dir() and not path.is_file():
            yield LeftOut(match, _NO_FILE, lost=True)


def _search(name: str, folder: Path) -> tuple[list[Path], list[LeftOut]]:
    files: list[Path] = []
    left_out: list[LeftOut] = []
    for found in _walk(folder):
        if isinstance(found, LeftOut):
            left_out.append(found)
        elif not found.is_file():
            left_out.append(LeftOut(str(found), _NO_FILE, lost=True))
        elif looks_readable(found):
            files.append(found)
        else:
            left_out.append(LeftOut(str(found), "is of no known form", lost=True))
    if not files:
        raise DataError(
            f"Folder `{folder}` of component `{name}` must have files that hold JSON or Parquet, or end in one of "
            f"{', '.join((*LINES, *TEXT))}, but has none: give a pattern for other plain text, such as "
            f"`{name}={folder}/**/*.py`."
        )
    return sorted(files), left_out


def _walk(folder: Path) -> Iterator[Path | LeftOut]:
    """All files below a folder, links followed; hidden ones and folders that were seen are told instead."""

    def failed(error: OSError) -> None:
        raise DataError(f"`{error.filename}` cannot be read ({error.strerror}): check its permissions.") from error

    root = Path(os.path.realpath(folder))
    seen = {str(root): folder, **{str(above): above for above in root.parents}}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        below = [(each, Path(parent, each)) for each in sorted(folders)]
        folders.clear()
        for each, path in below:
            if each.startswith("."):
                yield LeftOut(str(path), "is a hidden folder", lost=False)
                continue
            first = seen.setdefault(os.path.realpath(path), path)
            if first != path:
                yield LeftOut(str(path), f"is the same folder as {first}", lost=False)
                continue
            folders.append(each)
        for each in sorted(names):
            path = Path(parent, each)
            yield LeftOut(str(path), "is a hidden file", lost=False) if each.startswith(".") else path
