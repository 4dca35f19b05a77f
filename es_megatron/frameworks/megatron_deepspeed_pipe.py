"""The passes of Megatron-DeepSpeed's pipeline, whose batches and losses are made by functions of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.step import Trained, Work
from es_megatron.frameworks.deepspeed_common import mean_loss
from es_megatron.frameworks.deepspeed_pipe import PipeSampling
from es_megatron.frameworks.feed import MetaBatchFeed

Int64 = npt.NDArray[np.int64]


class MegatronPipe(PipeSampling):
    """Passes micro-batches to `get_batch_pipe` of the script, on the ranks that read data."""

    def train(self, work: Work) -> Trained:
        """Train the chosen; Megatron's learning-rate schedule counts the meta-batch, as without a choice."""
        scheduler, whole = self.deepspeed.lr_scheduler, self.engine.meta_batch
        own = scheduler.step

        def step(increment: int, *rest: Any, **named: Any) -> Any:
            return own(whole, *rest, **named)  # the engine says what it has trained on

        scheduler.step = step
        try:
            return super().train(work)
        finally:
            del scheduler.step

    def _packed(self, positions: Int64, size: int, *, scoring: bool = False) -> Iterator[Any]:
        # tensor ranks above 0 have no iterator: the script's function takes their batch from rank 0
        return cast(Iterator[Any], None) if self.feed is None else super()._packed(positions, size, scoring=scoring)


def pipeline_of(engine: EvolvedSampling, feed: MetaBatchFeed | None, deepspeed: Any) -> MegatronPipe:
    """The passes over a `PipelineEngine`; its checkpoints are left to the patches."""
    pipeline = MegatronPipe(
        engine, feed, deepspeed, token_losses=token_losses, loss_of=mean_loss, pack=lambda batch: cast(Any, batch)
    )
    pipeline.detach()
    return pipeline


def token_losses(outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Losses of tokens `[B, T]` and their mask, of the last stage's logits `[T, B, V]` and (labels, mask)."""
    from megatron.core import tensor_parallel

    target_BT, mask_BT = labels
    losses_TB = tensor_parallel.vocab_parallel_cross_entropy(
        outputs.contiguous().float(), target_BT.transpose(0, 1).contiguous()
    )
    return losses_TB.transpose(0, 1).contiguous(), mask_BT
