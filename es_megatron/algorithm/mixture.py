"""How the chosen sequences of a meta-batch are shared out to components, so that training keeps the user's blend."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.selection import check_enough

Int64 = npt.NDArray[np.int64]


class Shares(NamedTuple):
    """How many sequences of each component are trained, and what that leaves over."""

    given_C: Int64
    carry_C: Int64
    """Claims that were not served, in units of 1/B sequences; they sum to what they summed to before."""


def share_out(rate: int, meta_batch: int, drawn_C: Int64, eligible_C: Int64, carry_C: Int64) -> Shares:
    """Share b' of B' drawn sequences out in proportion to what each of C components drew, in whole numbers.

    A component claims rate / B of what it drew, and what earlier meta-batches owe it. It gets the whole part of its
    claim, but no more than it has and no less than none; what is left over goes one by one to the largest open claims,
    and what is too much is taken from the smallest. Ties go to the lower component. So over any number of meta-batches
    a component is trained on rate / B of what it drew, give or take two sequences.

    Args:
        rate: sequences chosen of a meta-batch, b.
        meta_batch: its size, B. A part of it (B' sequences) has b' = b B' / B chosen.
        drawn_C: int64[C], sequences of each component; their sum is B'.
        eligible_C: int64[C], those of them that can be trained.
        carry_C: int64[C], of the meta-batch before, in units of 1/B.

    Raises:
        LossError: fewer than b' can be trained.
    """
    count = rate * int(drawn_C.sum()) // meta_batch
    check_enough(int(eligible_C.sum()), count, int(drawn_C.sum()))
    claim_C = rate * drawn_C + carry_C
    given_C = np.clip(claim_C // meta_batch, 0, eligible_C)
    for _ in range(count - int(given_C.sum())):
        open_C = np.where(given_C < eligible_C, claim_C - meta_batch * given_C, np.iinfo(np.int64).min)
        given_C[np.argmax(open_C)] += 1
    for _ in range(int(given_C.sum()) - count):
        open_C = np.where(given_C > 0, claim_C - meta_batch * given_C, np.iinfo(np.int64).max)
        given_C[np.argmin(open_C)] -= 1
    return Shares(given_C, claim_C - meta_batch * given_C)


def first_of_each(order: Int64, component: Int64, given_C: Int64) -> Int64:
    """The first `given_C[c]` positions of every component c, in an order of preference.

    Args:
        order: int64[N], positions that can be taken, the most preferred first.
        component: int64[B], of every position.
        given_C: int64[C], <= how often each component stands in `order`.

    Returns:
        int64[given_C.sum()], rising positions.
    """
    ordered = component[order]
    by_component = order[np.argsort(ordered, kind="stable")]
    count_C = np.bincount(ordered, minlength=len(given_C))
    place = np.arange(len(order)) - np.repeat(np.cumsum(count_C) - count_C, count_C)
    return np.sort(by_component[place < np.repeat(given_C, count_C)])
