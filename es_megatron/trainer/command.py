"""Pretrain a GPT with Evolved Sampling on a prepared blend, under torchrun or alone."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--config", required=True, help="YAML file of settings, such as configs/demo.yaml")
    parser.add_argument("--backend", choices=("megatron", "deepspeed"), help="short for backend=NAME")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def run_pretrain(arguments: argparse.Namespace) -> int:
    """Train to the end; returns 0."""
    from es_megatron.testing import cpu

    cpu.install()
    from es_megatron.trainer.loop import pretrain
    from es_megatron.trainer.settings import load_settings

    overrides = [*arguments.overrides, *([f"backend={arguments.backend}"] if arguments.backend else [])]
    pretrain(load_settings(arguments.config, overrides))
    return 0
