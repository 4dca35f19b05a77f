"""What the patches of Megatron-DeepSpeed put in place of its functions, where `megatron_lm_glue` does not serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from es_megatron.frameworks import arguments, megatron_deepspeed, megatron_lm

Function = Callable[..., Any]


def add_arguments(original: Function) -> Function:
    """The flags `--es-*` come with the script's own."""

    def replacement(extra_args_provider: Function | None = None, *rest: Any, **named: Any) -> Any:
        def provide(parser: Any) -> Any:
            return arguments.add_arguments(parser if extra_args_provider is None else extra_args_provider(parser))

        return original(provide, *rest, **named)

    return replacement


def start(original: Function) -> Function:
    """The run is planned, or restored, before model, optimizer and learning-rate schedule are made."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        megatron_lm.start(megatron_deepspeed.DIALECT)
        return original(*args, **kwargs)

    return replacement


def load(original: Function) -> Function:
    """What DeepSpeed has loaded is compared with what was restored."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        iteration = original(*args, **kwargs)
        megatron_lm.check_loaded(int(iteration))
        return iteration

    return replacement


def take_training_data(original: Function) -> Function:
    """Validation and test data are those of the plain run; training data goes to our order."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        with megatron_lm.length_of_plain_run():
            train, *others = original(*args, **kwargs)
        return megatron_lm.take_training_data(train), *others

    return replacement


def wrap_schedule(original: Function) -> Function:
    """Training calls of Megatron's schedule score, choose and train."""
    return lambda *args, **kwargs: megatron_deepspeed.wrap_schedule(original(*args, **kwargs))


def finish_step(original: Function) -> Function:
    """DeepSpeed's pipeline is taken; scores are committed after a successful optimizer step."""

    def replacement(forward_step_func: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        with megatron_deepspeed.pipeline_taken(model[0]):
            outcome = original(forward_step_func, data_iterator, model, *rest, **named)
        megatron_lm.finish_step(skipped=bool(outcome[1]), leaving=False)
        return outcome

    return replacement
