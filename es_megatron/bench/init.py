"""A spec of one's own: the shipped comparison over other text, sized for this machine and a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from es_megatron.bench.spec import SHIPPED, load_spec
from es_megatron.errors import ConfigError, DataError
from es_megatron.prepare.finding import find_corpus, parse_component
from es_megatron.resources import resource

SECONDS_A_MEGABYTE = 45.0
"""Of text in a plain run of the shipped model on one core, about: what the runs take is told as they start."""
COSTS = 0.625 * 3 + 1
"""Of the shipped arms together, in plain runs."""
LEAST = 0.05
"""Megabytes of a component below which no comparison says anything."""

HEAD = """# {arms} on your own text: es-megatron compare {path}
# The same model and settings as `es-megatron demo`. Make `max_megabytes` or `seeds` larger for more certainty, and add
# a blend with `damage: {{share: 0.4, inside: true}}` to see what damage does. docs/compare.md has every key.
"""


def init_spec(path: Path, components: Sequence[str], minutes: float) -> str:
    """Write a spec; returns what to tell.

    Args:
        path: of the spec, which must not be there.
        components: NAME=PATH each, as in `es-megatron prepare`; none: they are asked for.
        minutes: that the comparison may take on this machine, about.

    Raises:
        ConfigError: the file is there already, or no text is given.
        DataError: a path has no text.
    """
    if path.exists():
        raise ConfigError(f"`{path}` is there already: remove it, or give another name.")
    named = [parse_component(each) for each in components or ask()]
    if not named:
        raise ConfigError("`--component NAME=PATH` must be given with `--init` at least once: the text to compare on.")
    found = {name: find_corpus(name, [where]).files for name, where in named}
    sizes = {name: 1e-6 * sum(file.stat().st_size for file in files) for name, files in found.items()}
    shipped = load_spec(resource("configs") / SHIPPED)
    cores = os.cpu_count() or 1
    room = 60 * minutes * cores / (SECONDS_A_MEGABYTE * COSTS * len(shipped.seeds)) / len(sizes)
    megabytes = round(min(max(sizes.values()), room), 2)
    if megabytes < LEAST:
        raise DataError(
            f"{megabytes:g} MB of each component are too little to compare on. Give more text, more `--minutes`, or "
            "fewer components."
        )
    content: dict[str, Any] = yaml.safe_load((resource("configs") / SHIPPED).read_text(encoding="utf-8"))
    recipe = {"components": [f"{name}={Path(where).absolute()}" for name, where in named], "max_megabytes": megabytes}
    content["blends"] = {"own": {**recipe, "validation_share": 0.15, "set_aside": 0.25}}
    content["jobs"] = cores
    head = HEAD.format(arms=", ".join(shipped.arms), path=path)
    path.write_text(head + yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")
    told = ", ".join(f"{name} {size:.2f} MB" for name, size in sizes.items())
    return f"{path}: {told}; {megabytes:g} MB of each are used. Next: es-megatron compare {path}"


def ask() -> list[str]:
    """Ask for components on a terminal, until an empty answer."""
    found: list[str] = []
    while sys.stdin.isatty() and (answer := input("NAME=PATH of your text (empty: no more): ").strip()):
        found.append(answer)
    return found
