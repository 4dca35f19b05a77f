"""Run a script of Megatron-LM, unchanged, with Evolved Sampling (`python -m es_megatron.run`, for one process)."""

from __future__ import annotations

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("script", help="such as CHECKOUT/pretrain_gpt.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script, and --es-...")


def run(arguments: argparse.Namespace) -> int:
    """Become `python -m es_megatron.run`; does not return.

    Under torchrun start that directly (`torchrun ... -m es_megatron.run SCRIPT.py ...`), or this with `--no-python`.
    """
    command = [sys.executable, "-m", "es_megatron.run", arguments.script, *arguments.flags]
    sys.stdout.flush()
    os.execv(sys.executable, command)
