"""The full hash of a component's files, kept beside them, with the token ids that one pass over them has met.

The fingerprint of a component samples its `.bin` file, and is taken whenever a run starts. This reads every byte: when
the files are made, when `es-megatron doctor --hash` is asked, and behind a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es_megatron.checkpoint.disk import replace_file
from es_megatron.errors import DataError

if TYPE_CHECKING:
    from es_megatron.frameworks.megatron_data import TokenFile

_FORMAT = "es_megatron blake2b-256 1"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class TokenHash:
    """What a pass over both files of a component has found."""

    bin: str
    """BLAKE2b of the `.bin` file, 64 hexadecimal digits."""

    idx: str
    """The same of the `.idx` file."""

    bin_bytes: int
    """Size of the `.bin` file."""

    idx_bytes: int
    """Size of the `.idx` file."""

    lowest: int
    """Smallest token id."""

    highest: int
    """Largest token id."""


def hash_path(prefix: str | Path) -> Path:
    """Where the hash of the files with this prefix stands."""
    return Path(f"{prefix}.hash.json")


def take_hash(file: TokenFile, report: Callable[[int], object] = lambda _: None) -> TokenHash:
    """Read both files of a component from end to end.

    Args:
        file: From `open_token_file`.
        report: Called with the bytes of each block after it; what it raises ends the pass.

    Raises:
        DataError: A file can no longer be read, or changes its size meanwhile.
    """
    idx, idx_bytes = _digest(file.idx_path, lambda _: None, report)
    limits = np.iinfo(file.dtype)
    ends = [int(limits.max), int(limits.min)]

    def see(block: memoryview) -> None:
        ids = np.frombuffer(block, file.dtype)
        ends[:] = min(ends[0], int(ids.min())), max(ends[1], int(ids.max()))

    found, size = _digest(file.bin_path, see, report)
    if size != file.tokens * file.dtype.itemsize:
        raise DataError(f"`{file.bin_path}` has changed its size since it was opened: wait until it is written.")
    return TokenHash(found, idx, size, idx_bytes, *ends)


def _digest(path: Path, see: Callable[[memoryview], object], report: Callable[[int], object]) -> tuple[str, int]:
    digest, size = hashlib.blake2b(digest_size=32), 0
    buffer = bytearray(_BLOCK)
    try:
        with path.open("rb") as file:  # a buffered file fills the block, so that no token is cut
            while count := file.readinto(buffer):
                block = memoryview(buffer)[:count]
                digest.update(block)
                see(block)
                size += count
                report(count)
    except OSError as error:
        raise DataError(f"`{path}` cannot be read ({error}): check the disk and the mount.") from error
    return digest.hexdigest(), size


def write_hash(file: TokenFile, found: TokenHash) -> None:
    """Keep a hash beside its files.

    Raises:
        OSError: It cannot be written.
    """
    content = json.dumps({"format": _FORMAT, **asdict(found)}, indent=1) + "\n"
    replace_file(hash_path(file.prefix), content.encode())


def read_hash(file: TokenFile) -> TokenHash | None:
    """The hash that is kept beside a component's files; None: there is none.

    Raises:
        DataError: It is damaged, or a file has another size than the hash says.
    """
    path = hash_path(file.prefix)
    try:
        content: Any = json.loads(path.read_bytes())
        found = {field.name: content[field.name] for field in fields(TokenHash)}
        known = TokenHash(**found)
        sound = content["format"] == _FORMAT and all(
            type(found[each.name]).__name__ == str(each.type) for each in fields(TokenHash)
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, file) from error
    if not sound:
        raise _damaged(path, file)
    for each, size in ((file.bin_path, known.bin_bytes), (file.idx_path, known.idx_bytes)):
        if each.stat().st_size != size:
            raise _changed(each, file, f"it has {each.stat().st_size} bytes instead of {size}")
    return known


def compare_hash(file: TokenFile, known: TokenHash, found: TokenHash) -> None:
    """Compare the hash that was kept with the one that was taken now.

    Raises:
        DataError: They differ.
    """
    for path, before, now in ((file.bin_path, known.bin, found.bin), (file.idx_path, known.idx, found.idx)):
        if before != now:
            raise _changed(path, file, f"its BLAKE2b is {now[:16]}... instead of {before[:16]}...")
    if known != found:  # the ids, which the bytes decide
        raise _damaged(hash_path(file.prefix), file)


def check_ids(name: str, file: TokenFile, found: TokenHash, vocab_size: int | None) -> None:
    """Check the token ids that a pass has met.

    Args:
        name: Of the component.
        file: Its files.
        found: What is known of them.
        vocab_size: Ids must be below; None: not known.

    Raises:
        DataError: Some id has no row in the model's embedding.
    """
    if vocab_size is not None and (found.highest >= vocab_size or found.lowest < 0):
        raise DataError(
            f"Token ids of component `{name}` must be in [0, {vocab_size}), but `{file.bin_path}` has {found.lowest} "
            f".. {found.highest} instead: it was made with another tokenizer, or is damaged. Correct the vocabulary of "
            "the run (`vocab_size` or `tokenizer` of a blend file), or prepare or copy the component again."
        )


def _changed(path: Path, file: TokenFile, how: str) -> DataError:
    return DataError(
        f"`{path}` is not the file it was when `{hash_path(file.prefix)}` was written: {how}. Copy or prepare it "
        f"again; if the change was meant, write its hash anew (`es-megatron hash --renew {file.prefix}`) and begin a "
        "new run, since scores belong to the text they were made with."
    )


def _damaged(path: Path, file: TokenFile) -> DataError:
    return DataError(
        f"`{path}` is no hash of token files, or is damaged: write it anew (`es-megatron hash --renew {file.prefix}`)."
    )
