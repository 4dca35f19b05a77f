"""The few file operations checkpoints are made of, each durable once it returns.

Everything that changes the disk goes through the name `os` of this module alone, which is what lets the tests fail or
kill a save at every one of its steps.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of a folder that is being written."""
REPLACED = ".replaced"
"""Suffix of a complete folder whose successor of the same name is being moved into place."""
REMOVED = ".removed"
"""Suffix of a folder that is being deleted."""

BLOCK_BYTES = 1 << 22
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def sibling(path: Path, suffix: str) -> Path:
    """The path with a suffix appended to its last name."""
    return path.with_name(path.name + suffix)


def write_file(path: Path, parts: Iterable[memoryview | bytes]) -> tuple[int, int]:
    """Write a new file and flush it to the disk.

    Args:
        path: file to make; must not exist.
        parts: contiguous buffers, written one after the other without a copy.

    Returns:
        Bytes written and their CRC32.

    Raises:
        OSError: with the file's name, also where the write itself fails (full disk).
    """
    total, crc = 0, 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for block in _blocks(parts):
            crc = zlib.crc32(block, crc)
            total += len(block)
            written = 0
            while written < len(block):
                written += os.write(fd, block[written:])
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
    return total, crc


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file so that a crash leaves either the old or the new content."""
    partial = sibling(path, PARTIAL)
    remove_file(partial)
    try:
        write_file(partial, [content])
        os.rename(partial, path)
    except OSError:
        remove_file(partial)
        raise
    sync_folder(path.parent)


def checksum_file(path: Path, *, sync: bool = False) -> tuple[int, int]:
    """Size and CRC32 of a file.

    Args:
        path: file to read.
        sync: also flush it to the disk, for files written by somebody else.
    """
    total, crc = 0, 0
    buffer = bytearray(BLOCK_BYTES)
    fd = os.open(path, os.O_RDONLY)
    try:
        while (count := os.readv(fd, [buffer])) > 0:
            crc = zlib.crc32(memoryview(buffer)[:count], crc)
            total += count
        if sync:
            os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
    return total, crc


def list_files(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files under a folder, by path relative to it, sorted."""
    found: dict[str, int] = {}
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and flush their names; one that exists is fine."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    os.makedirs(path, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Flush the names in one folder to the disk, where the file system has such a thing."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def sync_tree(path: Path) -> None:
    """Flush the names in a folder and in all folders below it."""
    for parent, _, _ in os.walk(path, topdown=False, onerror=_raise):
        sync_folder(Path(parent))


def remove_file(path: Path) -> None:
    """Remove a file; one that is missing is fine."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def remove_tree(path: Path) -> None:
    """Remove a folder and everything below it; one that is missing is fine."""
    for parent, folders, names in os.walk(path, topdown=False):
        for name in names:
            remove_file(Path(parent, name))
        for name in folders:
            child = Path(parent, name)
            if child.is_symlink():
                remove_file(child)
        os.rmdir(parent)


def retire(path: Path) -> None:
    """Remove a folder so that a crash never leaves half of it under its own name."""
    removed = sibling(path, REMOVED)
    remove_tree(removed)
    os.rename(path, removed)
    sync_folder(path.parent)
    remove_tree(removed)


def move_into_place(partial: Path, final: Path) -> None:
    """Give a finished folder its name, in place of an older one of that name if there is one.

    A crash leaves the older one or the new one; where it comes between the two renames `restore` brings the older back.
    """
    restore(final)
    replaced = sibling(final, REPLACED)
    remove_tree(replaced)
    if not final.exists():
        os.rename(partial, final)
        sync_folder(final.parent)
        return
    os.rename(final, replaced)
    try:
        os.rename(partial, final)
    except OSError:
        os.rename(replaced, final)
        raise
    sync_folder(final.parent)
    remove_tree(replaced)


def restore(final: Path) -> bool:
    """Bring back the older folder if a crash hit its replacement; tells whether it had to."""
    replaced = sibling(final, REPLACED)
    if final.exists() or not replaced.exists():
        return False
    os.rename(replaced, final)
    sync_folder(final.parent)
    return True


def _blocks(parts: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    for part in parts:
        whole = memoryview(part)
        if whole.nbytes == 0:
            continue
        whole = whole.cast("B")
        for start in range(0, len(whole), BLOCK_BYTES):
            yield whole[start : start + BLOCK_BYTES]


def _raise(error: OSError) -> None:
    raise error
