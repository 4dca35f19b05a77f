"""Scores as Parquet tables, and tables as scores to begin a run with.

The columns are `component` (its name), `row`, `first_document` and `last_document` (of the component's file, both ends
included), `score`, `visits` and `seq_length` (tokens of a row). DuckDB, pandas and polars read such a file as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from es_megatron.checkpoint.es_state import ScoreRange, save_es_state
from es_megatron.checkpoint.transfer import plan_transfer
from es_megatron.data.manifest import Manifest
from es_megatron.errors import ConfigError, DataError
from es_megatron.rank_grid import RankGrid
from es_megatron.score_files.files import ScoreFiles

if TYPE_CHECKING:
    from es_megatron.frameworks.megatron_data import LoadedBlend

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

NEEDED = ("component", "row", "score")
LENGTH = "seq_length"
SETTLED = 255
"""Visits of an imported score that says nothing of them: as if seen so often that no start value is left in it."""


def arrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow. Install it with `pip install 'es_megatron[report]'`.") from error
    return pa, pq


def export(files: ScoreFiles, target: Path, blend: LoadedBlend | None) -> int:
    """Write all scores as one Parquet file; nothing half-written is left under its name.

    Args:
        files: the scores.
        target: file to make; one that exists is replaced.
        blend: where documents are looked up; None leaves their columns null.

    Returns:
        Rows written.

    Raises:
        CheckpointError: damaged scores, or another blend.
    """
    pa, parquet = arrow()
    if blend is not None:
        plan_transfer(files.manifest, blend.manifest)
    schema = pa.schema(
        [
            ("component", pa.dictionary(pa.int32(), pa.string())),
            ("row", pa.int64()),
            ("first_document", pa.int64()),
            ("last_document", pa.int64()),
            ("score", pa.float32()),
            ("visits", pa.uint8()),
            ("seq_length", pa.int32()),
        ]
    )
    names = pa.array([component.name for component in files.manifest.components])
    written = 0
    with _replacing(target) as partial, parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
        for number, component in enumerate(files.manifest.components):
            bounds = None if blend is None else _document_starts(blend, component.name)
            for block in files.blocks(number):
                size = len(block.score)
                which = pa.DictionaryArray.from_arrays(np.full(size, number, np.int32), names)
                rows = np.arange(block.row, block.row + size, dtype=np.int64)
                first, last = (pa.nulls(size, pa.int64()),) * 2
                if bounds is not None:
                    begin = rows * files.manifest.seq_length
                    first, last = (
                        np.searchsorted(bounds, token, side="right") - 1
                        for token in (begin, begin + files.manifest.seq_length)
                    )
                # A score that was never written is no score: 0 would read as an easy sample.
                score = pa.array(block.score, mask=block.visits == 0)
                length = np.full(size, files.manifest.seq_length, np.int32)
                writer.write_table(pa.table([which, rows, first, last, score, block.visits, length], schema=schema))
                written += size
    return written


def import_scores(source: Path, manifest: Manifest, target: Path) -> dict[str, int]:
    """Make an `es_state` folder of a Parquet table with columns `component`, `row`, `score` and others if it has them.

    Those are `visits`, in [0, 255], and `seq_length`, which must be the blend's.

    Args:
        source: the table; its rows may stand in any order, and need not be all there.
        manifest: the blend the scores are for.
        target: folder to make, for the setting `scores.initial`.

    Returns:
        Samples with a score, by component.

    Raises:
        DataError: a column is missing; a row is not of the blend, makes no sense, stands there twice, or is of another
            length.
    """
    score = np.zeros(manifest.total, np.float32)
    visits = np.zeros(manifest.total, np.uint8)
    for name, rows, found, seen in _read(source, manifest.seq_length):
        numbers = [number for number, component in enumerate(manifest.components) if component.name == name]
        if not numbers:
            known = ", ".join(component.name for component in manifest.components)
            raise DataError(f"`{source}` has scores of component `{name}`, but the blend has {known}. Leave them out.")
        size = int(manifest.sizes[numbers[0]])
        bad = np.flatnonzero((rows < 0) | (rows >= size) | ~np.isfinite(found) | (found < 0))
        if len(bad):
            at = bad[0]
            raise DataError(
                f"Rows of `{name}` in `{source}` must be in [0, {size}) with finite scores >= 0, but row {rows[at]} "
                f"has score {found[at]} instead. Correct the table, or name the blend that it was made for."
            )
        ids = manifest.offsets[numbers[0]] + rows
        again = np.concatenate([rows[visits[ids] > 0], _repeated(rows)])
        if len(again):
            raise DataError(
                f"Each row of `{name}` must stand once in `{source}`, but row {again[0]} stands there again. Keep one "
                "of its scores."
            )
        score[ids], visits[ids] = found, seen
    state = {"imported_from": str(source)}
    save_es_state(target, ScoreRange(manifest.total, 0, score, visits), {}, state, manifest.to_json(), RankGrid.alone())
    counts = [
        int(np.count_nonzero(visits[low:high]))
        for low, high in zip(manifest.offsets, manifest.offsets[1:], strict=False)
    ]
    return {component.name: count for component, count in zip(manifest.components, counts, strict=True)}


def _repeated(rows: Int64) -> Int64:
    """Rows that stand more than once."""
    distinct, counts = np.unique(rows, return_counts=True)
    return distinct[counts > 1]


def _read(source: Path, seq_length: int) -> Iterator[tuple[str, Int64, Float32, UInt8]]:
    """Component, rows, scores and visits, component by component of each batch; rows without a score are left out."""
    pa, parquet = arrow()
    try:
        table = parquet.ParquetFile(source)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"`{source}` must be a Parquet file, but cannot be read: {error}") from error
    with table:
        columns = table.schema_arrow.names
        for name in NEEDED:
            if name not in columns:
                raise DataError(f"`{source}` must have the columns {', '.join(NEEDED)}, but `{name}` is missing.")
        wanted = [*NEEDED, *(name for name in ("visits", LENGTH) if name in columns)]
        for batch in table.iter_batches(columns=wanted):
            if LENGTH in wanted:
                _check_length(_whole_numbers(batch, LENGTH, source), seq_length, source)
            names = np.asarray(batch.column("component").cast(pa.string()).to_numpy(zero_copy_only=False))
            try:
                score = batch.column("score").cast(pa.float32()).to_numpy(zero_copy_only=False)
            except pa.ArrowException as error:
                raise DataError(f"Column `score` of `{source}` must hold numbers, but does not: {error}") from error
            rows = _whole_numbers(batch, "row", source)
            visits = _visits(batch, source, rows) if "visits" in wanted else np.full(len(rows), SETTLED, np.uint8)
            held = (visits > 0) & ~np.asarray(batch.column("score").is_null())
            for name in np.unique(names[held].astype(str)).tolist():
                here = held & (names == name)
                yield name, rows[here], score[here], visits[here]


def _whole_numbers(batch: Any, name: str, source: Path) -> Int64:
    """A column, of which no value may be missing."""
    pa, _ = arrow()
    column = batch.column(name)
    if column.null_count:
        raise DataError(f"Column `{name}` of `{source}` must have a value in every row, but lacks {column.null_count}.")
    try:
        return column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DataError(f"Column `{name}` of `{source}` must hold whole numbers, but does not: {error}") from error


def _visits(batch: Any, source: Path, rows: Int64) -> UInt8:
    visits = _whole_numbers(batch, "visits", source)
    bad = np.flatnonzero((visits < 0) | (visits > SETTLED))
    if len(bad):
        raise DataError(
            f"`visits` in `{source}` must be in [0, {SETTLED}], but row {rows[bad[0]]} has {visits[bad[0]]} instead. "
            f"Write {SETTLED} for all above, and 0 for a row without a score."
        )
    return visits.astype(np.uint8)


def _check_length(lengths: Int64, seq_length: int, source: Path) -> None:
    other = lengths[lengths != seq_length]
    if len(other):
        raise DataError(
            f"`--seq-length` must be {other[0]} for the scores of `{source}`, but is {seq_length} instead: rows of "
            "another length are other samples. Import them at their own length, or begin without scores."
        )


def _document_starts(blend: LoadedBlend, name: str) -> Int64:
    """First token of each document of a component and the end, int64[D+1]."""
    number = [component.name for component in blend.manifest.components].index(name)
    file = blend.datasets[number].file
    starts = np.append(file.sequence_starts(), file.tokens * file.dtype.itemsize)
    return starts[file.document_bounds()] // file.dtype.itemsize


@contextlib.contextmanager
def _replacing(target: Path) -> Generator[Path]:
    """A path to write to, which gets the name `target` if the body succeeds."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
