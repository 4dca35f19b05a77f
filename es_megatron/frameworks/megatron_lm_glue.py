"""What the patches of Megatron-LM put in place of its functions; each takes the original and gives its replacement.

Every one does what the original does as long as Evolved Sampling is off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from es_megatron.frameworks import arguments, megatron_lm, megatron_lm_reference
from es_megatron.frameworks.megatron_lm_data import UnreadLoader

Function = Callable[..., Any]


def add_arguments(original: Function) -> Function:
    """The flags `--es-*` join the parser."""
    return lambda parser, *rest, **named: arguments.add_arguments(original(parser, *rest, **named))


def start(original: Function) -> Function:
    """The run is planned, or restored, before model, optimizer and learning-rate schedule are made."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not megatron_lm_reference.start(megatron_lm.MEGATRON_LM):
            megatron_lm.start(megatron_lm.MEGATRON_LM)
        return original(*args, **kwargs)

    return replacement


def load(original: Function) -> Function:
    """What Megatron has loaded is compared with what was restored."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        megatron_lm.check_loaded(int(loaded[0]))
        megatron_lm_reference.loaded(int(loaded[0]))
        return loaded

    return replacement


def count_as_plain(original: Function) -> Function:
    """The sizes of the datasets are those of the run that the user asked for."""

    def replacement() -> Any:
        with megatron_lm.length_of_plain_run():
            return original()

    return replacement


def take_training_data(original: Function) -> Function:
    """Upstream's training dataset gives its samples to our order."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        train, *others = original(*args, **kwargs)
        return megatron_lm_reference.take_training_data(megatron_lm.take_training_data(train)), *others

    return replacement


def leave_loading_out(original: Function) -> Function:
    """No loader is made for training data."""
    return lambda dataset, *rest, **named: (
        dataset if isinstance(dataset, UnreadLoader) else original(dataset, *rest, **named)
    )


def wrap_schedule(original: Function) -> Function:
    """Training calls of the schedule score, choose and train."""
    return lambda *args, **kwargs: megatron_lm_reference.wrap_schedule(
        megatron_lm.wrap_schedule(original(*args, **kwargs))
    )


def finish_step(original: Function) -> Function:
    """Scores are committed after a successful optimizer step."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        outcome = original(*args, **kwargs)
        megatron_lm.finish_step(skipped=bool(outcome[1]), leaving=bool(outcome[3]))
        return outcome

    return replacement


def skip_step(original: Function) -> Function:
    """An iteration that Megatron skips (`--iterations-to-skip`) reads none of our data."""
    return lambda *args, **kwargs: None if megatron_lm.skip_step() else original(*args, **kwargs)


def save(original: Function) -> Function:
    """`es_state/` is written first, so that it is there when the tracker file names the iteration."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        with megatron_lm.state_saved(int(call["iteration"]), bool(call.get("non_persistent_ckpt", False))):
            return original(*args, **kwargs)

    return replacement


def log(original: Function) -> Function:
    """A line of our own follows Megatron's, which reports its auxiliary losses as means over what was trained."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        megatron_lm.correct_auxiliary_losses()
        told = original(*args, **kwargs)
        megatron_lm.log(int(inspect.signature(original).bind(*args, **kwargs).arguments["iteration"]))
        return told

    return replacement
