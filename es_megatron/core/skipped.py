"""Rows that a run never draws: the file that names them, and what has changed since the checkpoint.

They are named by component and row, with the fingerprint of the component, so that they never mean other text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.disk import replace_file
from es_megatron.data.manifest import Manifest
from es_megatron.data.schedule import Schedule
from es_megatron.errors import CheckpointError, DataError
from es_megatron.rank_grid import RankGrid

Int64 = npt.NDArray[np.int64]
RowsByName = Mapping[str, list[int]]

LOGGER = logging.getLogger(__name__)

SKIPPED = "skipped.json"
"""The file's name in the folder of a run."""


class SkippedRows:
    """The rows that a run leaves out; a checkpoint keeps them, so that it cannot go on without them unawares."""

    def __init__(self, path: str | None, schedule: Schedule, grid: RankGrid) -> None:
        """Read the file on world rank 0; collective where there is one.

        Args:
            path: of the file; None leaves out nothing.
            schedule: of the run, whose epochs must keep rows to draw.
            grid: the ranks.

        Raises:
            DataError: on every rank, if it cannot be read, names rows that do not exist, or too many of a component.
        """
        self._given = path is not None
        self.rows: RowsByName = {}
        """Rows by component, rising."""
        if path is not None:
            found: RowsByName = {}
            with agreed(grid, "read `order.skip`", kind=DataError):
                if grid.world_rank == 0:
                    found = read_skipped(Path(path), schedule.manifest)
                    check_enough(found, schedule)
            self.rows = grid.broadcast_object(found)
        self.ids = ids_of(self.rows, schedule.manifest)
        self.changes = [f"the run leaves out {told(self.rows)}"] if self.rows else []
        """What is news since the checkpoint, or since the beginning, in words."""
        if self.rows:
            LOGGER.info("`%s` leaves out %s", path, told(self.rows))

    def to_json(self) -> dict[str, RowsByName]:
        """What a checkpoint keeps under `skipped`: nothing without such rows, as versions before have it."""
        return {"skipped": self.rows} if self.rows else {}

    def follow(self, state: Mapping[str, Any]) -> None:
        """Compare with a checkpoint that the run goes on from, which has what `to_json` gave.

        Raises:
            CheckpointError: it left out rows, and no file is given.
        """
        saved: RowsByName = state.get("skipped", {})
        if saved and not self._given:
            raise CheckpointError(
                f"The checkpoint's run leaves out {told(saved)}, but `order.skip` names no file of them. Restore "
                f'`{SKIPPED}`, or set `order.skip`; a file with `{{"components": {{}}}}` draws them again.'
            )
        news = {"leaves out": less(self.rows, saved), "draws again": less(saved, self.rows)}
        self.changes = [f"the run {does} {told(rows)}" for does, rows in news.items() if rows]


def read_skipped(path: Path, manifest: Manifest) -> RowsByName:
    """Rows of a file, by component, rising.

    Raises:
        DataError: it cannot be read, or names components, text or rows that the blend has not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["components"]
        entries = {str(name): (str(each["fingerprint"]), list(each["rows"])) for name, each in content.items()}
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror}. Make it with `es-megatron skip`.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"`{path}` must be a file that `es-megatron skip` made, but is not: {error!r}. Make it again."
        ) from error
    known = {component.name: component for component in manifest.components}
    for name, (fingerprint, rows) in entries.items():
        check_rows(name, rows, manifest)
        if fingerprint != known[name].fingerprint:
            raise DataError(
                f"`{path}` must name rows of the blend's `{name}`, but was made for other text of that name: "
                "fingerprints differ. Remove it, and name the rows anew with `es-megatron skip`."
            )
    return {name: sorted({int(row) for row in rows}) for name, (_, rows) in entries.items() if rows}


def write_skipped(path: Path, manifest: Manifest, rows: RowsByName) -> None:
    """Write what `read_skipped` reads; `OSError` where it cannot be written."""
    known = {component.name: component.fingerprint for component in manifest.components}
    entries = {name: {"fingerprint": known[name], "rows": each} for name, each in rows.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"components": entries}).encode() + b"\n")


def check_rows(name: str, rows: list[Any], manifest: Manifest) -> None:
    """Refuse rows that the blend has not.

    Raises:
        DataError: no such component, or no such row.
    """
    samples = {component.name: component.samples for component in manifest.components}
    if name not in samples:
        raise DataError(f"Rows to skip must be of {', '.join(samples)}, but some are of `{name}`. Correct the name.")
    for row in rows:
        if not isinstance(row, int) or not 0 <= row < samples[name]:
            raise DataError(
                f"Rows to skip of `{name}` must be in [0, {samples[name]}), but one is {row!r}. Correct it."
            )


def check_enough(rows: RowsByName, schedule: Schedule) -> None:
    """Refuse to leave out so many rows of a component that a pruned epoch of it may have none to draw.

    Raises:
        DataError: names the component.
    """
    names = [component.name for component in schedule.manifest.components]
    for name, each in rows.items():
        kept = int(schedule.epochs.kept[names.index(name)])
        if len(each) >= kept:
            raise DataError(
                f"Fewer than {kept} rows of `{name}` may be skipped, as many as an epoch of it draws, but {len(each)} "
                "are. Leave the component out of the blend, or prepare it anew without that text."
            )


def ids_of(rows: RowsByName, manifest: Manifest) -> Int64:
    """Ids of rows by component, rising, int64[N]; components that the blend has not are passed over."""
    found = [
        manifest.sample_ids(number, np.asarray(rows.get(component.name, []), np.int64))
        for number, component in enumerate(manifest.components)
    ]
    return np.concatenate(found)


def less(rows: RowsByName, others: RowsByName) -> RowsByName:
    """Rows that are not among others, by component."""
    left = {name: sorted(set(each) - set(others.get(name, []))) for name, each in rows.items()}
    return {name: each for name, each in left.items() if each}


def told(rows: RowsByName) -> str:
    """Such as `3 rows (books 2, code 1)`."""
    count = sum(map(len, rows.values()))
    return f"{count} row{'s' * (count != 1)} ({', '.join(f'{name} {len(each)}' for name, each in rows.items())})"
