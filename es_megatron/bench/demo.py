"""Is it worth it, in some minutes: plain, uniform and the default, on clean, damaged and repeated text."""

from __future__ import annotations

import argparse
from pathlib import Path

from es_megatron.bench.command import compare_spec
from es_megatron.bench.spec import SHIPPED
from es_megatron.resources import resource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--directory", type=Path, default=Path("runs/demo"), help="of data and results (%(default)s)")
    parser.add_argument("--jobs", type=int, help="runs at a time, one core each; over the spec's")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="paired seeds, over the spec's")


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the shipped comparison, or what is left of it; returns 1 if a run has failed."""
    return int(compare_spec(resource("configs") / SHIPPED, arguments))
