"""Whether a finished run is the run that is asked for: equal settings, on equal data, by the same versions."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, cast

from es_megatron.config import build
from es_megatron.trainer.settings import PretrainSettings

Flat = Mapping[str, Any]
"""Values of nested mappings by their path, such as `training.lr`."""


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one; an empty one stays."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        inner = isinstance(value, Mapping) and value
        found.update(flat(cast(Mapping[str, Any], value), f"{prefix}{name}.") if inner else {f"{prefix}{name}": value})
    return found


def settings_identity(made: PretrainSettings) -> dict[str, Any]:
    """All settings of a run with their defaults, JSON-able, but for where it stands."""
    told = dataclasses.asdict(dataclasses.replace(made, evolved_sampling=made.evolved_sampling.filled_in()))
    del told["run"], told["data"]["blend"]
    return json.loads(json.dumps(told, default=str))


@functools.cache
def usual() -> Flat:
    """Today's defaults."""
    return flat(
        settings_identity(build(PretrainSettings, {"data": {"blend": "b"}, "training": {"passes": 1}}, "usual"))
    )


def same_settings(finished: Flat, asked: Flat) -> bool:
    """Whether a finished run had these settings; those that did not exist then must have their default."""
    if not finished.keys() <= asked.keys():
        return False
    return all(
        finished[name] == value if name in finished else value == usual().get(name) for name, value in asked.items()
    )


def same_run(finished: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """The same for whole identities, as `runs.identity_of` gives them."""
    others = {*finished, *asked} - {"settings"}
    equal = all(finished.get(name) == asked.get(name) for name in others)
    return equal and same_settings(flat(finished.get("settings", {})), flat(asked.get("settings", {})))
