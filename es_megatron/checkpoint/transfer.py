"""Scores that stay when a blend changes, or that another run has: matched by component, never by number.

A sample is (component, row). A component of the same name and fingerprint has the same rows, wherever its ids begin.
One that has grown keeps those of its rows that a check of its files vouches for. Anything else under a known name is
another text with other scores: it is refused, since nobody could tell later what its numbers meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from es_megatron.checkpoint.es_state import Reader, read_manifest
from es_megatron.checkpoint.rotation import newest_of
from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import CheckpointError

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

SCORED_SHARE = 0.99
"""Share of a component's samples that must have a score for its epoch 0 to be pruned."""

AppendedCheck = Callable[[Component, Component], bool]
"""Whether a component (second) holds the rows of an older one (first) of the same name, followed by others."""


@dataclass(frozen=True)
class Move:
    """Rows 0 ... rows-1 of a component, from its old ids to its new ones."""

    source: int
    target: int
    rows: int


@dataclass(frozen=True)
class Transfer:
    """What of saved scores a blend can use."""

    moves: tuple[Move, ...]
    changes: tuple[str, ...]
    """What is different, one sentence each; empty if nothing is."""


def never_appended(before: Component, now: Component) -> bool:
    """The check where component files cannot be looked at: nothing is known to be an older file with more behind it."""
    return before == now


def plan_transfer(saved: Manifest, current: Manifest, appended: AppendedCheck = never_appended) -> Transfer:
    """Match the components of two blends.

    Args:
        saved: that the scores belong to.
        current: that is to use them.
        appended: tells whether a component with more rows begins with the old ones.

    Raises:
        CheckpointError: a component's file changed under its name, or sequences have another length.
    """
    if saved.seq_length != current.seq_length:
        raise CheckpointError(
            f"`seq_length` must be {saved.seq_length} to use these scores, but is {current.seq_length} instead: rows "
            "of another length are other samples. Restore it, or begin without scores."
        )
    before = {component.name: (number, component) for number, component in enumerate(saved.components)}
    names = [component.name for component in current.components]
    moves: list[Move] = []
    changes = [f"`{name}` was removed, its scores are dropped" for name in before if name not in names]
    for number, now in enumerate(current.components):
        if now.name not in before:
            changes.append(f"`{now.name}` was added with {now.samples} samples, which have no score yet")
            continue
        old_number, old = before[now.name]
        _check_same(old, now, appended)
        moves.append(Move(int(saved.offsets[old_number]), int(current.offsets[number]), old.samples))
        if now.samples != old.samples:
            more = now.samples - old.samples
            changes.append(f"`{now.name}` has {more} more samples, its first {old.samples} keep their scores")
    shares = [_shares(manifest) for manifest in (saved, current)]
    changes += [
        f"`{name}` has {shares[1][name]:.4%} of the draws, and had {shares[0][name]:.4%}"
        for name in names
        if name in before and abs(shares[0][name] - shares[1][name]) > 1e-9
    ]
    if not changes and list(before) != names:
        changes.append("the components stand in another order")
    return Transfer(tuple(moves), tuple(changes))


def read_moved(folder: Path, transfer: Transfer, low: int, score: Float32, visits: UInt8) -> None:
    """Fill a rank's range with the scores that it can use; what has none stays 0 with 0 visits.

    Args:
        folder: an `es_state` folder.
        transfer: from its blend to this run's.
        low: first id of the range.
        score: float32[S], zeros, overwritten.
        visits: uint8[S], zeros, overwritten.

    Raises:
        CheckpointError: something is damaged.
    """
    reader = Reader(folder, read_manifest(folder))
    try:
        for move in transfer.moves:
            first, end = max(low, move.target), min(low + len(score), move.target + move.rows)
            if first < end:
                source = move.source + first - move.target
                reader.read_range("score", score[first - low : end - low], source)
                reader.read_range("visits", visits[first - low : end - low], source)
    finally:
        reader.close()


def saved_blend(folder: Path) -> Manifest:
    """The blend that the scores of an `es_state` folder belong to."""
    return Manifest.from_json(read_manifest(folder)["data_manifest"])


def find_scores(path: Path) -> Path:
    """The `es_state` folder that a path means: itself, that of a checkpoint, or that of a run's newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    newest = [newest_of(root) for root in (path, path / "checkpoints")]
    candidates = [
        path,
        path / "es_state",
        *(checkpoint / "es_state" for checkpoint in newest if checkpoint is not None),
    ]
    for folder in candidates:
        if (folder / "manifest.json").is_file():
            return folder
    raise CheckpointError(
        f"`{path}` must be an `es_state` folder, a checkpoint with one, or the folder of a run, but none is there. "
        "Look for a folder with a `manifest.json` that names score files."
    )


def _check_same(old: Component, now: Component, appended: AppendedCheck) -> None:
    if now.samples == old.samples and now.same_content(old):
        return
    if now.samples > old.samples and appended(old, now):
        return
    raise CheckpointError(
        f"The files of component `{now.name}` must be those its scores belong to ({old.samples} samples, fingerprint "
        f"{old.fingerprint}), or those with text appended, but are others ({now.samples} samples, fingerprint "
        f"{now.fingerprint}). Restore them, or give the changed component another name: it then begins without scores."
    )


def _shares(manifest: Manifest) -> dict[str, float]:
    total = sum(component.weight for component in manifest.components)
    return {component.name: component.weight / total for component in manifest.components}
