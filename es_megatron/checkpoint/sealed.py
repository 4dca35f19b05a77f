"""JSON documents that carry their own checksum, so that one damaged byte in them is noticed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard, cast

from es_megatron.errors import CheckpointError

SEAL = "crc32"


def format_crc(crc: int) -> str:
    """A CRC32 as documents hold it: eight hexadecimal digits."""
    return f"{crc:08x}"


def encode_json(document: Mapping[str, Any], what: str) -> bytes:
    """Bytes of a JSON document that reads back as what was given.

    Raises:
        CheckpointError: if a key is not a string or a value is not JSON.
    """
    _check_keys(document, what)
    try:
        return json.dumps(document, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} must be made of JSON values, but {error}; convert it first.") from error


def seal(document: Mapping[str, Any]) -> bytes:
    """Bytes of a JSON document with its checksum added under the key `crc32`."""
    body = encode_json(document, "the document")
    return encode_json({**document, SEAL: format_crc(zlib.crc32(_canonical(json.loads(body))))}, "the document")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a document written by `seal`.

    Raises:
        CheckpointError: if it is missing, cannot be parsed, or does not match its checksum.
    """
    document = read_json(path)
    recorded = document.pop(SEAL, None)
    check_crc(_canonical(document), recorded, path)
    return document


def check_crc(content: bytes, recorded: object, path: Path) -> None:
    """Refuse content of file `path` whose CRC32 is not the one recorded; raises `CheckpointError`."""
    actual = format_crc(zlib.crc32(content))
    if actual != recorded:
        raise CheckpointError(f"{path} is damaged: its content has checksum {actual}, but {recorded} was recorded.")


def leads_down(name: object) -> TypeGuard[str]:
    """Whether a name in a document is that of something below a folder: relative, and never upwards."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def file_inside(folder: Path, name: object, source: Path) -> Path:
    """The file of a folder that a document names; following links, it must be inside the folder.

    Args:
        folder: that the name is relative to.
        name: what the document says.
        source: the document, for messages.

    Raises:
        CheckpointError: the name is absolute, leads upwards, or is that of a link which leads out.
    """
    if leads_down(name) and (folder / name).resolve().is_relative_to(folder.resolve()):
        return folder / name
    raise CheckpointError(
        f"{source} must name files inside {folder}, but names {name!r}. Do not use a checkpoint that you did not make; "
        "if it is yours, put the file itself where a link stands."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if it is missing or is no JSON object.
    """
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in the bytes of file `path`; raises `CheckpointError` if there is none."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: it must hold a JSON object.")
    return cast("dict[str, Any]", document)


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _check_keys(value: Any, what: str) -> None:
    """JSON turns the key 1 into "1" without a word, which a resumed run would not find again."""
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            if not isinstance(key, str):
                raise CheckpointError(f"{what} must have string keys only, but has {key!r}; convert it first.")
            _check_keys(item, f"{what}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast("list[Any]", value)):
            _check_keys(item, f"{what}[{index}]")
