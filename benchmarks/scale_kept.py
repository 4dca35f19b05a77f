"""How often each sample is kept over ten epochs: raw scores, debiased ones, and with a floor.

Losses fall from epoch to epoch, differ between samples and carry noise; nothing is trained. What is counted is the cold
start: a sample that is not seen keeps an old score, and with raw scores a low one.

    python -m benchmarks.scale_kept
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from benchmarks.scale_prune import config, one_component
from es_megatron.core.epoch_pruning import EpochPruning
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore

EPOCHS = 10
VARIANTS: dict[str, dict[str, Any]] = {
    "raw": {"scores": {"correction": "paper"}},
    "debiased": {"scores": {"correction": "debiased"}},
    "raw, floor 0.5": {"scores": {"correction": "paper"}, "selection": {"weight_floor": 0.5}},
    "debiased, floor 0.5": {"scores": {"correction": "debiased"}, "selection": {"weight_floor": 0.5}},
}


def kept_frequency(samples: int, variant: str, seed: int = 0) -> dict[str, Any]:
    """Run ten epochs of one component, of which the last nine are pruned.

    Returns:
        Pruned epochs that keep a sample: mean, share of samples by count, share never kept, and how selective that is
        (mean true loss of the kept over that of all).
    """
    random = np.random.default_rng(seed)
    store = ScoreStore(one_component(samples), config(seed=seed, **VARIANTS[variant]), RankGrid.alone())
    difficulty = random.lognormal(0, 0.25, samples)
    kept = np.zeros(samples, np.int64)
    selective: list[float] = []
    for epoch in range(EPOCHS):
        true = difficulty * (2.0 + 2.0 / (1 + epoch))
        rows = np.arange(samples)
        if epoch:
            mask = EpochPruning(store).prune(0, epoch).to_bool()
            kept += mask
            rows = np.flatnonzero(mask)
            selective.append(float(true[rows].mean() / true.mean()))
        loss = (true[rows] * random.lognormal(0, 0.1, len(rows))).astype(np.float32)
        found = store.lookup(rows)
        store.evolve(epoch, rows, found, loss)
        store.commit(epoch)
    return {
        "variant": variant,
        "samples": samples,
        "mean_kept": float(kept.mean()),
        "never_kept": float((kept == 0).mean()),
        "kept_at_most_3": float((kept <= 3).mean()),
        "always_kept": float((kept == EPOCHS - 1).mean()),
        "selectivity": float(np.mean(selective)),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{rows[0]['samples']} samples, r = 0.2, {EPOCHS} epochs, of which {EPOCHS - 1} are pruned")
    print(f"{'scores':22}{'kept on average':>16}{'never':>9}{'3 or fewer':>12}{'always':>9}{'loss of the kept':>18}")
    for row in rows:
        print(
            f"{row['variant']:22}{row['mean_kept']:>13.2f} /{EPOCHS - 1}{row['never_kept']:>9.3%}"
            f"{row['kept_at_most_3']:>12.2%}{row['always_kept']:>9.2%}{row['selectivity']:>18.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [kept_frequency(arguments.samples, variant) for variant in VARIANTS]
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
