"""Learning rates and weight decays that a search has found, to be reused by other specs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from es_megatron.bench.entries import mapping
from es_megatron.errors import ConfigError


class Point(NamedTuple):
    """What is searched for."""

    rate: float
    """Highest learning rate."""
    decay: float | None
    """Weight decay; None: that of the settings."""

    def __str__(self) -> str:
        """For people."""
        return f"lr {self.rate:g}" + ("" if self.decay is None else f" weight decay {self.decay:g}")


def read_rates(path: Path) -> dict[str, dict[str, Point]]:
    """Read what `rates_document` has written, by case and arm.

    Raises:
        ConfigError: there is no such file, or it is something else.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"`rates` file `{path}` cannot be read: {error.strerror}. Run the search first.") from error
    except ValueError as error:
        raise ConfigError(f"`rates` file `{path}` must be JSON, but is not: {error}") from error
    return {
        case: {arm: _point(entry, f"{path}: {case}.{arm}") for arm, entry in mapping(arms, f"{path}: {case}").items()}
        for case, arms in mapping(content, str(path)).items()
    }


def rates_document(found: Mapping[str, Mapping[str, Point]]) -> dict[str, Any]:
    """Points by case and arm as JSON."""
    return {
        case: {arm: {"learning_rate": point.rate, "weight_decay": point.decay} for arm, point in arms.items()}
        for case, arms in found.items()
    }


def _point(entry: Any, where: str) -> Point:
    content = mapping(entry, where)
    try:
        decay = content["weight_decay"]
        return Point(float(content["learning_rate"]), None if decay is None else float(decay))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"`{where}` must have `learning_rate` and `weight_decay`, but is {entry!r}.") from error
