"""Let an unmodified Megatron-LM script run on gloo without CUDA; for trying things out, and for tests.

On top of the layer for Megatron-Core (`testing.cpu`) a script of Megatron-LM asks what the device is and what it can
do, compiles kernels at start-up, and on its newer versions imports what Python 3.11 or a machine without a GPU does not
have. Where CUDA is available nothing is changed at all.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from es_megatron.testing import cpu

STAND_INS = ("triton", "megatron.legacy.fused_kernels")
"""Modules that a stand-in is imported for: the first where it is not installed, the second always."""


def install() -> bool:
    """Put both layers in place; call it before megatron is imported. Again does nothing.

    Returns:
        Whether they are in place: False, and nothing is changed, where CUDA is available.
    """
    if cpu.installed():
        return True
    if not cpu.install():
        return False
    _answer_about_the_device()
    _give_checkpoints_a_format()
    if not hasattr(typing, "override"):  # Python 3.12's, which megatron-core 0.17 and later import
        typing.override = lambda function: function  # pyright: ignore[reportAttributeAccessIssue]
    if not hasattr(np, "product"):  # gone from numpy 2; core_v0.14 and before save distributed checkpoints with it
        np.__dict__["product"] = np.prod
    importlib.import_module("torch._dynamo")  # which would take a stand-in for triton at its word; torch.optim loads it
    names = [name for name in STAND_INS if "." in name or importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, StandInFinder(names))
    atexit.register(leave_groups)
    return True


def leave_groups() -> None:
    """End gloo's threads, which the scripts leave running at their end: now and then those abort the exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def adapt_megatron_core() -> None:
    """Change what has to be changed in megatron.core itself, which this imports; call it once it can be found."""
    if cpu.installed():
        _keep_pipeline_outputs()
        _answer_about_transformer_engine()
        _route_without_transformer_engine()


def _keep_pipeline_outputs() -> None:
    """Have stages keep what they send, which Megatron-LM frees once it is under way.

    Interleaved stages send without waiting, and gloo reads the memory later than NCCL does: what arrives is random.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig

    original = ModelParallelConfig.__post_init__

    def keeping(self: Any) -> None:
        self.deallocate_pipeline_outputs = False
        original(self)

    ModelParallelConfig.__post_init__ = keeping


def _answer_about_transformer_engine() -> None:
    """Let core_v0.12 load a distributed checkpoint, for which it asks Transformer Engine's version, without it."""
    from megatron.core import utils

    core: Any = utils
    try:
        core.get_te_version()
    except ModuleNotFoundError:
        core._te_version = core.PkgVersion("0.0")


def _route_without_transformer_engine() -> None:
    """Let core_v0.16 route tokens to experts: it asks for Transformer Engine's matrix product also without it."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]


def _give_checkpoints_a_format() -> None:
    """Let core_v0.12 write checkpoints with a newer torch, which asks it for the format of a tensor's bytes."""
    from torch.distributed.checkpoint import filesystem

    original: Any = filesystem._write_item  # pyright: ignore[reportPrivateUsage]
    formats: Any = getattr(filesystem, "SerializationFormat", None)
    if formats is None:  # an older torch
        return

    @functools.wraps(original)
    def write_item(*args: Any, **kwargs: Any) -> Any:
        if "serialization_format" not in kwargs and len(args) < len(inspect.signature(original).parameters):
            kwargs["serialization_format"] = formats.TORCH_SAVE
        return original(*args, **kwargs)

    filesystem._write_item = write_item  # pyright: ignore[reportPrivateUsage]


def _answer_about_the_device() -> None:
    """One device, of no kind in particular."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_name = lambda device=None: "cpu"
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="cpu", major=8, minor=0, multi_processor_count=1, total_memory=1 << 34
    )
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _zero())
    cuda.memory_stats = lambda device=None: _Zeros()
    cuda.mem_get_info = lambda device=None: (1 << 34, 1 << 34)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _zero())


class _Zeros(dict[str, int]):
    """Memory statistics where there is none: 0 under every name."""

    def __missing__(self, key: str) -> int:
        return 0


def _zero() -> Any:
    """Make a function of its own that answers 0; dynamo wants a distinct object for each name of torch."""
    return lambda *_, **__: 0


class StandIn(types.ModuleType):
    """A module in which every name is a function that returns its argument, as a decorator that does nothing."""

    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        """Make the name, as a stand-in of its own."""
        if name.startswith("__"):
            raise AttributeError(name)
        made = _stand_in_function(name)
        setattr(self, name, made)
        return made


def _stand_in_function(name: str) -> Any:
    class Function:
        """A function, a decorator with or without arguments, and a type, whichever is asked for."""

        def __new__(cls, *args: Any, **_: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else (lambda function: function)

    Function.__name__ = Function.__qualname__ = name
    return Function


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports stand-ins for some modules and everything below them."""

    def __init__(self, names: Sequence[str]) -> None:
        """Remember the names."""
        self._names = tuple(names)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        """Claim the names and what is below them."""
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make the stand-in."""
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""
