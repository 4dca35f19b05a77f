"""The part of a checkpoint that a sharded optimizer holds, checked before it is written.

Megatron-Core's `fully_reshardable` format gathers each gradient buffer without the padding between its buckets, and
then, in 0.16.1, cuts weights out at offsets that count the padding. With more than one bucket (so with overlaps, or
tied embeddings on two stages) what it writes is silently wrong; Megatron-LM's pull request 5077 mends it. Here the
padding is put back, and where there is any, what is to be written is compared with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from es_megatron.errors import CheckpointError

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",  # the format that another data-parallel size can load
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def sharded_optimizer_state(
    optimizer: ChainedOptimizer, model_state: Mapping[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Describe which part of the optimizer's tensors this rank holds; collective.

    Args:
        optimizer: of `build_optimizer`.
        model_state: sharded state of the model chunks, whose keys the optimizer's follow. Weights must be settled.
        is_loading: whether to load into the description, rather than save it.

    Raises:
        CheckpointError: what would be written differs from the weights.
    """

    def describe() -> dict[str, Any]:
        return optimizer.sharded_state_dict(dict(model_state), is_loading=is_loading, metadata=dict(METADATA))

    parts = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    if not _on_any_rank(any(_has_padding_between_buckets(part) for part in parts)):
        return describe()
    with _padding_restored(parts):
        state = describe()
    if is_loading:
        return state  # shapes only
    if not _equals_weights(state, parts[0]):
        state = describe()  # a version that subtracts the padding itself
    if not _equals_weights(state, parts[0]):
        raise CheckpointError(
            "The distributed optimizer's state cannot be saved: its weights differ from the model's once gathered. "
            "Use another version of megatron-core, or set `distributed_optimizer` to false."
        )
    return state


def _has_padding_between_buckets(part: DistributedOptimizer) -> bool:
    """Whether the offsets of any weight differ between a buffer and its gathered copy."""
    return any(
        bucket.grad_data.numel() != bucket.numel_unpadded for buffer in part.buffers for bucket in buffer.buckets[:-1]
    )


def _equals_weights(state: Mapping[str, Any], part: DistributedOptimizer) -> bool:
    """Whether the master weights about to be written are those of the model, on every rank."""
    weights = (weight for buffer in part.buffers for weight in buffer.param_index_map)
    written: Mapping[int, Any] = state["param_state"]
    equal = all(
        torch.equal(written[index]["param"].data.to(weight.dtype), weight.detach().cpu())
        for index, weight in enumerate(weights)
    )
    return not _on_any_rank(not equal)


def _on_any_rank(flag: bool) -> bool:
    """Whether a flag is set on any rank of the world, so that all take the same way."""
    count = torch.tensor([int(flag)], device=torch.cuda.current_device())
    dist.all_reduce(count)
    return bool(count.item())


@contextmanager
def _padding_restored(parts: Sequence[DistributedOptimizer]) -> Generator[None, None, None]:
    """Have gathered buffers keep the padding between buckets, so that offsets that count it are right."""
    for part in parts:
        part.get_parameter_state_dp_zero = _padded(part, part.get_parameter_state_dp_zero)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero  # the method of the class shows again


def _padded(part: DistributedOptimizer, gather: Callable[..., Any]) -> Callable[..., Any]:
    def gather_padded(*args: Any, **kwargs: Any) -> Any:
        state = gather(*args, **kwargs)
        if state is not None:
            for index, buffer in enumerate(part.buffers):
                for tensors in state[index].values():
                    for key, packed in tensors.items():
                        if isinstance(packed, torch.Tensor):
                            tensors[key] = spread(packed, buffer)
        return state

    return gather_padded


def spread(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Move the buckets of a gathered buffer from one right after another to where the buffer has them."""
    padded = packed.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + size] = packed[start : start + size]
        start += size
    return padded
