"""Reference losses for tests, written as `es-megatron reference score` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.checkpoint.es_state import ScoreRange, save_es_state
from es_megatron.data.manifest import Manifest
from es_megatron.rank_grid import RankGrid


def write_reference(folder: Path, manifest: Manifest, loss: npt.ArrayLike, tokens: int | None = None) -> Path:
    """A reference folder; losses that are nan are missing."""
    value = np.asarray(loss, np.float32)
    known = np.isfinite(value)
    state: dict[str, Any] = {"reference": {"model": "a test", "tokens": tokens or manifest.seq_length}}
    scores = ScoreRange(manifest.total, 0, np.where(known, value, 0).astype(np.float32), known.astype(np.uint8))
    save_es_state(folder, scores, {}, state, manifest.to_json(), RankGrid.alone())
    return folder
