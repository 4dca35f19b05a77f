"""Megatron-Core's checkpoint writer in this process alone: a killed rank leaves no writer behind."""

from __future__ import annotations

import multiprocessing.dummy
import queue
from collections.abc import Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


@contextmanager
def writing_in_threads() -> Generator[None, None, None]:
    """Have Megatron's writer start no process in the body of a `with`.

    Up to 0.16 it forks a process for each file. Those outlive a rank that is killed, keep its connections open, so that
    the other ranks wait for it, and its memory. The standard library has threads under the same names. Newer versions
    write in threads by themselves.

    Its results come through a queue of a multiprocessing manager, started by spawn: that takes seconds on every rank,
    outlives a killed rank too, and hangs a main script without a `__main__` guard. Only asynchronous saving, which is
    not used here, needs one.
    """
    module: Any = filesystem_async
    before = module._results_queue, module.mp
    module._results_queue = queue.Queue()
    module.mp = SimpleNamespace(get_context=lambda _: multiprocessing.dummy)
    try:
        yield
    finally:
        module._results_queue, module.mp = before
