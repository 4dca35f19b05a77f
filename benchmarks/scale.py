"""Scores, pruning and data order at the size of a real pretraining run, each beside a peer measured in the same run.

    python -m benchmarks.scale              table
    python -m benchmarks.scale --json       the same and every number behind it, as JSON
    python -m benchmarks.scale --quick      a tenth or less of every size, in a minute or two

Every measurement runs in a process of its own, so that none is told the memory of another. Rates "a core" are of
processor time; steps, saves and loads of several ranks are of the clock. 10^9 samples need 7 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import scale_order, scale_prune, scale_ranks
from benchmarks.scale_measure import resident

REAL_RUN = 3_700_000_000
"""Samples of 15 T tokens at sequence length 4,096."""
REAL_RANKS = 128

FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "prune": scale_prune.prune,
    "argpartition": scale_prune.argpartition,
    "choice": scale_prune.choice,
    "share": scale_prune.share,
    "order": scale_order.order,
    "megatron": scale_order.megatron,
    "evolve": scale_ranks.evolve,
    "checkpoint": scale_ranks.checkpoint,
}


class Part(NamedTuple):
    """One measurement."""

    name: str
    function: str
    arguments: tuple[Any, ...]


def parts(folder: str, *, quick: bool) -> list[Part]:
    """What is measured, in order."""
    large, huge, real, few = (10**7, 10**8, REAL_RUN // 10, 10**6) if quick else (10**8, 10**9, REAL_RUN, 10**7)
    sizes = {10: few, 100: few, 1000: few // 5}
    return [
        Part("prune_large", "prune", (large,)),
        Part("argpartition", "argpartition", (large,)),
        Part("prune_choice_size", "prune", (few,)),
        Part("choice", "choice", (few,)),
        Part("prune_huge", "prune", (huge,)),
        *(Part(f"order_{count}", "order", (real, count)) for count in sizes),
        *(Part(f"megatron_{count}", "megatron", (size, count)) for count, size in sizes.items()),
        Part("evolve_2", "evolve", (huge, 2)),
        Part("evolve_4", "evolve", (huge, 4)),
        Part("checkpoint", "checkpoint", (large, folder)),
        Part("share", "share", (real, REAL_RANKS)),
    ]


def run_parts(wanted: list[Part]) -> dict[str, dict[str, Any]]:
    """Run each in a process of its own; one that fails is told and left out."""
    found: dict[str, dict[str, Any]] = {}
    for part in wanted:
        began = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.scale", "--part", json.dumps(part)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            print(f"{part.name} failed with exit code {done.returncode}", file=sys.stderr)
            continue
        found[part.name] = {**json.loads(done.stdout.splitlines()[-1]), "whole_seconds": seconds}
        print(f"{part.name}: {seconds:.1f} s", file=sys.stderr)
    return found


def headline(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The numbers that aims are set for; null where the measurement failed."""

    def get(part: str, name: str) -> float | None:
        return found.get(part, {}).get(name)

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or below is None else above / below

    ours, theirs = found.get("order_1000"), found.get("megatron_1000")
    order_ns = None if ours is None else 1e9 / ours["plain_million_positions_per_s"]
    theirs_ns = None if theirs is None else theirs["build_ns_per_sample"] + theirs["shuffle_ns_per_sample"]
    rates = [value for name, value in (ours or {}).items() if name.endswith("positions_per_s")]
    return {
        "prune_ns_per_sample": get("prune_huge", "ns_per_sample"),
        "prune_extra_bytes_per_sample": get("prune_huge", "extra_bytes_per_sample"),
        "prune_vs_argpartition": ratio(get("argpartition", "ns_per_sample"), get("prune_large", "ns_per_sample")),
        "prune_vs_choice": ratio(get("choice", "ns_per_sample"), get("prune_choice_size", "ns_per_sample")),
        "order_positions_per_s": min(rates, default=None),
        "order_startup_s": get("order_1000", "startup_s"),
        "order_bytes_per_sample": get("order_1000", "bytes_per_sample"),
        "order_vs_megatron": ratio(theirs_ns, order_ns),
        "evolve_ms": max((v for p in ("evolve_2", "evolve_4") if (v := get(p, "step_ms")) is not None), default=None),
        "save_s": get("checkpoint", "save_s"),
        "load_s": get("checkpoint", "load_s"),
        "reshard_s": get("checkpoint", "reshard_2_to_3_s"),
        "peak_rss_gb": max((part["peak_rss_gb"] for part in found.values()), default=None),
    }


def table(found: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """What, value, peer, and how it was come by: measured, or extrapolated from what."""
    rows: list[tuple[str, str, str, str]] = []

    def add(part: str, make: Callable[[dict[str, Any]], tuple[str, str, str, str]]) -> None:
        if part in found:
            rows.append(make(found[part]))

    peer = found.get("argpartition", {})
    drawn = found.get("choice", {})
    add(
        "prune_large",
        lambda p: (f"prune {p['samples']:.3g} samples", _prune(p), f"argpartition {_prune(peer)}", "measured"),
    )
    add(
        "prune_choice_size",
        lambda p: (f"prune {p['samples']:.3g} samples", _prune(p), f"Generator.choice {_prune(drawn)}", "measured"),
    )
    add(
        "prune_huge",
        lambda p: (
            f"prune {p['samples']:.3g} samples",
            _prune(p),
            f"keys and places alone: {p['samples'] * 16 / 1e9:.3g} GB",
            "measured",
        ),
    )
    for count in (10, 100, 1000):
        theirs = found.get(f"megatron_{count}", {})
        add(
            f"order_{count}",
            lambda p, t=theirs, c=count: (
                f"order, {c} components: start",
                f"{p['startup_s']:.3f} s",
                _start(t, p),
                "measured; peer extrapolated",
            ),
        )
        add(
            f"order_{count}",
            lambda p, t=theirs, c=count: (
                f"order, {c} components: positions/s",
                _rates(p),
                f"lookups {t.get('lookups_per_s', 0) / 1e6:.0f} M (once built)",
                "measured",
            ),
        )
        add(
            f"order_{count}",
            lambda p, t=theirs, c=count: (
                f"order, {c} components: bytes/sample",
                f"{p['bytes_per_sample']:.3f}",
                f"{t.get('bytes_per_sample', 0):.0f}",
                "measured",
            ),
        )
    for ranks in (2, 4):
        add(
            f"evolve_{ranks}",
            lambda p: (
                f"evolve 16,384 of {p['samples']:.3g}, {p['ranks']} ranks",
                f"{p['step_ms']:.2f} ms (debiased {p['debiased_step_ms']:.2f})",
                f"losses alone {p['losses_alone_ms']:.2f}, with lookup {p['exchange_ms']:.2f} ms",
                "measured",
            ),
        )
    add(
        "checkpoint",
        lambda p: (
            f"save {p['samples']:.3g} on 2 ranks",
            f"{p['save_s']:.2f} s, {p['bytes'] / 1e6:.0f} MB",
            f"numpy.save {p['numpy_save_s']:.2f} s; in the background ours waits {p['snapshot_s']:.2f} s",
            "measured",
        ),
    )
    add(
        "checkpoint",
        lambda p: (
            "load on 2; 2 -> 1; 2 -> 3 ranks",
            f"{p['load_s']:.2f}; {p['reshard_2_to_1_s']:.2f}; {p['reshard_2_to_3_s']:.2f} s",
            f"numpy.load on 2 {p['numpy_load_s']:.2f} s",
            "measured",
        ),
    )
    add(
        "share",
        lambda p: (
            f"{p['samples']:.3g} samples over {p['ranks']}: a rank's scores",
            f"{p['store_bytes'] / 1e6:.0f} MB",
            "",
            "measured (one rank)",
        ),
    )
    add(
        "share",
        lambda p: (
            "  prune, its part",
            f"{p['prune_seconds']:.2f} s, {p['prune_ns_per_sample_of_rank']:.1f} ns/sample",
            "",
            "measured, without the network",
        ),
    )
    add("share", lambda p: ("  kept mask", f"{p['mask_bytes'] / 1e6:.0f} MB a node", "", "measured"))
    add(
        "share",
        lambda p: (
            "  prune, whole cluster",
            f"{p['prune_seconds'] + 2 * p['mask_bytes'] / 1.25e9:.2f} s",
            "",
            "extrapolated: its part + mask all-reduced at 10 Gbit/s",
        ),
    )
    add(
        "prune_huge",
        lambda p: (
            f"  prune {REAL_RUN:.3g} on one core",
            f"{p['ns_per_sample'] * REAL_RUN / 1e9:.0f} s",
            "",
            f"extrapolated from {p['samples']:.3g}",
        ),
    )
    return rows


def _prune(part: dict[str, Any]) -> str:
    return f"{part['ns_per_sample']:.1f} ns, {part['extra_bytes_per_sample']:.2f} B/sample" if part else "-"


def _rates(part: dict[str, Any]) -> str:
    kinds = [
        part[f"{phase}_{ask}_positions_per_s"] / 1e6 for phase in ("plain", "pruned") for ask in ("batch", "million")
    ]
    return "{:.1f} / {:.1f} M, pruned {:.1f} / {:.1f} M".format(*kinds)


def _start(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    if not theirs:
        return "-"
    ns = theirs["build_ns_per_sample"] + theirs["shuffle_ns_per_sample"]
    return f"{ns * ours['samples'] / 1e9:.0f} s ({ns:.0f} ns/sample at {theirs['samples']:.3g})"


def print_table(found: dict[str, dict[str, Any]], told: dict[str, Any]) -> None:
    rows = [("what", "here", "peer", "how"), *table(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("positions/s: meta-batches of 16,384 / a million at a time, of one core")
    print(", ".join(f"{name} {value:.4g}" for name, value in told.items() if value is not None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="a tenth or less of every size")
    parser.add_argument("--only", help="parts whose name begins with this")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where checkpoints are written")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part = Part(*json.loads(arguments.part))
        told = FUNCTIONS[part.function](*part.arguments)
        peak = told.pop("rss_gb", None) or resident("VmHWM") / 1e9
        print(json.dumps({**told, "peak_rss_gb": peak}))
        return
    began = time.perf_counter()
    wanted = [
        part for part in parts(arguments.folder, quick=arguments.quick) if part.name.startswith(arguments.only or "")
    ]
    found = run_parts(wanted)
    told = {**headline(found), "seconds": time.perf_counter() - began}
    if arguments.json:
        print(json.dumps({**told, "quick": arguments.quick, "parts": found, "table": table(found)}, indent=1))
    else:
        print_table(found, told)


if __name__ == "__main__":
    main()
