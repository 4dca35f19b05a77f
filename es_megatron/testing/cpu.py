"""Let Megatron-Core run on gloo without CUDA.

Megatron-Core asks for CUDA devices, streams and random states without asking whether there are any. `install()` answers
in their place: device arguments that mean CUDA mean the CPU, streams do nothing, the CUDA generator is the CPU's. It is
best called before megatron is imported (which then takes 1 s less), and works after. Where CUDA is available nothing is
changed at all.

Functions are replaced one by one rather than through a `TorchFunctionMode`: a mode costs microseconds on every torch
call of the forward pass, which would distort a measured ratio of forward to backward, and does not reach other threads.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Generator
from typing import Any

import torch

FACTORIES = (
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint"),
    *("randperm", "empty_strided", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)
"""Functions of torch that take a device; those megatron-core and the checkpoint code call, and their siblings."""

METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
"""Methods of a tensor that take a device."""

NOTHING_TO_DO = ("set_device", "synchronize", "_lazy_init", "set_stream")
"""Functions of torch.cuda that have no meaning on a CPU."""

RNG_LOGGER = "megatron.core.tensor_parallel.random"  # the module, and the name of its logger

_replaced: list[tuple[Any, str, Any]] = []
"""(owner, name, original) of everything replaced, in order."""


class Stream:
    """A CUDA stream where work is done at once."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take and ignore a device and a priority."""

    def wait_stream(self, stream: object) -> None:
        """Nothing is ever outstanding."""

    def wait_event(self, event: object) -> None:
        """Nothing is ever outstanding."""

    def synchronize(self) -> None:
        """Nothing is ever outstanding."""

    def query(self) -> bool:
        """Everything is always done."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Give an event that has already happened."""
        return event or Event()


class Event:
    """A CUDA event that has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take and ignore the flags of a CUDA event."""

    def record(self, stream: object = None) -> None:
        """Nothing is ever outstanding."""

    def wait(self, stream: object = None) -> None:
        """Nothing is ever outstanding."""

    def synchronize(self) -> None:
        """Nothing is ever outstanding."""

    def query(self) -> bool:
        """It has happened."""
        return True


def install() -> bool:
    """Put the layer in place; best before megatron is imported. Again does nothing.

    Returns:
        Whether the layer is in place: False, and nothing is changed, where CUDA is available.
    """
    if torch.cuda.is_available():
        return False
    if _replaced:
        return True
    _replace_factories()
    _replace_tensor_methods()
    _replace_random_states()
    _replace_streams()
    _replace(torch.cuda, "current_device", lambda: 0)
    # torch built for CUDA would ask the device whether a graph is being captured, at every step of an optimizer
    _replace(torch.cuda, "is_current_stream_capturing", lambda: False)
    _replace(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    _replace(torch.cuda, "_lazy_call", lambda callback, **_: callback())
    for name in NOTHING_TO_DO:
        _replace(torch.cuda, name, _nothing())
    _replace(torch.distributed, "all_to_all_single", _with_sizes_as_lists(torch.distributed.all_to_all_single))
    _reach_imported_megatron()
    _replace(torch, "compile", _identity_compile)  # megatron-core compiles helpers at import: minutes, and a compiler
    logging.getLogger(RNG_LOGGER).addFilter(_expected_rng_change)
    return True


def uninstall() -> None:
    """Put every replaced function back. Megatron modules imported meanwhile keep what they took by name."""
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)
    logging.getLogger(RNG_LOGGER).removeFilter(_expected_rng_change)
    torch.compiler.set_stance("default")


def installed() -> bool:
    """Whether the layer is in place."""
    return bool(_replaced)


def _replace(owner: Any, name: str, replacement: Any) -> None:
    """Replace an attribute and remember the original. Dynamo wants a distinct object for each name of torch."""
    _replaced.append((owner, name, getattr(owner, name)))
    setattr(owner, name, replacement)


def _means_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _replace_factories() -> None:
    for name in FACTORIES:
        _replace(torch, name, _made_on_cpu(getattr(torch, name)))


def _made_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _means_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _replace_tensor_methods() -> None:
    original_to: Callable[..., torch.Tensor] = torch.Tensor.to
    original_type: Callable[..., Any] = torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _means_cuda(args[0]):
            args = ("cpu", *args[1:])
        if kwargs and _means_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)  # optimizers look for torch.cuda.FloatTensor

    for name in METHODS:
        _replace(torch.Tensor, name, _made_on_cpu(getattr(torch.Tensor, name)))
    _replace(torch.Tensor, "to", to)
    _replace(torch.Tensor, "type", type_)
    _replace(torch.Tensor, "cuda", lambda self, *_, **__: self)
    _replace(torch.Tensor, "pin_memory", lambda self, *_, **__: self)


def _replace_random_states() -> None:
    generator = torch.default_generator
    for owner in (torch.cuda, torch.cuda.random):
        _replace(owner, "get_rng_state", lambda device="cuda": generator.get_state())
        _replace(owner, "set_rng_state", lambda new_state, device="cuda": generator.set_state(new_state))
        # not torch.manual_seed, which seeds CUDA too and so would come back here
        _replace(owner, "manual_seed", lambda seed: generator.manual_seed(int(seed)))
    _replace(torch.cuda, "default_generators", (generator,))


def _replace_streams() -> None:
    stream = Stream()

    @contextlib.contextmanager
    def nothing_around(*_: object, **__: object) -> Generator[None, None, None]:
        yield

    _replace(torch.cuda, "Stream", Stream)
    _replace(torch.cuda, "Event", Event)
    _replace(torch.cuda, "current_stream", lambda device=None: stream)
    _replace(torch.cuda, "default_stream", lambda device=None: stream)
    _replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    _replace(torch.cuda.nvtx, "range_push", _nothing())
    _replace(torch.cuda.nvtx, "range_pop", _nothing())
    _replace(torch.cuda.nvtx, "range", nothing_around)


def _nothing() -> Callable[..., None]:
    """Make a function of its own that does nothing."""

    def do_nothing(*args: object, **kwargs: object) -> None:
        return None

    return do_nothing


def _with_sizes_as_lists(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """Let experts' tokens be exchanged: megatron makes arrays of split sizes only of tensors that are on a GPU."""

    @functools.wraps(exchange)
    def exchange_all(output: Any, input: Any, *sizes: Any, **named: Any) -> Any:
        def listed(value: Any) -> Any:
            return value.tolist() if isinstance(value, torch.Tensor) else value

        return exchange(output, input, *map(listed, sizes), **{name: listed(value) for name, value in named.items()})

    return exchange_all


def _reach_imported_megatron() -> None:
    """Repair what megatron took by name, or handed to the compiler, if it was imported before."""
    random_states = sys.modules.get(RNG_LOGGER)
    if random_states is not None:
        for name in ("_lazy_call", "_lazy_init"):
            _replace(random_states, name, getattr(torch.cuda, name))
        torch.compiler.set_stance("force_eager")


def _identity_compile(model: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    """Stand in for torch.compile, both as a call and as a decorator with arguments."""
    return (lambda function: function) if model is None else model


def _expected_rng_change(record: logging.LogRecord) -> bool:
    """Drop megatron's warning that CUDA randomness moved the CPU generator: here they are one."""
    return "CPU RNG state changed" not in record.getMessage()
