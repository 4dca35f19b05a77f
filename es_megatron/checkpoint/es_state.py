"""The folder `es_state/` of one iteration: scores, visits, kept masks, positions, and a manifest that vouches for them.

    es_state/
      scores-00000-of-00004.safetensors   score.00000 ... visits.00000 ...: the virtual shards of one data-parallel rank
      masks.safetensors                   mask.00002.00001: packed kept bits of component 2, epoch 1
      state.json                          iteration, positions, state of the policy: what the caller gave
      manifest.json                       written last: where each tensor is, checksums, the data manifest, the layout

Virtual shards depend on the number of samples alone, so another number of ranks reads other pieces of the same files.
All ranks write into `es_state.partial/`, which gets its name once everything in it is on the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.ownership import owned_range, owned_shards, shard_bounds
from es_megatron.checkpoint import disk, sealed
from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.compatibility import check_manifest
from es_megatron.checkpoint.tensor_file import FileRecord, TensorFile, write_tensors
from es_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from es_megatron.rank_grid import RankGrid

FORMAT = "es_state"
VERSION = 1
MANIFEST = "manifest.json"
MASKS = "masks.safetensors"
STATE = "state.json"

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
MaskKey = tuple[int, int]
Buffer = bytes | bytearray | memoryview | UInt8

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreRange:
    """Scores and visits of the ids that one data-parallel rank owns."""

    n: int
    """Samples of the whole blend."""
    low: int
    """First id owned."""
    score: Float32
    """float32[S]: score of id low + k."""
    visits: UInt8
    """uint8[S]: visits of id low + k, saturating."""

    @property
    def high(self) -> int:
        """One after the last id owned."""
        return self.low + len(self.score)


@dataclass(frozen=True)
class SaveReport:
    """What a save cost."""

    bytes: int
    """Bytes of the whole folder, over all ranks."""
    seconds: float


@dataclass(frozen=True)
class EsState:
    """What a checkpoint gives back to one rank."""

    low: int
    """First id owned by this rank."""
    score: Float32
    """float32[S]: score of id low + k."""
    visits: UInt8
    """uint8[S]: visits of id low + k."""
    masks: dict[MaskKey, UInt8]
    """Packed kept bits by (component, epoch), as they were given."""
    state: dict[str, Any]
    manifest: dict[str, Any]
    """Data manifest of the run that saved."""
    created_by: dict[str, Any]
    """Layout of the run that saved."""

    @property
    def high(self) -> int:
        """One after the last id owned."""
        return self.low + len(self.score)


def save_es_state(
    directory: str | Path,
    scores: ScoreRange,
    masks: Mapping[MaskKey, Buffer],
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    grid: RankGrid,
) -> SaveReport:
    """Write the ES state of all ranks; collective over the world.

    Model-parallel rank 0 of each data-parallel rank writes its scores, world rank 0 everything else. The arrays are
    handed to the disk as they are, without a copy. A folder of that name is replaced, once the new one is complete.

    Args:
        directory: the folder to make, on a file system that all ranks share.
        scores: this rank's range, which must be the one `ownership.owned_range` gives it.
        masks: packed kept bits by (component, epoch); those of world rank 0 are written.
        state: JSON-able, with string keys; that of world rank 0 is written.
        manifest: data manifest, as `Manifest.to_json` gives it.
        grid: the ranks.

    Raises:
        CheckpointError: on every rank, if any failed; an older folder is untouched and temporary files are removed.
    """
    return EsStateWriter(directory, scores, masks, state, manifest, grid).save()


class EsStateWriter:
    """`save_es_state` in steps, for those who write while something else goes on: prepare, write, finish.

    `prepare` and `finish` are collective. `write` is not, and may run in a thread of its own: what it is given must not
    change meanwhile.
    """

    def __init__(
        self,
        directory: str | Path,
        scores: ScoreRange,
        masks: Mapping[MaskKey, Buffer],
        state: Mapping[str, Any],
        manifest: Mapping[str, Any],
        grid: RankGrid,
    ) -> None:
        """Take what is to be written; arguments as for `save_es_state`."""
        self.final = Path(directory)
        self._partial = disk.sibling(self.final, disk.PARTIAL)
        self._scores, self._masks, self._state = scores, masks, state
        self._manifest, self._grid = manifest, grid
        self._records: list[FileRecord] = []
        self._started = time.perf_counter()

    def save(self) -> SaveReport:
        """All steps at once; collective."""
        self.prepare()
        with agreed(self._grid, f"save {self.final}", self.undo):
            self.write()
        return self.finish()

    def undo(self) -> None:
        """Remove what has been written."""
        disk.remove_tree(self._partial)

    def prepare(self) -> None:
        """Make the folder to write to."""
        with agreed(self._grid, f"prepare {self._partial}", self.undo):
            check_range(self._scores, self._grid)
            if self._grid.world_rank == 0:
                disk.restore(self.final)
                disk.remove_tree(self._partial)
                disk.make_folder(self._partial)

    def write(self) -> None:
        """Write this rank's files."""
        self._records = _write_scores(self._partial, self._scores, self._grid)
        if self._grid.world_rank == 0:
            self._records += _write_shared(self._partial, self._masks, self._state)

    def finish(self) -> SaveReport:
        """Write the manifest and give the folder its name, once every rank has written."""
        everything = [record for part in self._grid.gather_objects(self._records) for record in part]
        total = 0
        with agreed(self._grid, f"finish {self.final}", self.undo):
            total = sum(record.bytes for record in everything)
            if self._grid.world_rank == 0:
                document = _describe(self._scores.n, everything, self._manifest, self._grid)
                disk.write_file(self._partial / MANIFEST, [sealed.seal(document)])
                disk.sync_folder(self._partial)
                disk.move_into_place(self._partial, self.final)
        return SaveReport(total, time.perf_counter() - self._started)


def load_es_state(
    directory: str | Path, n: int, grid: RankGrid, data_manifest: Mapping[str, Any] | None = None
) -> EsState:
    """Read this rank's part of an ES state saved by any number of ranks; collective over the world.

    Only the virtual shards this rank owns are read, straight into the arrays returned, and every checksum is verified.

    Args:
        directory: folder that `save_es_state` made.
        n: samples of the whole blend.
        grid: the ranks that load, of any layout.
        data_manifest: of this run; if given, a checkpoint of other data is refused.

    Raises:
        CheckpointError: on every rank, if on any rank something is missing, damaged, or of another blend.
    """
    final = Path(directory)
    with agreed(grid, f"load {final}"):
        if grid.world_rank == 0 and disk.restore(final):
            _log.warning("%s had been moved aside by an interrupted save; it is back.", final)
    loaded: list[EsState] = []
    with agreed(grid, f"load {final}"):
        loaded.append(_read(final, n, grid, data_manifest))
    return loaded[0]


def check_range(scores: ScoreRange, grid: RankGrid) -> None:
    """Refuse arrays that are not the range this rank owns.

    Raises:
        CheckpointError: naming both ranges, or the type that is wrong.
    """
    low, high = owned_range(scores.n, grid.dp_rank, grid.dp_size)
    if (scores.low, scores.high) != (low, high) or len(scores.visits) != len(scores.score):
        raise CheckpointError(
            f"Scores must cover the ids [{low}, {high}) of data-parallel rank {grid.dp_rank} of {grid.dp_size}, "
            f"but there are {len(scores.score)} scores and {len(scores.visits)} visits from id {scores.low} instead."
        )
    for name, array, dtype in (("score", scores.score, np.float32), ("visits", scores.visits, np.uint8)):
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            raise CheckpointError(
                f"`{name}` must be a contiguous vector of {np.dtype(dtype).name}, "
                f"but is {array.dtype}{array.shape} instead."
            )


def _write_scores(folder: Path, scores: ScoreRange, grid: RankGrid) -> list[FileRecord]:
    bounds = shard_bounds(scores.n)
    first, end = owned_shards(len(bounds) - 1, grid.dp_rank, grid.dp_size)
    if grid.mp_rank != 0 or first == end:
        return []
    tensors: dict[str, npt.NDArray[Any]] = {}
    for shard in range(first, end):
        piece = slice(int(bounds[shard]) - scores.low, int(bounds[shard + 1]) - scores.low)
        tensors[f"score.{shard:05d}"] = scores.score[piece]
        tensors[f"visits.{shard:05d}"] = scores.visits[piece]
    return [write_tensors(folder / f"scores-{grid.dp_rank:05d}-of-{grid.dp_size:05d}.safetensors", tensors)]


def _write_shared(folder: Path, masks: Mapping[MaskKey, Buffer], state: Mapping[str, Any]) -> list[FileRecord]:
    tensors = {f"mask.{c:05d}.{e:05d}": np.frombuffer(mask, dtype=np.uint8) for (c, e), mask in sorted(masks.items())}
    content = sealed.encode_json(state, "`state`")
    size, crc = disk.write_file(folder / STATE, [content])
    return [write_tensors(folder / MASKS, tensors), FileRecord(STATE, size, sealed.format_crc(crc), {})]


def _describe(n: int, records: list[FileRecord], manifest: Mapping[str, Any], grid: RankGrid) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "samples": n,
        "shard_bounds": shard_bounds(n).tolist(),
        "files": {record.name: {"bytes": record.bytes, "crc32": record.crc32} for record in records},
        "tensors": {name: entry for record in records for name, entry in record.tensors.items()},
        "data_manifest": manifest,
        "created_by": {"dp_size": grid.dp_size, "mp_size": grid.mp_size, "world_size": grid.world_size},
    }


def _read(folder: Path, n: int, grid: RankGrid, data_manifest: Mapping[str, Any] | None) -> EsState:
    document = read_manifest(folder)
    if data_manifest is not None:
        check_manifest(document["data_manifest"], data_manifest)
    if document["samples"] != n:
        raise CheckpointError(
            f"{folder} must hold scores of {n} samples, but holds {document['samples']} instead. "
            "Go on with the blend file the checkpoint was made with."
        )
    low, high = owned_range(n, grid.dp_rank, grid.dp_size)
    score, visits = np.empty(high - low, np.float32), np.empty(high - low, np.uint8)
    reader = Reader(folder, document)
    try:
        reader.read_range("score", score, low)
        reader.read_range("visits", visits, low)
        masks = reader.read_masks()
    finally:
        reader.close()
    created_by: dict[str, Any] = document["created_by"]
    return EsState(low, score, visits, masks, read_state(folder, document), document["data_manifest"], created_by)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and verify the manifest of an `es_state` folder.

    Raises:
        CheckpointError: if it is missing, damaged, or of a format this version does not know.
    """
    document = sealed.read_sealed(folder / MANIFEST)
    found = (document.get("format"), document.get("version"))
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{folder / MANIFEST} must be of format ({FORMAT!r}, {VERSION}), but is of {found} instead. "
            "Load it with the version of es_megatron that wrote it."
        )
    return document


def read_state(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Read and verify what the caller of `save_es_state` gave as `state`."""
    path = folder / STATE
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    sealed.check_crc(content, document["files"][STATE]["crc32"], path)
    return sealed.parse_json(content, path)


class Reader:
    """The tensors of one folder, wherever they are; one file open at a time."""

    def __init__(self, folder: Path, document: Mapping[str, Any]) -> None:
        """Take a folder and what `read_manifest` read in it."""
        self._folder = folder
        self._tensors: dict[str, dict[str, Any]] = document["tensors"]
        self._bounds: list[int] = document["shard_bounds"]
        self._open: TensorFile | None = None

    def read_range(self, kind: str, target: npt.NDArray[Any], low: int) -> None:
        """Fill `target` with the values of the ids from `low` on; `kind` is "score" or "visits"."""
        high = low + len(target)
        first = max(0, int(np.searchsorted(self._bounds, low, side="right")) - 1)
        for shard in range(first, len(self._bounds) - 1):
            start, end = self._bounds[shard], self._bounds[shard + 1]
            if start >= high:
                break
            name = f"{kind}.{shard:05d}"
            if low <= start and end <= high:
                self._read(name, target[start - low : end - low])
            elif end > low:
                # Written with other bounds than today's: read the whole shard, as its checksum covers all of it.
                whole = np.empty(end - start, target.dtype)
                self._read(name, whole)
                left, right = max(start, low), min(end, high)
                target[left - low : right - low] = whole[left - start : right - start]

    def read_masks(self) -> dict[MaskKey, UInt8]:
        """All masks by (component, epoch)."""
        masks: dict[MaskKey, UInt8] = {}
        for name, entry in self._tensors.items():
            kind, *numbers = name.split(".")
            if kind == "mask":
                mask = np.empty(entry["shape"], np.uint8)
                self._read(name, mask)
                masks[int(numbers[0]), int(numbers[1])] = mask
        return masks

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _read(self, name: str, target: npt.NDArray[Any]) -> None:
        entry = self._tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self._folder / MANIFEST} is damaged: tensor {name} is missing.")
        if self._open is None or self._open.path != self._folder / entry["file"]:
            self.close()
            self._open = TensorFile(sealed.file_inside(self._folder, entry["file"], self._folder / MANIFEST))
        self._open.read_into(name, entry, target)
