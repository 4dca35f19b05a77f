"""The part of `benchmarks.step` that holds merged scoring against score-then-train, and both against the simulation.

Iterations of the arms are interleaved, so that a slow spell of the machine falls on all of them. A repeat is the median
of ten of each, so that a slow spell decides nothing. All iterations select; what the passes take is compared with
`es_megatron.core.simulation` over the forward and backward that were timed in between.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.plan import Layout

NAMES = ("plain", "history", "score-then-train", "merged")
SELECTS = NAMES[1:]
PER_REPEAT = 10
"""Iterations of each arm in one repeat."""


def fresh_arms(keep_ratio: float) -> dict[str, EvolvedSamplingConfig]:
    """The arms that take turns, all with one b/B."""
    selection = {"anneal": 0.0, "keep_ratio": keep_ratio}
    changes: dict[str, dict[str, Any]] = {
        "plain": {"arm": "plain"},
        "history": {"scorer": {"kind": "history"}},
        "score-then-train": {},
        "merged": {"scorer": {"overlap": "merged"}},
    }
    return {
        name: EvolvedSamplingConfig.from_mapping({"preset": "paper", "selection": selection, **changes[name]})
        for name in NAMES
    }


def conclude_fresh(bench: Any, seconds: dict[str, list[dict[str, float]]], layouts: list[Layout]) -> dict[str, Any]:
    """Step times and savings of each arm, measured and simulated; times in ms.

    Args:
        bench: of the run.
        seconds: parts of each iteration of each arm.
        layouts: calibrations between them.
    """
    fields = ("forward", "backward", "scoring_forward")
    middle = {name: statistics.median(getattr(layout, name) for layout in layouts) for name in fields}
    layout = dataclasses.replace(layouts[0], **middle)
    plan = bench.plan("merged")
    share = plan.kept / plan.meta_batch
    simulated = {
        "plain": layout.whole(),
        "history": layout.training(share),
        "score-then-train": layout.scoring() + layout.training(share),
        "merged": layout.merged(share),
    }
    # the first and the last iteration of a merged run score twice and never
    there = min(map(len, seconds.values())) - 2
    size = min(PER_REPEAT, there)
    repeats = there // size
    last = 1 + repeats * size
    steps = {
        name: np.median(np.reshape([each["step"] for each in parts[1:last]], (repeats, size)), axis=1)
        for name, parts in seconds.items()
    }
    passes = {name: [each["score"] + each["train"] for each in parts[1:last]] for name, parts in seconds.items()}
    result: dict[str, Any] = {
        "micro_batches": layout.micro_batches,
        "keep_ratio": share,
        "backward_over_forward": layout.backward / layout.forward,
        "repeats": repeats,
        "merged_saves_more_in": int((steps["merged"] < steps["score-then-train"]).sum()),
        "after": layout.merged_order(share).after,
        "arms": {},
    }
    for name in NAMES:
        median = statistics.median(passes[name])
        saved = 1 - steps[name] / steps["plain"]
        low, middle_saved, high = np.quantile(saved, (0.25, 0.5, 0.75)).tolist()
        predicted = 1 - simulated[name] / simulated["plain"]
        result["arms"][name] = {
            "passes_ms": 1e3 * median,
            "simulated_ms": 1e3 * simulated[name],
            "error": simulated[name] / median - 1,
            "step_ms": 1e3 * float(np.median(steps[name])),
            "saving": middle_saved,
            "saving_quartiles": [low, high],
            "predicted_saving": predicted,
            "ratio": middle_saved / predicted if predicted else None,
        }
    return result


def print_fresh(measured: dict[str, dict[str, Any]], device: str) -> None:
    """One row per layout and arm."""
    share = next(iter(measured.values()))["keep_ratio"]
    print(f"b/B = {share:g}, measured on {device}; times are medians of repeats, savings medians with quartiles")
    print("layout        m  arm               passes ms  simulated  error   saved (25 to 75%)         predicted  ratio")
    for layout, result in measured.items():
        for name in NAMES:
            row = result["arms"][name]
            head = f"{layout.partition(',')[0]:12} {result['micro_batches']:2}  {name:16} {row['passes_ms']:10.1f}"
            line = f"{head} {row['simulated_ms']:10.1f} {row['error']:+7.1%}"
            if name in SELECTS:
                low, high = row["saving_quartiles"]
                line += f"  {row['saving']:6.1%} ({low:.1%} to {high:.1%})".ljust(28)
                line += f"{row['predicted_saving']:8.1%} {row['ratio']:6.2f}"
            print(line)
        told = f"merged saves more in {result['merged_saves_more_in']} of {result['repeats']} repeats"
        print(f"  {told}; x = {result['after']}, backward = {result['backward_over_forward']:.2f} forward")
