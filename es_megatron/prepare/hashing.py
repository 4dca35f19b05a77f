"""Write the full hash of token files beside them, or compare them with the one that is there."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.blend_file import read_blend_file, vocabulary
from es_megatron.frameworks.token_hash import check_ids, hash_path, read_hash, take_hash, write_hash

if TYPE_CHECKING:
    from es_megatron.frameworks.data_check import DataFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="path of a `.bin` and `.idx` without the ending")
    parser.add_argument("--blend", type=Path, metavar="FILE", help="blend file, all of whose files are meant")
    parser.add_argument("--renew", action="store_true", help="write anew what is there already: the change was meant")


def run_hash(arguments: argparse.Namespace) -> int:
    """Go through the files; returns 0 if all have a hash in the end that they agree with.

    Raises:
        ConfigError: nothing is named.
        DataError: a file is missing, damaged, or not what the hash beside it says.
    """
    from es_megatron.frameworks.data_check import verify  # imports torch

    files = _files(arguments.blend, arguments.prefixes)
    if not files:
        raise ConfigError("`PREFIX` or `--blend` must be given, but neither is: name the files.")
    for each in files:
        began = time.monotonic()
        if arguments.renew or not hash_path(each.file.prefix).exists():
            found = take_hash(each.file)
            check_ids(each.name, each.file, found, each.vocab_size)
            try:
                write_hash(each.file, found)
            except OSError as error:
                raise DataError(
                    f"`{hash_path(each.file.prefix)}` cannot be written ({error.strerror}): get the right to write "
                    "there, or make room."
                ) from error
            done = "written"
        else:
            verify(each)
            done = "agrees"
        known = read_hash(each.file)
        assert known is not None  # it has just been written or compared
        size = (known.bin_bytes + known.idx_bytes) / 1e9
        print(
            f"{hash_path(each.file.prefix)}: {done}; token ids {known.lowest} .. {known.highest}, {size:.3f} GB in "
            f"{time.monotonic() - began:.1f} s",
            flush=True,
        )
    return 0


def _files(blend: Path | None, prefixes: list[str]) -> list[DataFile]:
    from es_megatron.frameworks.data_check import DataFile
    from es_megatron.frameworks.megatron_data import open_token_file

    named = [(Path(prefix).name, prefix) for prefix in map(_without_ending, prefixes)]
    if blend is None:
        return [DataFile(name, open_token_file(prefix), None) for name, prefix in named]
    content = read_blend_file(blend)
    vocab_size = vocabulary(blend, content)[1]
    named += [
        (entry.name, str(blend.parent / prefix))
        for entry in content.components
        for prefix in (entry.train, entry.validation)
        if prefix is not None
    ]
    return [DataFile(name, open_token_file(prefix), vocab_size) for name, prefix in named]


def _without_ending(prefix: str) -> str:
    return prefix.removesuffix(".bin").removesuffix(".idx")
