"""Another learning rate for one step of an optimizer, whatever schedule sets it."""

from __future__ import annotations

import functools
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


@contextmanager
def scaled_steps(optimizer: Any, factor: float) -> Generator[None]:
    """Multiply the learning rate in calls of `optimizer.step` only: what calls them may move its schedule itself.

    Args:
        optimizer: something with torch's `param_groups` and `step`.
        factor: `EvolvedSampling.rate_factor`; 1 changes nothing.
    """
    if factor == 1.0:
        yield
        return
    step, own = optimizer.step, vars(optimizer).get("step")

    @functools.wraps(step)  # torch's schedules look for their own mark on it
    def scaled(*args: Any, **kwargs: Any) -> Any:
        with scaled_rate(optimizer, factor):
            return step(*args, **kwargs)

    optimizer.step = scaled
    try:
        yield
    finally:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own
