"""The C library's disk operations, counted and failed at one of them: `shim.c`, built here and preloaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")


class Kind(IntEnum):
    """Disk operations that change something; they add up."""

    OPEN = 1
    WRITE = 2
    SYNC = 4
    RENAME = 8
    UNLINK = 16
    MKDIR = 32
    TRUNCATE = 64
    CLOSE = 128


ALL = sum(Kind)
SPACE = Kind.OPEN + Kind.WRITE + Kind.SYNC + Kind.MKDIR
"""What a full disk refuses."""
NAMES = Kind.OPEN + Kind.RENAME + Kind.UNLINK + Kind.MKDIR
"""What a folder refuses whose rights are lost; files that are open stay so."""


class Action(IntEnum):
    """What happens at the operation."""

    COUNT = 0
    KILL = 1
    FAIL = 2
    PHOTOGRAPH = 3
    """A copy of the folder before every operation, and in the middle of writes."""
    TEAR = 4
    """The end in the middle of a write; before any other operation."""


@dataclass(frozen=True)
class Fault:
    """What happens at which operation below a folder."""

    folder: Path
    action: Action = Action.COUNT
    at: int = 0
    """Number of the operation, from 1."""
    error: int = 0
    kinds: int = ALL
    onwards: bool = False
    """Whether it happens to all that follow, too."""
    photographs: Path = Path()

    def lay(self) -> None:
        """Get ready for it, in this process and all that it forks."""
        folder, photographs = str(self.folder.resolve()).encode(), str(self.photographs.resolve()).encode()
        more = (ctypes.c_int(number) for number in (self.kinds, self.error, self.onwards, self.action))
        _library().faults_reset(folder, photographs, ctypes.c_long(self.at), *more)


def arm(on: bool) -> None:
    """From now on the operations of this process count, or no more."""
    _library().faults_arm(int(on))


def count() -> int:
    """Operations so far, of all armed processes."""
    return int(_library().faults_count())


def loaded() -> bool:
    """Whether the library stands before the C library in this process."""
    return hasattr(ctypes.CDLL(None), "faults_reset")


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """Compile the library, once for each version of its source."""
    found = compiler()
    if found is None:
        raise SystemExit("a C compiler is needed (cc or gcc): it builds the library that makes disk operations fail")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shim-{hashlib.blake2b(SOURCE.read_bytes(), digest_size=6).hexdigest()}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        subprocess.run([found, "-O1", "-shared", "-fPIC", "-o", partial, SOURCE, "-ldl"], check=True)
        partial.rename(path)
    return path


def preload(folder: Path, module: str) -> None:
    """Run this process's command again with the library before all others, unless it is there."""
    if not loaded():
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment = {**os.environ, **threads, "LD_PRELOAD": str(build(folder).resolve())}
        environment |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.faults_count.restype = ctypes.c_long
    return library
