"""Text that a run writes line by line. No run ends for it: what cannot be written is told once, and the run goes on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

LOGGER = logging.getLogger(__name__)


class LineFile:
    """A file that lines are appended to."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it.

        Raises:
            OSError: it cannot be opened.
        """
        self._path = path
        self._file: TextIO | None = path.open("a", encoding="utf-8")
        """None once it could not be written."""

    def write(self, line: str) -> None:
        """Append a line; it has reached the file system when this returns."""
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            LOGGER.warning("%s cannot be written (%s): the run goes on without it", self._path, error.strerror)
            with suppress(OSError):  # it tries to write the rest
                self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def kept_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Lines of JSON objects that are to stay; none where there is no file.

    Args:
        path: of the file.
        keep: tells of a line's content; lines of which it raises, or that nobody can read, are dropped with a warning.
    """
    if not path.exists():
        return []
    kept: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                if keep(json.loads(line)) and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                LOGGER.warning("line %d of %s cannot be read; it is left out", number, path)
    return kept


def replace_lines(path: Path, lines: list[str]) -> None:
    """Write a file anew; one that is there stays whole until the new one is."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)
