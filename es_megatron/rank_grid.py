"""One process and many look the same: the ranks of a run and the few collectives ES needs.

A run is a grid of data-parallel ranks (`dp`, each holds other data) times model-parallel ranks (`mp`: tensor times
pipeline times context, which together pass one copy of the data through one model). Of those, the ones that share each
sequence, and hold the same part of the model, are context peers (`cp`). All collectives run on CPU arrays over gloo
groups of their own, from the main thread, in program order, so that they cannot cross with the framework's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Array = npt.NDArray[Any]

SMALL_BYTES = 1 << 20
"""Up to this size what a sum takes is the number of its steps, not its bytes."""


@dataclass(frozen=True)
class RankGrid:
    """Where this process stands in the grid, and its collectives."""

    dp_rank: int
    dp_size: int
    mp_rank: int
    """Rank within the ranks that share this data-parallel rank."""
    mp_size: int
    world_rank: int
    world_size: int
    cp_size: int = 1
    """Ranks that share a sequence; 1: each sequence is on one rank, or on its tensor and pipeline peers alone."""
    _groups: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)
    _members: dict[str, list[int]] = field(default_factory=dict[str, list[int]], repr=False)

    @staticmethod
    def alone() -> RankGrid:
        """A run of one process; needs no process group."""
        return RankGrid(0, 1, 0, 1, 0, 1)

    @staticmethod
    def of_grid(places: Sequence[Sequence[int]], context: int = 1) -> RankGrid:
        """Make the groups of a grid of ranks; collective over the world.

        Args:
            places: places[d][m] is the world rank of data-parallel rank d and model-parallel rank m.
            context: ranks that share a sequence. With M ranks in a row, m and m + M / context are context peers.

        Returns:
            This process's place. Its groups have the time-out of the default group.
        """
        if len(places) * len(places[0]) == 1:
            return RankGrid.alone()
        me = dist.get_rank()
        timeout = default_timeout()
        members: dict[str, list[int]] = {"world": sorted(rank for row in places for rank in row)}
        groups: dict[str, Any] = {"world": dist.new_group(members["world"], backend="gloo", timeout=timeout)}
        place = next((d, m) for d, row in enumerate(places) for m, rank in enumerate(row) if rank == me)
        for row in places:
            group = dist.new_group(list(row), backend="gloo", timeout=timeout)
            if me in row:
                groups["mp"], members["mp"] = group, list(row)
        for column in zip(*places, strict=True):
            group = dist.new_group(list(column), backend="gloo", timeout=timeout)
            if me in column:
                groups["dp"], members["dp"] = group, list(column)
        for peers in _context_peers(places, context):
            group = dist.new_group(peers, backend="gloo", timeout=timeout)
            if me in peers:
                groups["cp"], members["cp"] = group, peers
        dp_size, mp_size = len(places), len(places[0])
        return RankGrid(place[0], dp_size, place[1], mp_size, me, dp_size * mp_size, context, groups, members)

    @staticmethod
    def data_parallel() -> RankGrid:
        """Every process of the default group is a data-parallel rank of its own."""
        if not dist.is_initialized():
            return RankGrid.alone()
        return RankGrid.of_grid([[rank] for rank in range(dist.get_world_size())])

    def sum_over_dp(self, array: Array) -> Array:
        """Element-wise sum over data-parallel ranks, the same on each of them (adding zeros is exact)."""
        if self.dp_size == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
        if 0 < tensor.nbytes <= SMALL_BYTES:
            return self._sum_by_doubling(tensor).numpy()
        dist.all_reduce(tensor, group=self._groups["dp"])
        return tensor.numpy()

    def sum_over_cp(self, array: Array) -> Array:
        """Element-wise sum over the ranks that share each sequence, the same on each of them."""
        if self.cp_size == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
        dist.all_reduce(tensor, group=self._groups["cp"])
        return tensor.numpy()

    def _sum_by_doubling(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a small tensor in log2(D) exchanges with one partner each; gloo's ring takes 2 (D - 1) steps.

        Ranks past the largest power of two hand their part to a partner and get the result back. Every rank adds the
        same pairs, so that the sums are the same to the last bit. numpy adds: torch would wake threads for it.
        """
        members, group, rank = self._members["dp"], self._groups["dp"], self.dp_rank
        whole = 1 << (self.dp_size.bit_length() - 1)
        other = torch.empty_like(tensor)
        total, received = tensor.numpy(), other.numpy()
        if rank >= whole:
            dist.send(tensor, members[rank - whole], group=group)
            dist.recv(tensor, members[rank - whole], group=group)
            return tensor
        extra = rank + whole < self.dp_size
        if extra:
            dist.recv(other, members[rank + whole], group=group)
            total += received
        step = 1
        while step < whole:
            partner = members[rank ^ step]
            sent = dist.isend(tensor, partner, group=group)
            dist.recv(other, partner, group=group)
            if sent is not None:
                sent.wait()
            total += received
            step *= 2
        if extra:
            dist.send(tensor, members[rank + whole], group=group)
        return tensor

    def broadcast_over_mp(self, array: Array, source: int) -> Array:
        """The array of model-parallel rank `source`, on every rank that shares this data-parallel rank."""
        return self._broadcast(array, "mp", source) if self.mp_size > 1 else array

    def broadcast(self, array: Array) -> Array:
        """The array of world rank 0, on every rank; shape and dtype must be the same everywhere."""
        return self._broadcast(array, "world", 0) if self.world_size > 1 else array

    def broadcast_object(self, value: Any) -> Any:
        """The (small, picklable) object of world rank 0, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._members["world"][0], group=self._groups["world"])
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The (small, picklable) objects of all ranks, by world rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self._groups["world"])
        return box

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self._groups["world"])

    def _broadcast(self, array: Array, axis: str, source: int) -> Array:
        tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
        dist.broadcast(tensor, src=self._members[axis][source], group=self._groups[axis])
        return tensor.numpy()


def default_timeout() -> timedelta | None:
    """How long a collective of the default group may take; None where the group does not tell.

    A new group has 30 minutes otherwise, whatever the job's own groups have.
    """
    group: Any = dist.group.WORLD
    try:
        return group._get_backend(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")).options._timeout
    except (AttributeError, RuntimeError):  # a backend that is none of torch's
        return None


def _context_peers(places: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    """World ranks of each group of context peers, none where nothing is shared."""
    if context == 1:
        return []
    return [list(row[place :: len(row) // context]) for row in places for place in range(len(row) // context)]
