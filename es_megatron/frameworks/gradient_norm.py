"""Bound of each sequence's gradient norm from a forward pass: softmax minus target at the logits. No backward pass.

For the mean token loss of a sequence the gradient at the logits of token t is (p_t - y_t) / T, and
|p_t - y_t|^2 = sum(p_t^2) - 2 p_t(y) + 1, of which the token's loss gives p_t(y) = exp(-loss) (Katharopoulos & Fleuret
2018, eq. 16). Shape suffixes: B sequences, T tokens, V this tensor-parallel rank's share of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from es_megatron.errors import ConfigError

OUTPUT_LAYER = "output_layer"


def square_sums(logits_TBV: Tensor) -> Tensor:
    """Sum of squared probabilities of each token over the whole vocabulary; collective over tensor-parallel ranks.

    Returns:
        float32 `[B, T]`.

    Args:
        logits_TBV: Megatron-Core's order of axes.
    """
    logits = logits_TBV.detach().float()
    highest = logits.amax(dim=-1, keepdim=True)
    split = parallel_state.model_parallel_is_initialized() and parallel_state.get_tensor_model_parallel_world_size() > 1
    group = parallel_state.get_tensor_model_parallel_group() if split else None
    if split:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    shifted = (logits - highest).exp()
    sums = torch.stack([shifted.sum(dim=-1), shifted.square().sum(dim=-1)])
    if split:
        dist.all_reduce(sums, group=group)
    return (sums[1] / sums[0].square()).transpose(0, 1)


def norm_sums(losses_BT: Tensor, mask_BT: Tensor, squares_BT: Tensor) -> Tensor:
    """Sum of the squared norms of each sequence's token gradients under its mask, float32 `[B]`."""
    losses, mask = losses_BT.detach().float(), mask_BT.detach().reshape(losses_BT.shape).float()
    each_BT = (squares_BT - 2 * torch.exp(-losses) + 1).clamp(min=0)
    return torch.where(mask > 0, each_BT * mask.square(), 0.0).sum(dim=1)


def norm_bounds(losses_BT: Tensor, mask_BT: Tensor, squares_BT: Tensor) -> Tensor:
    """Bound of the norm of each sequence's gradient under its mask, float32 `[B]`; nan where no token counts."""
    count_B = mask_BT.detach().reshape(losses_BT.shape).float().sum(dim=1)
    return norm_sums(losses_BT, mask_BT, squares_BT).sqrt() / count_B


class OutputWatch:
    """Notes what Megatron-Core's output layer gives, while it is entered."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Find the output layers.

        Args:
            chunks: this rank's model chunks.
        """
        self._layers = [
            module for chunk in chunks for name, module in chunk.named_modules() if name.endswith(OUTPUT_LAYER)
        ]
        self._squares_BT: Tensor | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> OutputWatch:
        """Begin to watch."""
        for layer in self._layers:
            self._hooks.callback(layer.register_forward_hook(self._note).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._hooks.close()

    def take(self) -> Tensor:
        """`square_sums` of the logits of the micro-batch that has just passed, float32 `[B, T]`.

        Raises:
            ConfigError: the model has no output layer that can be watched.
        """
        taken, self._squares_BT = self._squares_BT, None
        if taken is None:
            raise ConfigError(
                f"Policy `grad-norm` needs the logits of a model's `{OUTPUT_LAYER}`, as Megatron-Core's GPTModel has "
                "one, but none was seen: it is named otherwise, or fused with the loss. Use another policy."
            )
        return taken

    def _note(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        self._squares_BT = square_sums(output[0] if isinstance(output, tuple) else output)
