"""Files as streams of bytes, unpacked by what they hold and not by what they are called.

Memory stays bounded however much a small file unpacks to: what is read is asked for piece by piece.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from typing_extensions import override

from es_megatron.errors import ConfigError, DataError

PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Endings of compressed files, and what each promises."""

_BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([0x50 + digit, 0x2A, 0x4D, 0x18]): "zstd" for digit in range(16)},  # frames that hold no data
}
_PIECE = 1 << 17
_XZ_MEMORY = 1 << 28
"""Bytes that unpacking xz may take; its strongest preset, -9, takes 65 MiB."""

BROKEN = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises, besides `OSError` without a number."""


def packing(path: Path) -> str | None:
    """How a file is compressed, by its first bytes; None: it is not.

    Raises:
        DataError: its ending promises a compression, and it holds none.
    """
    with path.open("rb") as file:
        head = file.read(8)
    found = packing_of(head)
    promised = PACKED.get(path.suffix.lower())
    if promised is not None and found is None and head:
        raise DataError(f"`{path}` is broken {promised} (its first bytes are none): download or compress it again.")
    return found


def packing_of(head: bytes) -> str | None:
    """How bytes that begin so are compressed; None: they are not."""
    return next((name for beginning, name in _BEGINNINGS.items() if head.startswith(beginning)), None)


@contextmanager
def unpacked(path: Path) -> Generator[BinaryIO]:
    """Open a file, compressed or not; what goes wrong inside is told with its path.

    Raises:
        ConfigError: it is zstd, and pyarrow is not installed.
        DataError: it cannot be read, is damaged, or is compressed twice.
    """
    name = "data"
    try:
        name = packing(path) or name
        with _open(path, name) as file:
            head = file.peek(8)[:8]
            if name != "data" and packing_of(head) is not None:
                raise DataError(f"`{path}` is compressed twice, the second time as {packing_of(head)}: unpack it once.")
            yield cast(BinaryIO, file)
    except BROKEN as error:
        raise DataError(f"`{path}` is broken {name} ({error}): download or compress it again.") from error
    except OSError as error:
        if error.errno is None:  # a library's, of the content
            raise DataError(f"`{path}` is broken {name} ({error}): download or compress it again.") from error
        raise DataError(f"`{path}` cannot be read: {error.strerror}. Check its permissions.") from error


def _open(path: Path, name: str) -> io.BufferedReader:
    if name == "gzip":
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(path, "rb")), _PIECE)
    if name == "zstd":
        return io.BufferedReader(_zstd(path), _PIECE)
    makers: dict[str, Callable[[], Any]] = {
        "bzip2": bz2.BZ2Decompressor,
        "xz": lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY),
    }
    return io.BufferedReader(_Unpacked(path, makers[name]) if name in makers else io.FileIO(path), _PIECE)


def _zstd(path: Path) -> Any:
    pa = pyarrow(path)
    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


def pyarrow(path: Path) -> Any:
    """The library that reads Parquet and zstd.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ConfigError(f"`{path}` needs pyarrow: install it with `pip install 'es_megatron[formats]'`.") from error
    return pa


class _Unpacked(io.RawIOBase):
    """One bzip2 or xz stream after the other.

    The readers of `bz2` and `lzma` take anything behind the first stream for its end, and say nothing.
    """

    def __init__(self, path: Path, make: Callable[[], Any]) -> None:
        self._file, self._make = path.open("rb"), make
        self._decompressor: Any = make()

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        while True:
            given = b""
            if self._decompressor.eof:
                given = self._decompressor.unused_data.lstrip(b"\0")  # padding
                while not given:
                    piece = self._file.read(_PIECE)
                    if not piece:
                        return 0
                    given = piece.lstrip(b"\0")
                self._decompressor = self._make()
            elif self._decompressor.needs_input:
                given = self._file.read(_PIECE)
                if not given:
                    raise EOFError("it ends before its end-of-stream marker was reached")
            content = self._decompressor.decompress(given, len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)

    @override
    def close(self) -> None:
        self._file.close()
        super().close()
