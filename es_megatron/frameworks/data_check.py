"""The data files of a run, read from end to end behind it and compared with the hashes kept beside them.

A run starts on what the headers and the fingerprints say, which takes no pass over the data. A thread of low priority
then reads every byte. What it finds is raised in the main thread, at the next point where all ranks meet: before a
checkpoint is made of scores that met other text.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from es_megatron.checkpoint.agreement import agreed
from es_megatron.data.manifest import Manifest
from es_megatron.errors import DataError, EsError
from es_megatron.frameworks.megatron_data import LoadedBlend, OneEpochDataset, TokenFile, open_token_file
from es_megatron.frameworks.token_hash import check_ids, compare_hash, read_hash, take_hash
from es_megatron.rank_grid import RankGrid

FIRST_SECONDS = 5.0
"""How long the first iteration waits for the pass: small data is wholly known by then."""

_LOWEST = 19


class DataFile(NamedTuple):
    """Files of a component, and what its token ids must be below; None: not known."""

    name: str
    file: TokenFile
    vocab_size: int | None


class _LeftOffError(Exception):
    """Nobody waits for the pass any more."""


class DataCheck:
    """A pass over some files in a thread of its own."""

    def __init__(self, files: Iterable[DataFile], grid: RankGrid) -> None:
        """Start it.

        Args:
            files: Those that this rank reads; none starts no thread.
            grid: All ranks, each of which has such a check.
        """
        self._files, self._grid = tuple(files), grid
        self._leave, self._done = threading.Event(), threading.Event()
        self._error: EsError | None = None
        if self._files:
            threading.Thread(target=self._read, name="es-data-check", daemon=True).start()
        else:
            self._done.set()

    def agree(self, seconds: float = 0.0) -> None:
        """Raise on all ranks what was found on any so far; collective.

        Args:
            seconds: How long to wait for the end of the pass.

        Raises:
            DataError: A file is not what its hash says, or has token ids that the model has not.
        """
        with agreed(self._grid, "go on with this data", kind=DataError):
            self._done.wait(seconds)
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """Leave the rest unread."""
        self._leave.set()

    def _read(self) -> None:
        with suppress(OSError, AttributeError):  # of this thread alone, on Linux; elsewhere it has the usual priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        try:
            for each in self._files:
                verify(each, self._go_on)
        except _LeftOffError:
            pass
        except EsError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - the main thread must hear of it, whatever it is
            self._error = DataError(f"The data cannot be read ({type(error).__name__}: {error}).")
        finally:
            self._done.set()

    def _go_on(self, _: int) -> None:
        if self._leave.is_set():
            raise _LeftOffError


def verify(each: DataFile, report: Callable[[int], object] = lambda _: None) -> bool:
    """Read files from end to end; returns whether there was a hash to compare them with.

    Raises:
        DataError: They are not what their hash says, or have token ids that the model has not.
    """
    known = read_hash(each.file)
    found = take_hash(each.file, report)
    if known is not None:
        compare_hash(each.file, known, found)
    check_ids(each.name, each.file, found, each.vocab_size)
    return known is not None


def files_of(blend: LoadedBlend) -> list[DataFile]:
    """All files of a blend, those for validation last."""
    parts: list[OneEpochDataset] = [*blend.datasets, *blend.validation.values()]
    return [DataFile(each.name, each.file, each.vocab_size) for each in parts]


def check_behind(blend: LoadedBlend, grid: RankGrid, *, wanted: bool) -> DataCheck:
    """Begin to read the files of a blend, each on one rank."""
    return DataCheck(files_of(blend)[grid.world_rank :: grid.world_size] if wanted else (), grid)


def check_components(manifest: Manifest, vocab_size: int | None, grid: RankGrid, *, wanted: bool) -> DataCheck:
    """Begin to read the files of components on world rank 0: the others need not have them at all."""
    if not wanted or grid.world_rank != 0:
        return DataCheck((), grid)
    return DataCheck((DataFile(c.name, open_token_file(c.prefix), vocab_size) for c in manifest.components), grid)
