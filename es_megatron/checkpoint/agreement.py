"""Work that all ranks do at once, and whose failure on one of them is a failure on all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from es_megatron.errors import CheckpointError, EsError

if TYPE_CHECKING:
    from es_megatron.rank_grid import RankGrid

_SHOWN_RANKS = 3
_CURES = {
    errno.ENOSPC: "free space there or choose another checkpoint folder, or keep fewer checkpoints",
    errno.EDQUOT: "raise the quota or choose another checkpoint folder, or keep fewer checkpoints",
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`)",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EROFS: "choose a checkpoint folder that is not mounted read-only",
    errno.ENOENT: "the folder must exist, on a file system that all ranks share",
    errno.ENOTDIR: "choose a checkpoint folder whose path holds no file",
}


@contextmanager
def agreed(
    grid: RankGrid,
    task: str,
    undo: Callable[[], None] | None = None,
    *,
    kind: type[EsError] = CheckpointError,
    tell: Callable[[Exception], None] | None = None,
) -> Generator[None]:
    """Do the body on every rank; return on every rank or raise on every rank.

    The ranks meet once at the end. Exceptions that end a process (a signal's) pass through.

    Args:
        grid: the ranks that do it.
        task: what the body does, for the message: "write the scores".
        undo: called on world rank 0 after a failure, when no rank is in the body any more.
        kind: what a failure is.
        tell: called with a failure at once, before the ranks meet. A body with collectives of its own needs it: the
            other ranks may wait in one of them, and would never come to the end.

    Raises:
        EsError: of that kind, if the body failed on any rank; it names the ranks and what they said.
    """
    cause: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        cause = error
        if tell is not None:
            tell(error)
    try:
        problems: list[str | None] = grid.gather_objects(None if cause is None else describe(cause))
    except RuntimeError:
        if cause is None:
            raise
        raise kind(f"Could not {task}: {describe(cause)}") from cause  # the others are gone; this is why
    failed = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem is not None]
    if not failed:
        return
    if undo is not None:
        _undo(grid, undo)
    more = f" ({len(failed) - _SHOWN_RANKS} more ranks failed)" if len(failed) > _SHOWN_RANKS else ""
    said = failed[0].partition(": ")[2] if grid.world_size == 1 else "; ".join(failed[:_SHOWN_RANKS])
    raise kind(f"Could not {task}: {said}{more}") from cause


def compute_on_first(grid: RankGrid, task: str, compute: Callable[[], Any]) -> Any:
    """What `compute` returns on world rank 0 (a small object), on every rank; raises on every rank if it fails."""
    value: Any = None
    with agreed(grid, task):
        if grid.world_rank == 0:
            value = compute()
    return grid.broadcast_object(value)


def describe(error: Exception) -> str:
    """One sentence or two: what happened to which file, and the cure where one is known."""
    if isinstance(error, EsError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        cure = f"; {_CURES[error.errno]}" if error.errno in _CURES else ""
        return f"{where}{os.strerror(error.errno)}{cure}."
    return f"{type(error).__name__}: {error}"


def _undo(grid: RankGrid, undo: Callable[[], None]) -> None:
    try:
        if grid.world_rank == 0:
            undo()
    except OSError:
        # What is left over carries a temporary name; the next save removes it. The first failure is the one to tell.
        pass
    finally:
        grid.barrier()
