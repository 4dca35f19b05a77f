"""One rank reads, all know: before there is a grid of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def from_first_rank(compute: Callable[[], Any]) -> Any:
    """What `compute` gives on rank 0, on every rank; what it raises there is raised on every rank."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [compute()]
        except Exception as error:  # noqa: BLE001 - the other ranks must hear of it
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]
