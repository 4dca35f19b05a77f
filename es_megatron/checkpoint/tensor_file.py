"""Safetensors files, written from and read into arrays in place.

The stock library can read them, but it wants all bytes in memory to write a file, and copies a tensor to read it. The
format is small: 8 bytes with the length of the header, a JSON header, and the data back to back
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.checkpoint import disk
from es_megatron.checkpoint.sealed import format_crc, parse_json
from es_megatron.errors import CheckpointError

Array = npt.NDArray[Any]

_DTYPES = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class FileRecord:
    """What a folder's manifest says about one tensor file."""

    name: str
    bytes: int
    crc32: str
    tensors: dict[str, dict[str, Any]]
    """Per tensor: file, dtype, shape and crc32."""


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> FileRecord:
    """Write one-dimensional float32 or uint8 arrays as a safetensors file, without a second copy of them.

    Args:
        path: file to make; must not exist.
        tensors: contiguous arrays by name.

    Returns:
        Sizes and checksums, computed from what was handed to the disk.

    Raises:
        OSError: if the file cannot be written.
    """
    # Widest type first, so that every tensor is aligned within the file.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    crcs: dict[str, int] = {}

    def parts() -> Iterator[memoryview | bytes]:
        yield _header(ordered)
        for name, tensor in ordered.items():
            crcs[name] = 0
            for start in range(0, len(tensor), disk.BLOCK_BYTES):
                block = tensor[start : start + disk.BLOCK_BYTES].data.cast("B")
                crcs[name] = zlib.crc32(block, crcs[name])
                yield block

    size, crc = disk.write_file(path, parts())
    entries = {
        name: {"file": path.name, "dtype": _NAMES[t.dtype], "shape": [len(t)], "crc32": format_crc(crcs[name])}
        for name, t in ordered.items()
    }
    return FileRecord(path.name, size, format_crc(crc), entries)


class TensorFile:
    """An open safetensors file of which single tensors are read."""

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Raises:
            CheckpointError: if the file is missing, truncated, or its header makes no sense.
        """
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing.") from error
        try:
            self._header, self._data_start = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read_into(self, name: str, entry: Mapping[str, Any], target: Array) -> None:
        """Read one tensor and verify it.

        Args:
            name: name of the tensor.
            entry: its entry in the folder's manifest.
            target: contiguous array of the recorded type and shape, overwritten.

        Raises:
            CheckpointError: if the tensor is missing, of another shape, truncated, or its checksum differs.
        """
        described = self._header.get(name)
        expected = {"dtype": _NAMES[target.dtype], "shape": list(target.shape)}
        if not isinstance(described, dict):
            raise self._damage(f"tensor {name} is missing")
        for key, value in expected.items():
            if described.get(key) != value or entry.get(key) != value:
                raise self._damage(f"tensor {name} must have {key} {value}, but has {described.get(key)} instead")
        self._seek(name, described.get("data_offsets"), target.nbytes)
        crc = 0
        rest = target.data.cast("B") if target.nbytes else memoryview(b"")
        while len(rest) > 0:
            count = self._file.readinto(rest[: disk.BLOCK_BYTES])
            if not count:
                raise self._damage(f"tensor {name} is truncated")
            crc = zlib.crc32(rest[:count], crc)
            rest = rest[count:]
        if format_crc(crc) != entry.get("crc32"):
            raise self._damage(f"tensor {name} has checksum {format_crc(crc)}, but {entry.get('crc32')} was recorded")

    def _seek(self, name: str, offsets: Any, nbytes: int) -> None:
        match offsets:
            case [int(start), int(end)] if start >= 0 and end - start == nbytes:
                self._file.seek(self._data_start + start)
            case _:
                raise self._damage(f"tensor {name} has offsets {offsets} for {nbytes} bytes")

    def _read_header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= self.path.stat().st_size - _LENGTH_BYTES:
            raise self._damage(f"a header of {length} bytes does not fit the file")
        content = b""
        while len(content) < length and (more := self._file.read(length - len(content))):
            content += more
        return parse_json(content, self.path), _LENGTH_BYTES + length

    def _damage(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}.")


def _header(tensors: Mapping[str, Array]) -> bytes:
    described: dict[str, Any] = {_METADATA: {"format": "es_state"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        described[name] = {"dtype": _NAMES[tensor.dtype], "shape": [len(tensor)], "data_offsets": [start, end]}
    content = json.dumps(described, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _LENGTH_BYTES)
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content
