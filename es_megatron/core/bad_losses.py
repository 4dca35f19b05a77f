"""Losses that are not finite: named, counted, and too many of them stop the run.

A sequence whose tokens are all masked has no loss, which is nothing bad: it is never chosen, and counted apart. Between
the frameworks and the engine its loss is `NO_LOSS`, which a mean of token losses cannot be.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.evolution import NO_LOSS
from es_megatron.data.manifest import Manifest
from es_megatron.data.sampler import MetaBatch
from es_megatron.errors import LossError

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

LOGGER = logging.getLogger(__name__)

NAMED_ROWS = 8


def check_losses(
    manifest: Manifest, batch: MetaBatch, loss: Float32, positions: Int64, iteration: int, limit: float
) -> None:
    """Log sequences with a non-finite loss, and stop when there are too many; those without a loss are none.

    Args:
        manifest: the blend.
        batch: the meta-batch.
        loss: float32[N].
        positions: int64[N], of those losses in the meta-batch.
        iteration: of the run.
        limit: share of the meta-batch that may be bad.

    Raises:
        LossError: more are.
    """
    at = positions[is_bad(loss)]
    if len(at) == 0:
        return
    rows = ", ".join(f"{manifest.components[batch.component[p]].name}[{batch.row[p]}]" for p in at[:NAMED_ROWS])
    told = f"{len(at)} of {len(loss)} sequences of iteration {iteration} have a non-finite loss: {rows}"
    if len(at) > limit * len(batch.id):
        raise LossError(
            f"{told}. That is more than `selection.max_bad_losses` = {limit} of the meta-batch. Look at "
            "these rows, lower the learning rate, or check the precision; resume from the last checkpoint."
        )
    LOGGER.warning("%s; they are left out", told)


def is_bad(loss: Float32) -> npt.NDArray[np.bool_]:
    """Which losses should be finite and are not, bool like `loss`."""
    return ~np.isfinite(loss) & (loss != NO_LOSS)


def mean_of_all(loss: Float32) -> float:
    """Mean of the losses of all sequences that have one; nan where one of them is not finite."""
    return float("nan") if is_bad(loss).any() else mean_of_finite(loss)


def mean_of_finite(loss: Float32) -> float:
    """Mean of the losses that are finite, nan where none is."""
    finite = loss[np.isfinite(loss)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else float("nan")
