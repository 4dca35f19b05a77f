"""Prepare the demo corpus and compare plain, ESWP and an equal-cost uniform choice in one table."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", default="runs/demo")


def run(arguments: argparse.Namespace) -> int:
    return 0
