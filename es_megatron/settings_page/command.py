"""Say what settings there are, with types, units, limits and defaults; or give a JSON schema of them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from es_megatron.errors import ConfigError

if TYPE_CHECKING:
    from es_megatron.settings_page.entries import Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, such as training.lr or keep_ratio")
    parser.add_argument("--schema", action="store_true", help="print a JSON schema of a run's YAML, for editors")


def run_settings(arguments: argparse.Namespace) -> int:
    """Print the page, some entries of it, or the schema; returns 0.

    Raises:
        ConfigError: a name that no setting has.
    """
    from es_megatron.settings_page.page import entry_lines, page
    from es_megatron.settings_page.schema import schema

    if arguments.schema:
        print(json.dumps(schema(), indent=2))
    elif arguments.names:
        print("\n\n".join("\n".join(entry_lines(entry)) for name in arguments.names for entry in find(name)))
    else:
        print(page(), end="")
    return 0


def find(name: str) -> list[Entry]:
    """Settings whose name is `name` or ends with it, flags, old names and what other programs say too.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    from es_megatron.config.hints import hint_for
    from es_megatron.settings_page.entries import entries
    from es_megatron.trainer.settings import PretrainSettings

    found = [
        entry
        for full, entry in entries().items()
        if f".{full}".endswith(f".{name}") or name == entry.flag or name in (*entry.before, *entry.fact.spec.also)
    ]
    if not found:
        hint = hint_for(name.rpartition(".")[2], PretrainSettings, PretrainSettings)
        raise ConfigError(f"There is no setting `{name}`. {hint}")
    return found
