"""Losses on their way: blocks of consecutive ids, each a file of its own, so that scoring goes on where it was stopped.

A block's file is float32[N] and the CRC-32 of it; one that is damaged is made anew. The blocks stand in a hidden folder
beside the output, which goes once the output is complete.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.checkpoint import disk, sealed
from es_megatron.errors import CheckpointError

Float32 = npt.NDArray[np.float32]

MOST_BLOCKS = 4096
SMALLEST_BLOCK = 256
"""Ids of a block, at least."""
IDENTITY = "identity.json"
CRC_BYTES = 4


class LossBlocks:
    """The blocks of one output."""

    def __init__(self, output: Path, total: int) -> None:
        """Say where they stand.

        Args:
            output: the folder that will hold the losses.
            total: ids of the blend.
        """
        self.folder = output.with_name(f".{output.name}.scoring")
        self.total = total
        self.size = max(SMALLEST_BLOCK, -(-total // MOST_BLOCKS))

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Make the folder, or go on in it; on one rank.

        Raises:
            CheckpointError: it holds losses of another model, blend or number of tokens.
        """
        path = self.folder / IDENTITY
        if path.is_file():
            if sealed.read_sealed(path) != dict(identity):
                raise CheckpointError(
                    f"`{self.folder}` holds losses on their way of another model, blend or number of tokens. Finish "
                    "that command, remove the folder, or name another output."
                )
            return
        disk.remove_tree(self.folder)
        disk.make_folder(self.folder)
        disk.write_file(path, [sealed.seal(dict(identity))])

    def bounds(self, block: int) -> tuple[int, int]:
        """First id of a block, and the one after its last."""
        return block * self.size, min(self.total, (block + 1) * self.size)

    def missing(self) -> list[int]:
        """Blocks that are not there, or damaged."""
        return [block for block in range(-(-self.total // self.size)) if self.read(block) is None]

    def write(self, block: int, loss: Float32) -> None:
        """Write a block at once and whole."""
        content = loss.tobytes()
        disk.replace_file(self._path(block), content + zlib.crc32(content).to_bytes(CRC_BYTES, "little"))

    def read(self, block: int) -> Float32 | None:
        """A block's losses; None if it is not there, or damaged."""
        try:
            content = self._path(block).read_bytes()
        except OSError:
            return None
        low, high = self.bounds(block)
        body, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
        whole = len(body) == 4 * (high - low) and zlib.crc32(body).to_bytes(CRC_BYTES, "little") == crc
        return np.frombuffer(body, np.float32) if whole else None

    def gather(self, low: int, high: int) -> Float32:
        """Losses of ids [low, high).

        Raises:
            CheckpointError: a block is missing.
        """
        found = np.empty(high - low, np.float32)
        for block in range(low // self.size, -(-high // self.size) if high > low else 0):
            loss = self.read(block)
            if loss is None:
                raise CheckpointError(f"{self._path(block)} is missing or damaged. Run the command again.")
            first, end = self.bounds(block)
            left, right = max(low, first), min(high, end)
            found[left - low : right - low] = loss[left - first : right - first]
        return found

    def remove(self) -> None:
        """Remove the folder; on one rank."""
        disk.remove_tree(self.folder)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}"
