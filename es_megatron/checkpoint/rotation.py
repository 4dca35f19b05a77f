"""The checkpoints of a run: `iter_0000100/`, `iter_0000200/`, ... and the file `latest` that names the newest.

A checkpoint is written as `iter_0000200.partial/`, by whoever has something to save. `commit` adds the checksums of
every file below it, flushes all of it to the disk, gives it its name, moves `latest`, and only then removes the oldest.
So a crash at any moment leaves the checkpoint before or the new one, whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from es_megatron.checkpoint import disk, sealed
from es_megatron.checkpoint.agreement import agreed, compute_on_first
from es_megatron.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from es_megatron.rank_grid import RankGrid

CHECKSUMS = "checksums.json"
LATEST = "latest"

Checksums = dict[str, list[int | str]]
"""Bytes and CRC32 of files by their path."""

_NAME = re.compile(r"iter_(\d{7,})")
_LEFTOVERS = (disk.PARTIAL, disk.REPLACED, disk.REMOVED)
_log = logging.getLogger(__name__)


def newest_of(root: Path) -> Path | None:
    """The checkpoint that `latest` in a folder names, ours or DeepSpeed's, unread; None if it names none below it."""
    try:
        name = (root / LATEST).read_bytes().decode(errors="replace").strip()
    except OSError:
        return None
    return root / name if sealed.leads_down(name) else None


class CheckpointDirectory:
    """Where the checkpoints of one run live. Methods are collective over the world and answer the same everywhere."""

    def __init__(self, root: str | Path, keep: int, grid: RankGrid) -> None:
        """Nothing is read or written yet.

        Args:
            root: folder of the checkpoints, on a file system that all ranks share.
            keep: complete checkpoints to keep, at least 1; while saving there is room for one more.
            grid: the ranks.
        """
        if keep < 1:
            raise ConfigError(f"`keep` must be at least 1, but is {keep} instead. Set it to the checkpoints to keep.")
        self.root = Path(root)
        self.keep = keep
        self.holds = False
        """Whether older checkpoints stay for now, however many there are."""
        self._grid = grid
        self._damaged: set[str] = set()

    def path(self, iteration: int) -> Path:
        """Where the finished checkpoint of an iteration stands."""
        return self.root / f"iter_{iteration:07d}"

    @contextmanager
    def saving(self, iteration: int) -> Generator[Path]:
        """Write a checkpoint in the body of a `with`, commit it after, drop it if the body fails on any rank.

        Yields:
            Folder to write to.

        Raises:
            CheckpointError: on every rank, if the body or the commit failed on any; older checkpoints are untouched.
        """
        partial = self.begin(iteration)
        with agreed(self._grid, f"save {self.path(iteration)}", lambda: disk.remove_tree(partial)):
            yield partial
        self.commit(iteration)

    def begin(self, iteration: int) -> Path:
        """Make the folder to write the checkpoint of an iteration to, and clear what interrupted saves left over."""
        partial = disk.sibling(self.path(iteration), disk.PARTIAL)
        with agreed(self._grid, f"prepare {partial}", lambda: disk.remove_tree(partial)):
            if self._grid.world_rank == 0:
                disk.make_folder(self.root)
                self._pointer()
                self._recover()
                for path in self.root.iterdir():
                    if path.suffix in _LEFTOVERS and _NAME.fullmatch(path.stem):
                        disk.remove_tree(path)
                disk.make_folder(partial)
        return partial

    def abort(self, iteration: int) -> None:
        """Drop what has been written since `begin`."""
        with agreed(self._grid, f"remove the beginning of {self.path(iteration)}"):
            if self._grid.world_rank == 0:
                self.drop(iteration)

    def drop(self, iteration: int) -> None:
        """The same on one rank alone, when no other is writing any more."""
        disk.remove_tree(disk.sibling(self.path(iteration), disk.PARTIAL))

    def commit(self, iteration: int) -> Path:
        """Make what has been written since `begin` the newest checkpoint.

        Returns:
            Where it stands now.

        Raises:
            CheckpointError: on every rank, if it failed on any; older checkpoints are untouched.
        """
        partial = disk.sibling(self.path(iteration), disk.PARTIAL)
        self._grid.barrier()
        parts: Checksums = {}
        with agreed(self._grid, f"checksum {partial}", lambda: disk.remove_tree(partial)):
            parts = self.checksum(iteration)
        return self.finish(iteration, parts)

    def checksum(self, iteration: int) -> Checksums:
        """Flush and checksum this rank's share of what has been written since `begin`, when all ranks have written.

        Not collective: it may run in a thread of its own.
        """
        partial = disk.sibling(self.path(iteration), disk.PARTIAL)
        mine = _share(disk.list_files(partial), self._grid)
        return {name: _record(partial / name) for name in mine}

    def finish(self, iteration: int, parts: Checksums) -> Path:
        """The last step of `commit`, with every rank's `checksum`."""
        final = self.path(iteration)
        partial = disk.sibling(final, disk.PARTIAL)

        def undo() -> None:
            disk.remove_tree(partial)

        gathered = self._grid.gather_objects(parts)
        with agreed(self._grid, f"finish {final}", undo):
            if self._grid.world_rank == 0:
                files = {name: record for part in gathered for name, record in part.items()}
                _complete(partial, files)
                document = {"iteration": iteration, "files": dict(sorted(files.items()))}
                disk.write_file(partial / CHECKSUMS, [sealed.seal(document)])
                disk.sync_tree(partial)
                disk.move_into_place(partial, final)
                disk.replace_file(self.root / LATEST, final.name.encode() + b"\n")
        self._damaged.discard(final.name)
        if self._grid.world_rank == 0 and not self.holds:
            self._remove_oldest(iteration)
        self._grid.barrier()
        return final

    def find(self) -> Path | None:
        """The newest checkpoint that is complete and undamaged, down from the one `latest` names.

        Every file is read and verified, each by one rank. What is skipped is logged with the file that is damaged.

        Returns:
            Its folder, or None if the run has no checkpoint yet.

        Raises:
            CheckpointError: on every rank, if there are checkpoints and none of them can be used.
        """
        names: list[str] = compute_on_first(self._grid, f"list the checkpoints in {self.root}", self._list_candidates)
        damages: list[str] = []
        for name in names:
            damage = self._verify(name)
            if damage is None:
                return self.root / name
            self._damaged.add(name)
            damages.append(damage)
            if self._grid.world_rank == 0:
                _log.warning(
                    "Checkpoint %s cannot be used: %s Falling back to the one before.", self.root / name, damage
                )
        if damages:
            raise CheckpointError(
                f"None of the {len(damages)} checkpoints in {self.root} can be used; the newest: {damages[0]} "
                "Restore one from a copy, or start a new run in another folder."
            )
        return None

    def _list_candidates(self) -> list[str]:
        if not self.root.is_dir():
            return []
        self._recover()
        names = self._list_committed()
        latest = self._read_latest()
        if latest is None:
            return names
        if latest not in names:
            _log.warning("%s names %s, which is missing.", self.root / LATEST, latest)
        # Newer than `latest`: left behind by a run that went back, or by a crash just before the pointer moved.
        upto = [name for name in names if _number(name) <= _number(latest)]
        return upto + [name for name in names if name not in upto]

    def _list_committed(self) -> list[str]:
        """Names of the finished checkpoints, newest first."""
        names = [path.name for path in self.root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(names, key=_number, reverse=True)

    def _read_latest(self) -> str | None:
        path = self._pointer()
        try:
            name = path.read_bytes().decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        if _NAME.fullmatch(name) is None:
            _log.warning("%s is damaged: it names %r.", path, name)
            return None
        return name

    def _pointer(self) -> Path:
        """Where `latest` is, or will be."""
        path = self.root / LATEST
        if path.is_dir():
            raise CheckpointError(
                f"{path} must be a file that names the newest checkpoint, but is a folder. Remove it, or give it "
                "another name: the newest whole checkpoint is used then."
            )
        return path

    def _recover(self) -> None:
        for path in list(self.root.iterdir()):
            if path.suffix == disk.REPLACED and _NAME.fullmatch(path.stem):
                final = path.with_suffix("")
                try:
                    restored = disk.restore(final)
                except OSError as error:
                    _log.warning("%s cannot be renamed to %s: %s.", path, final.name, error.strerror)
                    continue
                if restored:
                    _log.warning("%s had been moved aside by an interrupted save; it is back.", final)

    def _verify(self, name: str) -> str | None:
        """What is wrong with a checkpoint, or None; the same on every rank."""
        damages: list[str | None] = self._grid.gather_objects(self._verify_share(self.root / name))
        return next((damage for damage in damages if damage is not None), None)

    def _verify_share(self, folder: Path) -> str | None:
        try:
            files = _read_checksums(folder)
        except CheckpointError as error:
            return str(error)
        sizes = {name: int(record[0]) for name, record in files.items()}
        for name in _share(sizes, self._grid):
            path = folder / name
            try:
                size, crc = disk.checksum_file(sealed.file_inside(folder, name, folder / CHECKSUMS))
            except CheckpointError as error:
                return str(error)
            except FileNotFoundError:
                return f"{path} is missing."
            except OSError as error:
                return f"{path} cannot be read: {error.strerror}."
            if [size, sealed.format_crc(crc)] != files[name]:
                return (
                    f"{path} is damaged: it has {size} bytes and checksum {sealed.format_crc(crc)}, "
                    f"but {files[name][0]} and {files[name][1]} were recorded."
                )
        return None

    def _remove_oldest(self, iteration: int) -> None:
        """Remove what is older than the newest `keep` that are good; those of later iterations are not touched."""
        try:
            older = [name for name in self._list_committed() if _number(name) <= iteration]
            good = [name for name in older if name not in self._damaged]
            for name in older:
                if _number(name) < _number(good[: self.keep][-1]):
                    disk.retire(self.root / name)
        except OSError as error:
            _log.warning("An old checkpoint could not be removed: %s: %s.", error.filename, error.strerror)


def _number(name: str) -> int:
    return int(name.removeprefix("iter_"))


def _record(path: Path) -> list[int | str]:
    size, crc = disk.checksum_file(path, sync=True)
    return [size, sealed.format_crc(crc)]


def _share(sizes: Mapping[str, int], grid: RankGrid) -> list[str]:
    """The files this rank reads: largest first in turns, so that every rank reads about as much."""
    ordered = sorted(sizes, key=lambda name: (-sizes[name], name))
    return ordered[grid.world_rank :: grid.world_size]


def _complete(folder: Path, files: dict[str, list[int | str]]) -> None:
    """Match what the ranks saw with what world rank 0 sees: a network file system may show a new file late."""
    present = disk.list_files(folder)
    if not present:
        raise CheckpointError(f"{folder} is empty: write the checkpoint between `begin` and `commit`.")
    for name in sorted(set(files) - set(present)):
        raise CheckpointError(
            f"{folder / name} is seen by another rank only: checkpoints must be on a file system that all ranks share."
        )
    for name in present:
        if name not in files:
            files[name] = _record(folder / name)


def _read_checksums(folder: Path) -> dict[str, list[int | str]]:
    document = sealed.read_sealed(folder / CHECKSUMS)
    if document.get("iteration") != _number(folder.name):
        raise CheckpointError(f"{folder / CHECKSUMS} belongs to iteration {document.get('iteration')}.")
    return document["files"]
