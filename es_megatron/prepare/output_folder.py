"""A folder that appears at once and whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from es_megatron.errors import ConfigError


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it may be replaced and was made by `es-megatron prepare`.

    Raises:
        ConfigError: It holds something.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(
            f"`--output` must be a new folder, but `{output}` exists: choose another, or use `--overwrite`."
        )
    if not (output / "prepare.json").is_file():
        raise ConfigError(
            f"`--overwrite` replaces only what this command made, but `{output}` has no prepare.json: choose another "
            "`--output`, or remove it yourself."
        )


@contextmanager
def appearing_folder(output: Path, *, replace: bool) -> Generator[Path]:
    """A hidden folder beside `output` that takes its place when the block ends well, and vanishes otherwise.

    The files are on the disk before the folder has its name. A folder that is replaced is moved aside before and
    removed after, so that a crash between the two renames loses nothing.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for path in [*folder.iterdir(), folder]:
            _fsync(path)
        if replace and output.exists():
            old = folder.with_name(folder.name + ".old")
            output.rename(old)
            folder.rename(output)
            shutil.rmtree(old)
        else:
            folder.rename(output)
        _fsync(output.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
