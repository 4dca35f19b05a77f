"""Take Evolved Sampling out of a patched config again, byte for byte."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from es_megatron.config_files.reading import KINDS, kind_of, read_text
from es_megatron.config_patch.command import diff_of, write
from es_megatron.config_patch.writing import unpatch
from es_megatron.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", type=Path, help="a config that `es-megatron patch` wrote")
    parser.add_argument("--output", type=Path, help="where the restored file goes; default: CONFIG itself")
    parser.add_argument("--diff", action="store_true", help="print a unified diff instead of writing")
    parser.add_argument("--kind", choices=sorted(KINDS), help="what CONFIG is, if its name does not tell")


def run_unpatch(arguments: argparse.Namespace) -> int:
    """Restore the file; returns 0."""
    text = read_text(arguments.config)
    try:
        restored, same = unpatch(arguments.kind or kind_of(arguments.config, text), text)
    except ConfigError as error:
        raise ConfigError(f"{arguments.config.name}: {error}") from error
    if arguments.diff:
        sys.stdout.write(diff_of(arguments.config.name, text, restored))
        return 0
    target = arguments.output or arguments.config
    write(target, restored, like=arguments.config)
    told = "" if same else "; it was edited after it was patched, and keeps those edits"
    print(f"restored: {target}{told}")
    return 0
