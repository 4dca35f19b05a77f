"""Attention that reaches over the ranks that share a sequence, for the CPU: it gathers what ring attention passes on.

It stands in Megatron-Core's own GPT where Transformer Engine's attention would, which needs a GPU. Shape suffixes: T
tokens of a rank, S of the whole sequence, B sequences, H heads, D of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from torch import Tensor
from typing_extensions import override

from es_megatron.trainer import model as model_module
from es_megatron.trainer.settings import PretrainSettings


class Gather(torch.autograd.Function):
    """Tokens of all context peers, in the order of their ranks; the gradient comes back summed over the peers."""

    @staticmethod
    @override
    def forward(ctx: Any, own: Tensor) -> Tensor:
        pieces = [torch.empty_like(own) for _ in range(parallel_state.get_context_parallel_world_size())]
        dist.all_gather(pieces, own.contiguous(), group=parallel_state.get_context_parallel_group())
        return torch.stack(pieces)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
        return total[parallel_state.get_context_parallel_rank()]


def places_of(rank: int, size: int, length: int) -> Tensor:
    """Tokens of the sequence that a rank holds, int64 `[T]`: as upstream cuts it, one early piece and one late."""
    pieces = torch.arange(length).view(2 * size, -1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


class GatheringAttention(torch.nn.Module):
    """Causal attention of a rank's tokens over all tokens, those of one document alone where rows are packed."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config

    @override
    def forward(
        self,
        query_TBHD: Tensor,
        key_TBHD: Tensor,
        value_TBHD: Tensor,
        *_: Any,
        packed_seq_params: Any = None,
        **__: Any,
    ) -> Tensor:
        if packed_seq_params is not None:  # upstream takes the axis of sequences away then
            query_TBHD, key_TBHD, value_TBHD = (each[:, None] for each in (query_TBHD, key_TBHD, value_TBHD))
        size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        length = size * len(query_TBHD)
        order = torch.cat([places_of(each, size, length) for each in range(size)]).argsort()
        own, everything = places_of(rank, size, length), torch.arange(length)
        key_SBHD, value_SBHD = (Gather.apply(each).flatten(0, 1)[order] for each in (key_TBHD, value_TBHD))
        scores = torch.einsum("tbhd,sbhd->bhts", query_TBHD, key_SBHD) / math.sqrt(query_TBHD.shape[-1])
        unseen = everything[None] > own[:, None]
        if packed_seq_params is not None:
            document = torch.searchsorted(packed_seq_params.cu_seqlens_q, everything, right=True)
            unseen |= document[None] != document[own][:, None]
        weights = scores.masked_fill(unseen, -math.inf).softmax(dim=-1)
        return torch.einsum("bhts,sbhd->tbhd", weights, value_SBHD).flatten(2)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing is kept."""
        return {}


def gather_attention(settings: PretrainSettings, *, packed: bool = False) -> None:
    """Where sequences are shared or packed, have the models that this (forked) process builds from now on use it."""
    if settings.parallel.context == 1 and not packed:
        return

    def layer_spec(settings: PretrainSettings) -> Any:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization=settings.model.normalization)
        spec.submodules.self_attention.submodules.core_attention = GatheringAttention
        return spec

    model_module.layer_spec = layer_spec
