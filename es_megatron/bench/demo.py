"""Prepare the demo corpus, train plain, ESWP and an equal-cost uniform choice, and print one table.

Everything comes from the package registry and the interpreter itself, everything runs on this machine's CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from es_megatron.errors import EsError
from es_megatron.resources import resource

PREPARE = ("--demo", "--vocab-size", "2000", "--max-megabytes", "0.7", "--validation-share", "0.1")
ARMS: Mapping[str, tuple[str, ...]] = {
    "plain": ("evolved_sampling.arm=plain", "evolved_sampling.pruning.ratio=0"),
    "eswp": (),
    "uniform": ("evolved_sampling.arm=uniform",),
}
TITLES = {"plain": "plain", "eswp": "ESWP (paper)", "uniform": "uniform, cost of ESWP"}
TIE = 0.01
"""Nats that a single seed cannot tell apart; seeds of this run differ by more than this."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--directory", type=Path, default=Path("runs/demo"), help="where data, runs and summary go")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks on this machine")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings for all three runs, over configs/demo.yaml"
    )


def run_demo(arguments: argparse.Namespace) -> int:
    """Prepare what is not there yet, train the three arms anew, print the table; returns 0."""
    directory: Path = arguments.directory
    began = time.perf_counter()
    if not (directory / "data" / "blend.yaml").exists():
        call([sys.executable, "-m", "es_megatron.cli", "prepare", *PREPARE, "--output", str(directory / "data")])
    summaries: dict[str, dict[str, Any]] = {}
    for arm, changes in ARMS.items():
        # the last arm may spend what the one before it has spent
        budget = summaries["eswp"]["cost"] / summaries["plain"]["cost"] if "eswp" in summaries else None
        more = () if budget is None else (f"evolved_sampling.selection.budget={budget}",)
        summaries[arm] = train(arm, (*changes, *more), arguments)
    document: dict[str, Any] = {
        "prepared_with": " ".join(["es-megatron prepare", *PREPARE]),
        "arms": summaries,
        "savings": {arm: savings(summaries[arm], summaries["plain"]) for arm in ARMS},
        "verdict": verdict(summaries),
        "seconds": time.perf_counter() - began,
        "device": "cpu",
    }
    partial = directory / "summary.partial"
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(directory / "summary.json")
    print("\n" + table(summaries) + "\n\n" + document["verdict"])
    print(f"\n{document['seconds']:.0f} s in all; {directory / 'summary.json'} has every number.")
    return 0


def train(arm: str, changes: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one arm under torchrun and read its summary."""
    directory: Path = arguments.directory
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(arguments.ranks), "-m", "es_megatron.cli", "pretrain"]
    command += ["--config", str(resource("configs") / "demo.yaml")]
    command += [
        f"data.blend={directory / 'data' / 'blend.yaml'}",
        f"run.directory={directory / arm}",
        "run.resume=false",
    ]
    print(f"\n== {TITLES[arm]}", flush=True)
    call([*command, *changes, *arguments.overrides])
    return json.loads((directory / arm / "summary.json").read_text(encoding="utf-8"))


def call(command: list[str]) -> None:
    """Run a command with its output shown.

    Raises:
        EsError: it failed.
    """
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False)
    if done.returncode != 0:
        raise EsError(f"`{' '.join(command)}` ended with exit code {done.returncode}. What it printed above says why.")


def seconds(summary: Mapping[str, Any]) -> float:
    """Wall-clock of all training iterations of a run."""
    return float(summary["seconds"]["step"])


def savings(summary: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, float]:
    """Measured saving of wall-clock against the plain run, and its limits."""
    return {
        "measured": 1 - seconds(summary) / seconds(plain),
        "calibrated_limit": summary["calibrated_saving"],
        "nominal_limit": summary["nominal_saving"],
    }


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison, one row per arm."""
    plain = summaries["plain"]
    domains = [name for name in plain["validation"] if name not in ("iteration", "mean")]
    head = ["arm", "iterations", "backward share", "seconds", "saved", "limit (calibrated / nominal)"]
    rows = [[*head, *(f"loss {name}" for name in domains), "mean loss"]]
    for arm, summary in summaries.items():
        saved = savings(summary, plain)
        rows.append(
            [
                TITLES[arm],
                str(summary["iterations"]),
                f"{summary['tokens_trained'] / plain['tokens_trained']:.1%}",
                f"{seconds(summary):.1f}",
                f"{saved['measured']:.1%}",
                f"{saved['calibrated_limit']:.1%} / {saved['nominal_limit']:.1%}",
                *(f"{summary['validation'][name]:.4f}" for name in domains),
                f"{summary['validation']['mean']:.4f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def verdict(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """What the table shows, also where ES loses. One seed: differences below `TIE` are not told apart."""
    loss = {arm: float(summary["validation"]["mean"]) for arm, summary in summaries.items()}
    saved = savings(summaries["eswp"], summaries["plain"])["measured"]
    behind = loss["eswp"] - loss["plain"]
    against = loss["eswp"] - loss["uniform"]
    told = (
        f"ESWP {'saved' if saved > 0 else 'cost'} {abs(saved):.1%} of the wall-clock and ends {abs(behind):.3f} nats "
        f"{'behind' if behind > 0 else 'ahead of'} the plain run."
    )
    if abs(against) < TIE:
        return f"{told} At equal cost it ties with a uniform choice ({against:+.3f} nats). One seed."
    word = "WINS over" if against < 0 else "LOSES to"
    return f"{told} At equal cost it {word} a uniform choice by {abs(against):.3f} nats. One seed."
