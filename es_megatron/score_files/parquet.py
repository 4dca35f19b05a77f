"""Scores as Parquet tables, and tables as scores to begin a run with.

The columns are `component` (its name), `row`, `first_document` and `last_document` (of the component's file, both ends
included), `score` and `visits`. DuckDB, pandas and polars read such a file as it is.
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
                writer.write_table(pa.table([which, rows, first, last, score, block.visits], schema=schema))
                written += size
    return written


def import_scores(source: Path, manifest: Manifest, target: Path) -> dict[str, int]:
    """Make an `es_state` folder of a Parquet table with columns `component`, `row`, `score` and, if it has, `visits`.

    Args:
        source: the table; its rows may stand in any order, and need not be all there.
        manifest: the blend the scores are for.
        target: folder to make, for the setting `scores.initial`.

    Returns:
        Samples with a score, by component.

    Raises:
        DataError: a column is missing, or a row is not of the blend or makes no sense.
    """
    score = np.zeros(manifest.total, np.float32)
    visits = np.zeros(manifest.total, np.uint8)
    for name, rows, found, seen in _read(source):
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
        score[ids], visits[ids] = found, seen
    state = {"imported_from": str(source)}
    save_es_state(target, ScoreRange(manifest.total, 0, score, visits), {}, state, manifest.to_json(), RankGrid.alone())
    counts = [
        int(np.count_nonzero(visits[low:high]))
        for low, high in zip(manifest.offsets, manifest.offsets[1:], strict=False)
    ]
    return {component.name: count for component, count in zip(manifest.components, counts, strict=True)}


def _read(source: Path) -> Iterator[tuple[str, Int64, Float32, UInt8]]:
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
        wanted = [*NEEDED, *(["visits"] if "visits" in columns else [])]
        for batch in table.iter_batches(columns=wanted):
            names = np.asarray(batch.column("component").cast(pa.string()).to_numpy(zero_copy_only=False))
            score = batch.column("score").cast(pa.float32()).to_numpy(zero_copy_only=False)
            rows = batch.column("row").cast(pa.int64()).to_numpy(zero_copy_only=False)
            visits = np.full(len(rows), SETTLED, np.uint8)
            if "visits" in wanted:
                visits = batch.column("visits").cast(pa.uint8()).to_numpy(zero_copy_only=False)
            held = (visits > 0) & ~np.asarray(batch.column("score").is_null())
            for name in np.unique(names[held].astype(str)).tolist():
                here = held & (names == name)
                yield name, rows[here], score[here], visits[here]


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
