"""Losses of a reference model on disk: an `es_state` folder whose scores are those losses, and whose visits say where.

So they are sealed, sharded, read as Parquet and matched with a blend as scores are. What tells them apart is the key
`reference` of their state, which says what made them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.es_state import read_manifest, read_state
from es_megatron.checkpoint.transfer import Transfer, find_scores, plan_transfer, read_moved, saved_blend
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import CheckpointError
from es_megatron.scores.reference import ReferenceLosses
from es_megatron.scores.store import ScoreStore

LOGGER = logging.getLogger(__name__)

REFERENCE = "reference"
"""Key of the state that says what made the losses: `model`, `tokens` of a row that they are about, `losses`."""
IMPORTED = "imported_from"
"""Key of the state of an imported table."""


def bind_reference(store: ScoreStore, tokens: int) -> None:
    """Load the reference losses of a run's settings into its store, if there are any; collective.

    Args:
        store: of the run, before it has scores.
        tokens: first tokens of a row that the run's losses are about.

    Raises:
        CheckpointError: on every rank, if they are missing, damaged, of other files under the same names, of a run's
            scores, or about other tokens than the run's losses.
    """
    config = store.config
    if config.reference.folder is None:
        return
    found: list[ReferenceLosses] = []
    with agreed(store.grid, f"read the reference {config.reference.folder}"):
        folder = find_scores(Path(config.reference.folder))
        document = read_manifest(folder)
        check_kind(folder, read_state(folder, document), store.manifest.seq_length, tokens)
        transfer = plan_transfer(saved_blend(folder), store.manifest)
        found.append(_read(folder, transfer, store, fingerprint_of(document)))
    store.reference = found[0]
    store.reference.count_known(store.grid)
    _tell(store.reference, config)


def fingerprint_of(document: Mapping[str, Any]) -> str:
    """What makes reference losses what they are, wherever they stand: their values, and the rows they belong to."""
    sums = {name: entry["crc32"] for name, entry in document["tensors"].items() if not name.startswith("mask")}
    rows = [[each["name"], each["samples"], each["fingerprint"]] for each in document["data_manifest"]["components"]]
    return hashlib.blake2b(json.dumps([sorted(sums.items()), rows]).encode(), digest_size=8).hexdigest()


def check_kind(folder: Path, state: Mapping[str, Any], seq_length: int, asked: int) -> None:
    """Refuse what is no reference, or one whose losses are about other tokens than the run's.

    Raises:
        CheckpointError: naming both, and the cure.
    """
    if REFERENCE not in state and IMPORTED not in state:
        raise CheckpointError(
            f"`{folder}` must hold the losses of one model, but holds the scores of a run instead, which are means "
            "over its training. Score the blend with a checkpoint of it: `es-megatron reference score`."
        )
    tokens = int(state.get(REFERENCE, {}).get("tokens", seq_length))
    if tokens != asked:
        raise CheckpointError(
            f"The losses of `{folder}` must be about the first {asked} tokens of a row, as the run's are, but are "
            f"about {tokens} instead. Make them with `es-megatron reference score --tokens {asked}`, or use a scorer "
            "that reads whole rows."
        )


def _read(folder: Path, transfer: Transfer, store: ScoreStore, fingerprint: str) -> ReferenceLosses:
    loss = np.zeros(store.high - store.low, np.float32)
    known = np.zeros(len(loss), np.uint8)
    read_moved(folder, transfer, store.low, loss, known)
    loss[(known == 0) | ~np.isfinite(loss)] = np.nan
    narrow = store.config.reference.precision == "float16"
    return ReferenceLosses(store.manifest, store.low, loss.astype(np.float16) if narrow else loss, fingerprint)


def _tell(reference: ReferenceLosses, config: EvolvedSamplingConfig) -> None:
    """Say what has no reference losses; refuse whole components without them where they would compete with others.

    Raises:
        CheckpointError: such a component with `mixture: free`.
    """
    names = [component.name for component in reference.manifest.components]
    without = [names[c] for c in np.flatnonzero(reference.missing)]
    more = "`es-megatron reference score` adds them to the folder, and scores nothing twice."
    if without and config.mixture == "free":
        raise CheckpointError(
            f"Every component must have reference losses with `mixture: free`, but {', '.join(without)} has none. "
            f"{more}"
        )
    if without:
        LOGGER.warning("no reference losses for %s: chosen by their own losses alone. %s", ", ".join(without), more)
    samples = reference.manifest.sizes
    for c in np.flatnonzero(~reference.missing & (reference.known[:, 0] < samples)):
        lacking = int(samples[c] - reference.known[c, 0])
        LOGGER.warning(
            "%d of %d rows of %s have no reference loss, and count as its mean", lacking, samples[c], names[c]
        )
