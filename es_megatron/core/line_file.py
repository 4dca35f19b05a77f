"""Text that a run writes line by line. No run ends for it: what cannot be written is told once, and the run goes on.

A file has one writer: it is locked (`fcntl.lockf`) while it is open. A second process leaves it as it is and says so.
The system forgets such a lock when the process closes any descriptor of the file, so a process that writes one must
not read it under its name meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

LOGGER = logging.getLogger(__name__)

LOCKED = {errno.EACCES, errno.EAGAIN}
"""What a lock that somebody else holds gives."""

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
            self._file = open_locked(path)
            if head or keep is not None:
                self._file = self._begin_anew(self._file, keep or (lambda _: True), head)
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

    def _begin_anew(self, old: TextIO, keep: Keep, head: Sequence[str]) -> TextIO:
        """Write the file anew, under lock all the while; the old one stays whole until the new one is."""
        target = self._path.resolve()
        if not target.is_file():  # a device keeps nothing
            old.writelines(f"{line}\n" for line in head)
            return old
        partial = target.with_name(f"{target.name}.partial")
        file = partial.open("w", encoding="utf-8")
        try:
            lock(file)
            file.writelines(f"{line}\n" for line in head)
            old.seek(0)
            file.writelines(kept_lines(old, target, keep))
            file.flush()
            os.replace(partial, target)
        except OSError:
            with suppress(OSError):  # it tries to write the rest
                file.close()
            partial.unlink(missing_ok=True)
            raise
        old.close()
        return file

    def _give_up(self, error: OSError) -> None:
        why = "another process writes it" if error.errno in LOCKED else error.strerror
        LOGGER.warning("%s cannot be written (%s): the run goes on without it", self._path, why)
        if self._file is not None:
            with suppress(OSError):  # it tries to write the rest
                self._file.close()
        self._file = None


def open_locked(path: Path) -> TextIO:
    """Open a file to read and append, and lock it.

    Raises:
        OSError: it cannot be opened, or another process has it.
    """
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            lock(file)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            raise
        file.close()  # another process has put a new file there since


def lock(file: TextIO) -> None:
    """Lock a file for this process, where the file system has locks; raises `OSError` if another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in LOCKED:
            raise


def kept_lines(file: TextIO, path: Path, keep: Keep) -> Iterator[str]:
    """Lines of JSON objects that are to stay, one by one, of the open file at a path."""
    for number, line in enumerate(file, 1):
        try:
            stays = line.endswith("\n") and keep(json.loads(line))
        except (ValueError, KeyError, TypeError):
            LOGGER.warning("line %d of %s cannot be read; it is left out", number, path)
            continue
        if stays:
            yield line
