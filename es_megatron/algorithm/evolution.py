"""Losses to sampling weights and scores (paper eq. 2.5).

Shapes: B sequences of a meta-batch. Scores and losses are float32 nats per token.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from es_megatron.config import Correction

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

F = TypeVar("F", np.float32, np.float64)

MAX_VISITS = 255
NO_LOSS = float("-inf")
"""Loss of a sequence all of whose tokens are masked. It has none, which is nothing bad, unlike one that is nan."""


class Evolved(NamedTuple):
    """What the losses of a meta-batch turn into."""

    weight_B: Float32
    """Sampling weight, used now and never stored; 0 where the loss is not finite."""
    score_B: Float32
    """Score to store; the old one where the loss is not finite."""


def evolve(loss_B: Float32, old_B: Float32, used_B: Float32, beta1: float, beta2: float) -> Evolved:
    """One step of the decoupled exponential moving averages (eq. 2.5); both lines take the old score.

    Args:
        loss_B: float32[B], mean token loss of each sequence at the current parameters.
        old_B: float32[B], stored scores.
        used_B: float32[B], the same scores as they are used (`usable_scores`); equal to `old_B` for the paper.
        beta1: share of the score in the weight.
        beta2: decay of the score.

    Returns:
        Weights and new scores.
    """
    finite_B = np.isfinite(loss_B)
    safe_B = np.where(finite_B, loss_B, np.float32(0))
    weight_B = np.float32(beta1) * used_B + np.float32(1 - beta1) * safe_B
    score_B = np.float32(beta2) * old_B + np.float32(1 - beta2) * safe_B
    return Evolved(
        np.where(finite_B, np.maximum(weight_B, np.finfo(np.float32).tiny), np.float32(0)),
        np.where(finite_B, score_B, old_B),
    )


def usable_scores(
    score: Float32, visits: UInt8, beta2: float, start: float, correction: Correction, unseen: float | Float32
) -> Float32:
    """Scores as they are used for choosing.

    `paper` uses them as stored, 1/n where never visited. `debiased` takes the start value out, (s - beta2^k / n) /
    (1 - beta2^k) after k visits, and puts `unseen` where k = 0.

    Args:
        score: float32[...], stored; ignored where `visits` is 0.
        visits: uint8[...], saturating.
        beta2: decay of the score.
        start: 1/n.
        correction: which of the two.
        unseen: what an unseen sample counts as under `debiased`, its component's mean.

    Returns:
        float32[...], finite and >= 0.
    """
    if correction == "paper":
        return np.where(visits == 0, np.float32(start), score)
    left = (np.float64(beta2) ** np.arange(MAX_VISITS + 1)).astype(np.float64)
    left[0] = 0.0  # no division by zero; unseen ones are replaced below
    debiased = (score - left[visits] * start) / (1.0 - left[visits])
    return np.where(visits == 0, unseen, np.maximum(debiased, 0.0)).astype(np.float32)


def raise_to_floor(weight: npt.NDArray[F], floor: float, mean: float) -> npt.NDArray[F]:
    """Lift positive weights to at least `floor` times `mean`; zeros (bad losses) stay zero."""
    if floor == 0.0:
        return weight
    return np.where(weight > 0, np.maximum(weight, weight.dtype.type(floor * mean)), weight)
