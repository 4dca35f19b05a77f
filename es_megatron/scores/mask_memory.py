"""Where kept masks live: in each rank's own memory, or once per node in files that its ranks map.

Such a file has no name any more once everybody has mapped it: it is gone with the last process that uses it, however
that ends.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from es_megatron.data.mask import KeptMask, fill_index, lay_out, mask_bytes
from es_megatron.errors import ConfigError
from es_megatron.rank_grid import RankGrid

UInt8 = npt.NDArray[np.uint8]


class MaskMemory:
    """Makes masks of pieces that arrive on every rank; methods are collective over the world."""

    def __init__(self, folder: str | None, grid: RankGrid) -> None:
        """Find out who shares.

        Args:
            folder: node-local folder for shared masks (`/dev/shm`); None: each rank has its own.
            grid: the ranks.
        """
        self._grid = grid
        self._folder = None if folder is None else Path(folder)
        self._made = 0
        self._writes, self._token = True, ""
        if folder is None:
            return
        here = (socket.gethostname(), *_identity(Path(folder)))
        told = grid.gather_objects((here, secrets.token_hex(8)))
        first = next(rank for rank, (place, _) in enumerate(told) if place == here)
        self._writes, self._token = first == grid.world_rank, told[first][1]

    def build(self, pieces: Iterable[UInt8], samples: int) -> KeptMask:
        """Join the pieces of a mask.

        Args:
            pieces: packed bits in order, consumed on every rank (making them may be collective).
            samples: rows of the component.

        Raises:
            ConfigError: on every rank, if a node's folder cannot hold the mask.
        """
        if self._folder is None:
            return _fill(np.zeros(mask_bytes(samples), dtype=np.uint8), pieces, samples)
        path = self._folder / f"es-mask-{self._token}-{self._made}"
        self._made += 1
        try:
            buffer = self._agreed(lambda: _map_new(path, mask_bytes(samples)) if self._writes else None)
            if buffer is not None:
                mask = _fill(buffer, pieces, samples)
            else:
                for _ in pieces:
                    pass
            self._grid.barrier()
            mapped = self._agreed(lambda: None if self._writes else np.memmap(path, np.uint8, "r"))
            return mask if mapped is None else KeptMask.of_buffer(mapped, samples)  # pyright: ignore[reportPossiblyUnboundVariable]
        finally:
            if self._writes:
                path.unlink(missing_ok=True)

    def share(self, packed: UInt8, samples: int) -> KeptMask:
        """A mask whose packed bits every rank has already, as after loading a checkpoint."""
        return self.build([packed], samples)

    def _agreed(self, make: Callable[[], UInt8 | None]) -> UInt8 | None:
        made, problem = None, None
        try:
            made = make()
        except OSError as error:
            problem = f"`{error.filename or self._folder}`: {error.strerror}"
        problems = [each for each in self._grid.gather_objects(problem) if each is not None]
        if problems:
            raise ConfigError(
                f"`mask_folder` must be a folder on every node with room for the kept masks, but {problems[0]}. "
                "Choose another one, or leave it out: each rank then holds its masks itself."
            )
        return made


def _fill(buffer: UInt8, pieces: Iterable[UInt8], samples: int) -> KeptMask:
    at = 0
    for piece in pieces:
        buffer[at : at + len(piece)] = piece
        at += len(piece)
    fill_index(lay_out(buffer, samples))
    return KeptMask.of_buffer(buffer, samples)


def _map_new(path: Path, size: int) -> UInt8:
    """Make a file whose space is taken at once: a full one must fail here, not at a write into the map."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    return np.memmap(path, np.uint8, "r+")


def _identity(folder: Path) -> tuple[int, int]:
    """What tells a node's folder from another's; one that is missing is told of when it is used."""
    try:
        found = folder.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)
