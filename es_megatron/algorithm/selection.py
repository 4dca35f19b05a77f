"""Weights to chosen positions of a meta-batch, and what the chosen losses weigh.

Weighted draw without replacement as an exponential race (Efraimidis & Spirakis 2006): key_j = -log(u_j) / w_j, the b
smallest keys win. That is the law of drawing one at a time proportionally to the weights that are left (Algorithm 1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.errors import LossError

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
AnyFloat = npt.NDArray[np.floating]


class Race(NamedTuple):
    """Outcome of a race."""

    chosen: Int64
    """int64[count], rising positions."""
    runner_up: float
    """The smallest key that lost, inf where nothing lost; the tau of inclusion probabilities."""


def race_keys(weight: AnyFloat, uniform: Float64) -> Float64:
    """Keys of the race, float64 like `weight`; inf where the weight is 0."""
    with np.errstate(divide="ignore"):
        return -np.log(uniform) / weight.astype(np.float64)


def race(weight: AnyFloat, uniform: Float64, count: int) -> Race:
    """Draw `count` positions without replacement, proportionally to weight; ties go to the lower position.

    Args:
        weight: float[B], >= 0; 0 is never drawn.
        uniform: float64[B] in (0, 1).
        count: how many, <= B.

    Raises:
        LossError: fewer than `count` weights are above 0.
    """
    check_enough(int(np.count_nonzero(weight)), count, len(weight))
    keys = race_keys(weight, uniform)
    order = np.argsort(keys, kind="stable")
    runner_up = float(keys[order[count]]) if count < len(order) else np.inf
    return Race(np.sort(order[:count]).astype(np.int64), runner_up)


def check_enough(found: int, count: int, size: int) -> None:
    """Refuse to choose from too few.

    Raises:
        LossError: fewer than `count` can be chosen.
    """
    if found < count:
        raise LossError(
            f"At least {count} sequences of the meta-batch must have a finite loss to be chosen from, but {found} of "
            f"{size} have. Look at the named rows, lower the learning rate, or check the precision. Rows whose tokens "
            "are all masked have none: leave them out of the data."
        )


def race_groups(weight: AnyFloat, uniform: Float64, count: int, group: int) -> Int64:
    """Draw whole groups of `group` consecutive positions by their mean weight.

    Args:
        weight: float[B]; a group with a 0 in it is never drawn.
        uniform: float64[B], of which the first B/group are used.
        count: positions to draw, a multiple of `group`.
        group: positions in a group, dividing B.

    Returns:
        int64[count], rising positions.
    """
    grouped = weight.astype(np.float64).reshape(-1, group)
    mean = np.where((grouped > 0).all(axis=1), grouped.mean(axis=1), 0.0)
    groups = race(mean, uniform[: len(mean)], count // group).chosen
    return (groups[:, None] * group + np.arange(group)).reshape(-1)


def best(weight: AnyFloat, count: int) -> Int64:
    """The positions of the `count` largest weights; ties go to the lower position.

    Args:
        weight: float[B]; -inf is never taken.
        count: how many, <= B.

    Returns:
        int64[count], rising.

    Raises:
        LossError: fewer than `count` weights are finite.
    """
    check_enough(int(np.isfinite(weight).sum()), count, len(weight))
    return np.sort(np.argsort(-weight, kind="stable")[:count]).astype(np.int64)


def best_groups(weight: AnyFloat, count: int, group: int) -> Int64:
    """The same for whole groups of `group` consecutive positions, by their mean weight; see `race_groups`."""
    groups = best(weight.astype(np.float64).reshape(-1, group).mean(axis=1), count // group)
    return (groups[:, None] * group + np.arange(group)).reshape(-1)


def inclusion_weights(weight: AnyFloat, outcome: Race, count: int) -> Float64:
    """What each chosen loss is multiplied by so that the mean over the chosen is unbiased for the mean over all B.

    pi_i = 1 - exp(-w_i * tau) with tau the (count+1)-th smallest key (Horvitz-Thompson conditional on tau), and the sum
    over the chosen is divided by B: relative to a mean over the chosen that is (count / B) / pi_i.

    Returns:
        float64[count] for `outcome.chosen`.
    """
    pi = -np.expm1(-weight[outcome.chosen].astype(np.float64) * outcome.runner_up)
    return (count / len(weight)) / pi


def assign(chosen: Int64, owner: Int64, ranks: int) -> list[Int64]:
    """Share the chosen positions out to data-parallel ranks, the same count each, moving few.

    A rank keeps its own positions as far as they fit; what is over fills the ranks that have too few, in rank order.

    Args:
        chosen: int64[b], rising; b is a multiple of `ranks`.
        owner: int64[B], the rank that loaded each position.
        ranks: data-parallel size.

    Returns:
        For each rank int64[b/ranks], rising.
    """
    share = len(chosen) // ranks
    kept = [chosen[owner[chosen] == rank] for rank in range(ranks)]
    spare = np.sort(np.concatenate([own[share:] for own in kept]))
    result: list[Int64] = []
    for own in kept:
        missing = max(0, share - len(own))
        result.append(np.sort(np.concatenate([own[:share], spare[:missing]])))
        spare = spare[missing:]
    return result


def positions_of(rank: int, ranks: int, meta_batch: int, micro_batch: int) -> Int64:
    """Positions of the meta-batch that a data-parallel rank loads, micro-batch by micro-batch.

    The order of upstream's `MegatronPretrainingSampler`: global micro-batch k holds positions [k*mbs*ranks, ...), of
    which rank d takes the d-th run of mbs.

    Returns:
        int64[meta_batch / ranks].
    """
    position = np.arange(meta_batch, dtype=np.int64).reshape(-1, ranks, micro_batch)
    return position[:, rank].reshape(-1)


def owners(ranks: int, meta_batch: int, micro_batch: int) -> Int64:
    """Rank that loads each position, int64[meta_batch]; the inverse of `positions_of`."""
    return np.arange(meta_batch, dtype=np.int64) // micro_batch % ranks
