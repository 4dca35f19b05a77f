"""Slow and plain versions of the data order and of the draw, to hold the fast ones against."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from es_megatron.data.manifest import Component, Manifest


def make_manifest(sizes: Sequence[int], weights: Sequence[float] | None = None) -> Manifest:
    """Components c0, c1, ... of these sizes; by size where no weights are given."""
    shares = list(sizes) if weights is None else list(weights)
    pairs = enumerate(zip(sizes, shares, strict=True))
    return Manifest(tuple(Component(f"c{i}", f"data/c{i}", n, float(w), f"hash{i}") for i, (n, w) in pairs), 16)


def draws(weights: Sequence[int]) -> Iterator[int]:
    """Component of one draw after the other: every node of a halving tree counts what it has sent."""
    width = 1
    while width < len(weights):
        width *= 2
    padded = [*weights, *[0] * (width - len(weights))]
    seen: dict[tuple[int, int], int] = defaultdict(int)
    while True:
        low, high = 0, width
        while high - low > 1:
            middle = (low + high) // 2
            share = Fraction(sum(padded[low:middle]), sum(padded[low:high]))
            n = seen[low, high]
            seen[low, high] += 1
            low, high = (low, middle) if math.floor(share * (n + 1)) > math.floor(share * n) else (middle, high)
        yield low


class Draw(NamedTuple):
    """One position of a run."""

    component: int
    epoch: int
    index: int
    pruned: bool
    stands_for: Fraction


def epochs(
    sizes: Sequence[int],
    components: Iterator[int],
    meta_batch: int,
    ratio: float,
    evolving: Callable[[int], bool],
    first_epoch: int = 1,
) -> Iterator[Draw]:
    """Epochs by counting draws: one is pruned exactly if its first draw stands in an evolving iteration."""
    epoch, index = [-1] * len(sizes), [0] * len(sizes)
    length, pruned = [0] * len(sizes), [False] * len(sizes)
    for position, c in enumerate(components):
        if index[c] == length[c]:
            epoch[c], index[c] = epoch[c] + 1, 0
            pruned[c] = ratio > 0 and epoch[c] >= first_epoch and evolving(position // meta_batch)
            length[c] = math.ceil((1 - Fraction(str(ratio))) * sizes[c]) if pruned[c] else sizes[c]
        yield Draw(c, epoch[c], index[c], pruned[c], Fraction(sizes[c], length[c]))
        index[c] += 1


def draw_without_replacement(weights: Sequence[float], count: int, generator: np.random.Generator) -> list[int]:
    """The draw of Algorithm 1: one at a time, proportionally to the weights that are left."""
    left, chosen = list(range(len(weights))), list[int]()
    for _ in range(count):
        mark = generator.random() * sum(weights[i] for i in left)
        for i in left:
            mark -= weights[i]
            if mark < 0:
                break
        chosen.append(i)
        left.remove(i)
    return sorted(chosen)


def prune(weight: Any, uniform: Any, count: int) -> Any:
    """The race of a pruned epoch over a whole component in memory: bool[n], `count` of them true; ties by row."""
    kept = np.zeros(len(weight), np.bool_)
    kept[np.argsort(-np.log(uniform) / np.asarray(weight, np.float64), kind="stable")[:count]] = True
    return kept


def subset_probabilities(weights: Sequence[float], count: int) -> dict[tuple[int, ...], float]:
    """Probability of every subset under that draw, summed over the orders in which it can be drawn."""
    result: dict[tuple[int, ...], float] = defaultdict(float)
    for order in itertools.permutations(range(len(weights)), count):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        result[tuple(sorted(order))] += probability
    return dict(result)


def chi_square(observed: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's statistic."""
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
