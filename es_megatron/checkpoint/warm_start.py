"""Begin a run, or go on with one over another blend, with scores that are there already."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.compatibility import check_manifest, list_differences
from es_megatron.checkpoint.es_state import read_manifest, read_state
from es_megatron.checkpoint.transfer import (
    SCORED_SHARE,
    AppendedCheck,
    Transfer,
    find_scores,
    never_appended,
    plan_transfer,
    read_moved,
    saved_blend,
)
from es_megatron.data.manifest import Manifest
from es_megatron.data.schedule import Origin
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore, allocate

LOGGER = logging.getLogger(__name__)

WarmStart = Callable[[ScoreStore], Origin]
"""Says where the data order of a run begins, and loads the scores it begins with into the store, if any; collective."""


def start_with_scores(store: ScoreStore) -> Origin:
    """Load the `scores.initial` of a run's settings, if there are any; collective.

    Returns:
        The beginning of a data order whose scored components are pruned from epoch 0 on.

    Raises:
        CheckpointError: on every rank, if they are missing, damaged, or of other files under the same names.
    """
    given = store.config.scores.initial
    if given is None:
        return Origin()
    with agreed(store.grid, f"begin with the scores of {given}"):
        folder = find_scores(Path(given))
        transfer = plan_transfer(saved_blend(folder), store.manifest)
    scored = load_moved(store, folder, transfer)
    LOGGER.info("scores from %s: %s", folder, "; ".join([*transfer.changes, _told(scored)]))
    return Origin(scored=scored)


def load_moved(store: ScoreStore, folder: Path, transfer: Transfer) -> tuple[str, ...]:
    """Load the scores that a transfer keeps into a store; collective.

    Returns:
        Names of the components whose samples nearly all have a score, the same on every rank.
    """
    size = store.high - store.low
    score = allocate(size, np.float32, store.config.scores.folder)
    visits = allocate(size, np.uint8, store.config.scores.folder)
    with agreed(store.grid, f"load the scores of {folder}"):
        read_moved(folder, transfer, store.low, score, visits)
    store.load(score, visits)
    share = store.seen() / store.manifest.sizes
    return tuple(c.name for c, part in zip(store.manifest.components, share, strict=True) if part >= SCORED_SHARE)


@dataclass(frozen=True)
class Resumption:
    """How a run goes on from a checkpoint."""

    folder: Path
    """Its `es_state` folder."""
    origin: Origin
    """Where its data order begins; where the blend has changed, without the components that have scores."""
    saved: Manifest
    """The blend that saved."""
    state: dict[str, Any]
    """What the run saved beside scores and masks."""
    transfer: Transfer | None
    """What a changed blend keeps; None if it has not changed."""

    def start(self, store: ScoreStore) -> Origin:
        """Beginning of the data order; the scores that a changed blend keeps are loaded, else nothing is."""
        if self.transfer is None:
            return self.origin
        scored = load_moved(store, self.folder, self.transfer)
        LOGGER.info(
            "the blend has changed, iteration %d begins a new order of it: %s",
            self.origin.iteration,
            "; ".join([*self.transfer.changes, _told(scored)]),
        )
        return dataclasses.replace(self.origin, scored=scored)


def read_resumption(
    folder: Path, manifest: Manifest, grid: RankGrid, *, keep_scores: bool, appended: AppendedCheck = never_appended
) -> Resumption:
    """Tell from a checkpoint how a run goes on; collective.

    Args:
        folder: its `es_state` folder.
        manifest: the blend of this run.
        grid: the ranks.
        keep_scores: whether a changed blend may keep the scores of what did not change.
        appended: tells whether a component has grown at its end.

    Raises:
        CheckpointError: on every rank, if the blend has changed and must not, or a file has changed under its name.
    """
    found: list[Resumption] = []
    with agreed(grid, f"read {folder}"):
        document = read_manifest(folder)
        state = read_state(folder, document)
        engine = state["engine"]
        saved = Manifest.from_json(document["data_manifest"])
        if not list_differences(saved.to_json(), manifest.to_json()):
            found.append(Resumption(folder, Origin.from_json(engine["origin"]), saved, state, None))
        else:
            if not keep_scores:
                check_manifest(saved.to_json(), manifest.to_json())
            transfer = plan_transfer(saved, manifest, appended)
            origin = Origin(int(engine["iteration"]), int(engine["stood_for"]))
            found.append(Resumption(folder, origin, saved, state, transfer))
    return found[0]


def _told(scored: Sequence[str]) -> str:
    return f"epoch 0 is pruned for {', '.join(scored)}" if scored else "no component has scores enough to prune epoch 0"
