"""What a step costs: plain, ES and ESWP side by side in one run, against the limit that this model's passes set.

    python -m benchmarks.step [--json] [--micro-batches 16] [--pipeline 1 2] [--backend deepspeed]
    python -m benchmarks.step --scorer fresh --pipeline 2 --micro-batches 4 8 16    # merged scoring, and the simulation

The three arms train the same model in turn, one iteration each, so that whatever else the machine does falls on all of
them. Each arm runs its whole planned length. Forward and backward alone are timed in between, for the calibrated limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.step_fresh import conclude_fresh, fresh_arms, print_fresh
from benchmarks.step_sizes import MICRO_BATCH, VOCAB
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.data.manifest import Component, Manifest
from es_megatron.testing import cpu

ARMS = {
    "plain": EvolvedSamplingConfig.from_mapping({"preset": "paper", "arm": "plain"}),
    "es": EvolvedSamplingConfig.from_mapping({"preset": "paper"}),
    "eswp": EvolvedSamplingConfig.from_mapping({"preset": "paper", "pruning": {"ratio": 0.2}}),
}
PASSES = 3


class RandomRows:
    """Samples of random tokens, a pure function of the id."""

    def __init__(self, seq_length: int, samples: int) -> None:
        """Remember the sizes."""
        self.seq_length, self.samples = seq_length, samples

    def __len__(self) -> int:
        """Number of samples."""
        return self.samples

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        """Make one sample."""
        tokens = torch.from_numpy(np.random.default_rng(sample_id).integers(0, VOCAB, self.seq_length + 1))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


def main() -> None:
    """Start one worker per layout, and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[16], help="micro-batches of a plain iteration")
    parser.add_argument(
        "--scorer", choices=("paper", "fresh"), default="paper", help="fresh: score-then-train beside merged scoring"
    )
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="b/B, with --scorer fresh (0.25)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few iterations, to see that it runs")
    parser.add_argument("--iterations", type=int, default=24, help="iterations of the plain run, at three passes")
    parser.add_argument("--pipeline", type=int, nargs="+", default=[1, 2], help="pipeline sizes to measure")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--backend", choices=("megatron", "deepspeed"), default="megatron")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.iterations, arguments.hidden_size, arguments.seq_length = 6, 32, 32
    counts: list[int] = arguments.micro_batches
    if arguments.worker:
        arguments.micro_batches = counts[0]
        work(arguments)
        return
    measured: dict[str, dict[str, Any]] = {}
    for size in arguments.pipeline:
        for count in counts:
            arguments.micro_batches = count
            measured[f"pipeline_{size}" + (f", m = {count}" if len(counts) > 1 else "")] = launch(arguments, size)
    if arguments.json:
        print(json.dumps({"micro_batches": counts, "device": device(), **measured}, indent=2))
    elif arguments.scorer == "fresh":
        print_fresh(measured, device())
    else:
        print_table(counts, measured)


def device() -> str:
    """What the numbers were measured on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def launch(arguments: argparse.Namespace, pipeline: int) -> dict[str, Any]:
    """Run the workers of one layout and read their result."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(pipeline)]
        command += ["-m", "benchmarks.step", "--worker", str(result), "--pipeline", str(pipeline)]
        for name in ("micro_batches", "iterations", "hidden_size", "seq_length", "backend", "scorer", "keep_ratio"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"benchmark of pipeline {pipeline} failed:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())


def work(arguments: argparse.Namespace) -> None:
    """One rank: run the arms in turn and, on rank 0, write what was measured."""
    cpu.install()
    if arguments.backend == "deepspeed":
        from benchmarks.step_deepspeed import DeepSpeedBench as Bench
    else:
        from benchmarks.step_megatron import MegatronBench as Bench

    blend = manifest(arguments)
    arms = fresh_arms(arguments.keep_ratio) if arguments.scorer == "fresh" else ARMS
    bench: Any = Bench(arguments, arms, blend, RandomRows(arguments.seq_length, blend.total))
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    layouts = [bench.calibrate()]
    for name in arms:
        bench.warm_up(name)
    turn = 0
    while any(not bench.done(name) for name in arms):
        for name in arms:
            if not bench.done(name):
                begin = time.perf_counter()
                parts = bench.step(name)
                seconds[name].append({**parts, "step": time.perf_counter() - begin})
        turn += 1
        if turn % 6 == 0:
            layouts.append(bench.calibrate())
    if bench.rank == 0:
        judge = conclude_fresh if arguments.scorer == "fresh" else conclude
        arguments.worker.write_text(json.dumps(judge(bench, seconds, layouts)))
    bench.close()


def manifest(arguments: argparse.Namespace) -> Manifest:
    """Two components of one pass together a third of the plain run."""
    samples = arguments.iterations * arguments.micro_batches * MICRO_BATCH // PASSES
    small = samples // 4
    return Manifest(
        (
            Component("small", "", small, float(small), "synthetic"),
            Component("large", "", samples - small, float(samples - small), "synthetic"),
        ),
        arguments.seq_length,
    )


def conclude(bench: Any, seconds: dict[str, list[dict[str, float]]], layouts: list[Any]) -> dict[str, Any]:
    """Savings of whole runs, measured and predicted."""
    from es_megatron.core.plan import nominal, predict

    fields = ("forward", "backward", "scoring_forward")
    middle = {name: statistics.median(getattr(layout, name) for layout in layouts) for name in fields}
    layout = dataclasses.replace(layouts[0], **middle)
    total = {name: sum(step["step"] for step in steps) for name, steps in seconds.items()}
    result: dict[str, Any] = {
        "backward_over_forward": layout.backward / layout.forward,
        "plain_step_ms": 1e3 * total["plain"] / len(seconds["plain"]),
    }
    for name in ("es", "eswp"):
        plan = bench.plan(name)
        measured = 1 - total[name] / total["plain"]
        limit = predict(plan, layout).saving
        inside = sum(step["score"] + step["train"] for step in seconds[name])
        own = sum(step["order"] + step["exchange"] for step in seconds[name])
        result[name] = {
            "iterations": plan.schedule.iterations,
            "plain_iterations": plan.plain_iterations,
            "measured_saving": measured,
            "model_limit_saving": limit,
            "nominal_limit_saving": predict(plan, nominal(layout)).saving,
            "ratio": measured / limit,
            "outside_passes_share": own / total[name],
            "optimizer_and_rest_share": 1 - (inside + own) / total[name],
        }
    return result


def print_table(micro_batches: list[int], measured: dict[str, dict[str, Any]]) -> None:
    """One row per layout and arm."""
    print(
        f"{', '.join(map(str, micro_batches))} micro-batches of {MICRO_BATCH}, {PASSES} passes, measured on {device()}"
    )
    print("layout       arm   measured  calibrated limit  nominal limit  ratio  ES outside passes  backward:forward")
    for layout, result in measured.items():
        for arm in ("es", "eswp"):
            row = result[arm]
            print(
                f"{layout:12} {arm:5} {row['measured_saving']:7.1%} {row['model_limit_saving']:17.1%} "
                f"{row['nominal_limit_saving']:14.1%} {row['ratio']:6.2f} {row['outside_passes_share']:18.2%} "
                f"{result['backward_over_forward']:17.2f}"
            )


if __name__ == "__main__":
    main()
