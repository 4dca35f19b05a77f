"""Pretrain a GPT with Evolved Sampling on a prepared blend, under torchrun or alone."""

from __future__ import annotations

import argparse

STOPPED = 3
"""Exit code of a run that was asked to end before its end, and has saved."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--config", required=True, help="YAML file of settings, such as configs/small.yaml")
    parser.add_argument("--backend", choices=("megatron", "deepspeed"), help="short for backend=NAME")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--print-config", action="store_true", help="print every setting and its source, and end")


def run_pretrain(arguments: argparse.Namespace) -> int:
    """Train; returns 0 if the run is finished, `STOPPED` if it was asked to end before."""
    overrides = [*arguments.overrides, *([f"backend={arguments.backend}"] if arguments.backend else [])]
    if arguments.print_config:
        from es_megatron.trainer.effective import effective

        print(effective(arguments.config, overrides), end="")
        return 0
    from es_megatron.trainer.settings import load_settings

    settings = load_settings(arguments.config, overrides)  # before the seconds that megatron takes
    from es_megatron.testing import cpu

    cpu.install()
    from es_megatron.trainer.alarm import ending_soon
    from es_megatron.trainer.loop import pretrain

    with ending_soon():
        return 0 if pretrain(settings)["finished"] else STOPPED
