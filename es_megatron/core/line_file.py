"""Text that a run writes line by line. No run ends for it: what cannot be written is told once, and the run goes on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

LOGGER = logging.getLogger(__name__)

Keep = Callable[[dict[str, Any]], bool]


class LineFile:
    """A file that lines are appended to."""

    def __init__(self, path: Path, keep: Keep | None = None, head: Sequence[str] = ()) -> None:
        """Open it, or make it and its folder.

        Args:
            path: of the file; a link stays one.
            keep: tells of a JSON line that is there already whether it stays; those of which it raises, or that nobody
                can read, go with a warning. None: everything stays.
            head: lines that begin the file anew, before those that stay.
        """
        self._path = path
        self._file: TextIO | None = None
        """None if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if head or (keep is not None and path.is_file()):
                self._begin_anew(keep or (lambda _: True), head)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            self._give_up(error)

    def write(self, line: str) -> None:
        """Append a line; it has reached the file system when this returns."""
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    def _begin_anew(self, keep: Keep, head: Sequence[str]) -> None:
        """Write the file anew; the old one stays whole until the new one is."""
        target = self._path.resolve()
        partial = target.with_name(f"{target.name}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in head)
                if target.is_file():
                    file.writelines(kept_lines(target, keep))
            os.replace(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _give_up(self, error: OSError) -> None:
        LOGGER.warning("%s cannot be written (%s): the run goes on without it", self._path, error.strerror)
        if self._file is not None:
            with suppress(OSError):  # it tries to write the rest
                self._file.close()
        self._file = None


def kept_lines(path: Path, keep: Keep) -> Iterator[str]:
    """Lines of JSON objects that are to stay, one by one; see `LineFile`."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                stays = keep(json.loads(line)) and line.endswith("\n")
            except (ValueError, KeyError, TypeError):
                LOGGER.warning("line %d of %s cannot be read; it is left out", number, path)
                continue
            if stays:
                yield line
