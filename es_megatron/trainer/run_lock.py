"""The lock of a run's folder: one run at a time, released by the system when its process ends, however it ends.

A record lock (`fcntl.lockf`), held by rank 0: forked children do not inherit it, and it works on network file systems
with a lock service. Where there are no locks the run goes on with a warning.
"""

from __future__ import annotations

import datetime as dt
import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from es_megatron.errors import ConfigError

LOGGER = logging.getLogger(__name__)

NAME = "run.lock"
"""File of a run's folder; it stays after the run, and means nothing unless it is locked."""
TAKEN = {errno.EACCES, errno.EAGAIN}
"""What a lock that somebody else holds gives."""


class RunLock:
    """The lock of one folder, held from `take` to `release`."""

    def __init__(self, directory: Path) -> None:
        """Nothing is locked yet."""
        self._directory = directory
        self._file: int | None = None

    def take(self) -> None:
        """Lock the folder, which is made if it does not exist, and note who holds it.

        Raises:
            ConfigError: another process holds it; says which, and how to go on.
            OSError: the folder or the file cannot be made.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        # The only descriptor of this file in the process: closing any other one would release the lock.
        file = os.open(self._directory / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                holder = os.pread(file, 4096, 0)
                os.close(file)
                raise ConfigError(self._refusal(holder)) from None
            LOGGER.warning(
                "%s cannot be locked (%s): see to it that only one run at a time has this folder",
                self._directory / NAME,
                error.strerror,
            )
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(about_this_process()).encode() + b"\n", 0)
        self._file = file

    def release(self) -> None:
        """Give the folder back; without `take` nothing happens."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _refusal(self, holder: bytes) -> str:
        try:
            said: dict[str, Any] = json.loads(holder)
            who = f"process {said['pid']} on {said['host']} (rank 0 of {said['ranks']}), since {said['since']}"
            cure = f"end it with `kill {said['pid']}` on {said['host']}, after which it saves"
        except (ValueError, KeyError, TypeError):  # it has the lock, and has not written yet
            who, cure = "another process", "end it"
        return (
            f"`{self._directory}` must be the folder of one run at a time, but {who} trains there. Wait for it, {cure}"
            " (a launcher that was killed leaves its ranks behind), or choose another `run.directory`."
        )


def about_this_process() -> dict[str, Any]:
    """What the lock file says of its holder."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "ranks": os.environ.get("WORLD_SIZE") or "1",
        "since": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
