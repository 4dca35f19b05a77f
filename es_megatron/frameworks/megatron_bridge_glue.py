"""What the patches of Megatron-Bridge put in place of its functions; each takes the original and gives its replacement.

Every one does what the original does as long as Evolved Sampling is off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from es_megatron.frameworks import megatron_bridge, megatron_lm

Function = Callable[..., Any]


def start(original: Function) -> Function:
    """The run is planned, or restored, before model, optimizer and learning-rate schedule are made."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        megatron_bridge.start(inspect.signature(original).bind(*args, **kwargs).arguments["cfg"])
        return made

    return replacement


def count_as_plain(original: Function) -> Function:
    """The sizes of the datasets are those of the run that the user asked for."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        with megatron_lm.length_of_plain_run():
            return original(*args, **kwargs)

    return replacement


def take_training_data(original: Function) -> Function:
    """Upstream's training dataset gives its samples to our order."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        train, *others = original(*args, **kwargs)
        return megatron_lm.take_training_data(train), *others

    return replacement


def wrap_schedule(original: Function) -> Function:
    """Training calls of the schedule score, choose and train."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        schedule, run = original(*args, **kwargs), megatron_lm.active()
        return schedule if run is None else run.sampling.wrap(schedule)

    return replacement


def save(original: Function) -> Function:
    """`es_state/` is written first, so that it is there when the tracker file names the iteration."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        state = inspect.signature(original).bind(*args, **kwargs).arguments["state"]
        with megatron_lm.state_saved(int(state.train_state.step), False):
            return original(*args, **kwargs)

    return replacement
