"""The data order: where the samples of any position are, beside Megatron-Core's blend and shuffle indices."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.scale_measure import measured
from es_megatron.data.manifest import Component, Manifest
from es_megatron.data.mask import KeptMask
from es_megatron.data.sampler import Sampler
from es_megatron.data.schedule import Schedule

META_BATCH = 16_384
MANY = 1_000_000
PASSES = 3


def blend(components: int, samples: int) -> Manifest:
    """Components of very different sizes."""
    shares = np.random.default_rng(0).lognormal(0, 1.5, components)
    sizes = np.maximum(1, (shares / shares.sum() * samples).astype(np.int64)).tolist()
    return Manifest(tuple(Component(f"c{i}", f"c{i}", n, float(n), "0") for i, n in enumerate(sizes)), 4096)


def order(samples: int, components: int) -> dict[str, Any]:
    """Start, and draw meta-batches of 16,384 and of a million, before and after pruning."""
    with measured() as start:
        manifest = blend(components, samples)
        schedule = Schedule(manifest, META_BATCH, PASSES * manifest.total, anneal=0.05, pruning_ratio=0.2)
        sampler = Sampler(schedule, 1)
        sampler.batch(0)
    told: dict[str, Any] = {"samples": manifest.total, "components": components, "startup_s": start.cpu_seconds}
    told |= {f"plain_{name}": value for name, value in rates(sampler, 1).items()}
    middle = schedule.iterations // 2
    with measured() as masks:
        give_masks(sampler, middle)
    told["mask_bytes"] = sum(part.nbytes for mask in sampler.masks.values() for part in mask.arrays)
    told["bytes_per_sample"] = (start.extra_bytes + masks.extra_bytes) / manifest.total
    sampler.batch(middle)
    told |= {f"pruned_{name}": value for name, value in rates(sampler, middle + 1).items()}
    return told


def rates(sampler: Sampler, iteration: int) -> dict[str, float]:
    """Positions a second of a core, by the number asked for at a time."""
    rounds = 20
    with measured() as small:
        for number in range(iteration, iteration + rounds):
            sampler.batch(number)
    positions = np.arange(MANY, dtype=np.int64) + sampler.schedule.position(iteration)
    with measured() as large:
        sampler.rows(positions)
    scattered = np.random.default_rng(0).permutation(positions)
    with measured() as random:
        sampler.rows(scattered)
    return {
        "batch_positions_per_s": rounds * META_BATCH / small.cpu_seconds,
        "million_positions_per_s": MANY / large.cpu_seconds,
        "scattered_positions_per_s": MANY / random.cpu_seconds,
    }


def give_masks(sampler: Sampler, iteration: int) -> None:
    """Masks for the pruned epochs that the next two million positions stand in; random rows, 7 in 8 of them.

    That is a few more than the epochs draw, so the last ones stay unused.
    """
    schedule, random = sampler.schedule, np.random.default_rng(3)
    component, draw = schedule.blend.locate(np.arange(2 * MANY) + schedule.position(iteration))
    place = schedule.epochs.place(component, draw)
    for code in np.unique((component << 35 | place.epoch)[place.pruned]).tolist():
        number, epoch = code >> 35, code & (1 << 35) - 1
        size, kept = int(sampler.manifest.sizes[number]), int(schedule.epochs.kept[number])
        draws = (np.frombuffer(random.bytes(-(-size // 8)), np.uint8) for _ in range(3))
        packed = np.bitwise_or.reduce(list(draws))
        if int(np.bitwise_count(packed).sum(dtype=np.int64)) < kept + 8:
            packed[:] = 255
        if size % 8:
            packed[-1] &= (1 << size % 8) - 1
        mask = KeptMask(packed, size)
        assert mask.count >= kept
        mask.count = kept
        sampler.masks[number, epoch] = mask


def megatron(samples: int, components: int) -> dict[str, Any]:
    """Megatron-Core's way: an index of the blend and a shuffled index, built for every sample before the first.

    Rows are then looked up in them; upstream does so sample by sample, here all at once.
    """
    from megatron.core.datasets import helpers_cpp  # pyright: ignore[reportAttributeAccessIssue] - compiled on first use

    weights = np.asarray([component.weight for component in blend(components, 3_700_000_000).components])
    weights = weights / weights.sum()
    which, row = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    with measured() as build:
        helpers_cpp.build_blending_indices(which, row, weights, components, samples, False)
    with measured() as shuffle:
        shuffled = np.arange(samples, dtype=np.uint32)
        np.random.RandomState(0).shuffle(shuffled)
    positions = np.arange(min(MANY, samples))
    with measured() as look:
        found = which[positions], shuffled[row[positions]]
    assert len(found[0]) == len(positions)
    return {
        "samples": samples,
        "components": components,
        "build_ns_per_sample": 1e9 * build.cpu_seconds / samples,
        "shuffle_ns_per_sample": 1e9 * shuffle.cpu_seconds / samples,
        "bytes_per_sample": (which.nbytes + row.nbytes + shuffled.nbytes) / samples,
        "lookups_per_s": len(positions) / look.cpu_seconds,
        "startup_s": build.cpu_seconds + shuffle.cpu_seconds,
    }
