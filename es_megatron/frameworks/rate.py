"""Another learning rate for one step of an optimizer, whatever schedule sets it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def scaled_rate(optimizer: Any, factor: float) -> Generator[None]:
    """Multiply the learning rate inside the block; a schedule steps outside of it.

    Args:
        optimizer: something with torch's `param_groups`.
        factor: `EvolvedSampling.rate_factor`; 1 changes nothing.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups if factor != 1.0 else []
    before = [group["lr"] for group in groups]
    for group, rate in zip(groups, before, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate
