"""Evolved Sampling on a `DeepSpeedEngine`: ZeRO 0 to 3, with or without tensor parallelism through an `mpu`.

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config="deepspeed.json")
    sampling = attach(engine, manifest, rows, train_samples=1_000_000)
    while not sampling.engine.done:
        loss = sampling.step()

The optimizer steps once for each meta-batch: the accumulation steps are set to the micro-batches that are trained, and
the engine's count of them begins anew. Shape suffixes: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.step import Trained, Work
from es_megatron.data.manifest import Manifest
from es_megatron.errors import ConfigError
from es_megatron.frameworks.deepspeed_accumulation import accumulating, boundary_counted, discard_gradients
from es_megatron.frameworks.deepspeed_common import (
    DeepSpeedSampling,
    LossOf,
    build_engine,
    build_feed,
    mean_loss,
    rank_grid_of,
)
from es_megatron.frameworks.feed import MetaBatchFeed, Rows
from es_megatron.frameworks.gradient_norm import OutputWatch, norm_bounds
from es_megatron.frameworks.samples import IGNORED, MicroBatch, checked_losses
from es_megatron.frameworks.scoring import join, scored_part, sequence_losses, traceless

Batch = dict[str, Tensor]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
TokenLosses = Callable[[Any, Batch], Tensor]


def megatron_token_losses(engine: Any, batch: Batch) -> Tensor:
    """Token losses `[B, T]` of Megatron-Core's GPTModel, which computes them itself."""
    return engine(
        input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None, labels=batch["labels"]
    )


def logits_token_losses(engine: Any, batch: Batch) -> Tensor:
    """Token losses `[B, T]` of a model that gives logits `[B, T, V]`, or something with such `logits`, for tokens."""
    output = engine(batch["tokens"])
    return cross_entropy(getattr(output, "logits", output), batch["labels"])


def huggingface_token_losses(engine: Any, batch: Batch) -> Tensor:
    """Token losses `[B, T]` of a causal language model of Hugging Face's transformers, whose own loss is a mean.

    Positions are passed on where the model takes them, an attention mask where samples have one.
    """
    module = getattr(engine, "module", engine)
    more = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
    if "position_ids" in inspect.signature(module.forward).parameters:
        more["position_ids"] = batch["position_ids"]
    output = engine(input_ids=batch["tokens"], use_cache=False, **more)
    return cross_entropy(output.logits, batch["labels"])


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Loss of each token `[B, T]`, 0 where its label is -100.

    Raises:
        ConfigError: logits are not those of each token.
    """
    if logits_BTV.dim() != 3 or logits_BTV.shape[:2] != labels_BT.shape:
        raise ConfigError(
            f"A model's logits must have the shape [B, T, vocabulary] with [B, T] = {list(labels_BT.shape)}, but have "
            f"{list(logits_BTV.shape)} instead. Give a `token_losses` of your own."
        )
    losses = torch.nn.functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view(labels_BT.shape)


def usual_token_losses(deepspeed: Any) -> TokenLosses:
    """The `token_losses` of a model where none is given: by whose it is."""
    packages = {each.__module__.partition(".")[0] for each in type(deepspeed.module).__mro__}
    return huggingface_token_losses if "transformers" in packages else megatron_token_losses


class EngineSampling(DeepSpeedSampling):
    """Evolved Sampling attached to a `DeepSpeedEngine`; `attach` makes it."""

    def __init__(
        self,
        engine: EvolvedSampling,
        feed: MetaBatchFeed,
        deepspeed: Any,
        *,
        token_losses: TokenLosses,
        loss_of: LossOf,
        per_token: bool,
    ) -> None:
        """Join the parts; see `attach`."""
        super().__init__(engine, feed, deepspeed, loss_source=0)
        self.token_losses, self.loss_of, self.per_token = token_losses, loss_of, per_token

    @override
    def score(self, positions: Int64) -> Float32 | None:
        size = self.engine.config.scorer.micro_batch_size or self.engine.micro_batch
        batches = scored_part(self._micro_batches(positions, size), self.engine.scorer)
        return self.score_batches(batches, norms=self.engine.needs_norm)

    def score_batches(self, batches: list[Batch], *, norms: bool = False) -> Float32 | None:
        """Mean token loss of each sequence of some micro-batches, as many on every rank; leaves no trace.

        Args:
            batches: on the CPU.
            norms: put the bounds of gradient norms under the losses, float32[2, n].
        """
        found: list[Tensor] = []
        watch = OutputWatch([self.deepspeed.module]) if norms else None
        with traceless([self.deepspeed.module]), torch.no_grad(), watch or nullcontext():
            for batch in self._on_device(batches):
                losses_BT, mask_BT = self._losses(batch), batch["loss_mask"]
                losses = sequence_losses(losses_BT, mask_BT)
                if watch is not None:
                    losses = torch.stack([losses, norm_bounds(losses_BT, mask_BT, watch.take())])
                found.append(losses)
        return join(found)

    @override
    def train(self, work: Work) -> Trained:
        batches = self._micro_batches(work.positions, self.engine.micro_batch)
        with accumulating(self.deepspeed, len(batches)), boundary_counted(self.deepspeed):
            total, found = self._forward_backward(batches, work.weights, step=True)
        grid = self.engine.grid
        mean = float(grid.sum_over_dp(np.asarray([total]))[0]) / (len(batches) * grid.dp_size)
        return Trained(mean, join(found) if work.capture else None)

    def train_batches(self, batches: list[Batch]) -> None:
        """Forward and backward without a step, for timing; the gradients are dropped."""
        deepspeed = self.deepspeed
        with traceless([deepspeed.module]), accumulating(deepspeed, len(batches) + 1), boundary_counted(deepspeed):
            deepspeed.train()
            self._forward_backward(batches, None, step=False)
        discard_gradients(deepspeed)

    def _forward_backward(
        self, batches: list[Batch], weights: npt.NDArray[np.float64] | None, *, step: bool
    ) -> tuple[float, list[Tensor]]:
        """Pass micro-batches through the engine; gives the sum of their losses, and the losses of sequences."""
        deepspeed, size = self.deepspeed, self.engine.micro_batch
        loss_of = self._per_token(batches) if self.per_token else self.loss_of
        total = torch.zeros((), device=deepspeed.device)
        found: list[Tensor] = []
        for number, batch in enumerate(self._on_device(batches)):
            losses_BT = self._losses(batch)
            tokens = self.engine.scorer.tokens(losses_BT.shape[1])
            found.append(sequence_losses(losses_BT, batch["loss_mask"], tokens))
            if weights is not None:
                weight = torch.as_tensor(weights[number * size : (number + 1) * size], dtype=losses_BT.dtype)
                losses_BT = losses_BT * weight.to(losses_BT.device)[:, None]
            loss = loss_of(losses_BT, batch["loss_mask"])
            total += loss.detach().float()
            deepspeed.backward(loss)
            if step and (number == len(batches) - 1 or deepspeed.managed_gradient_accumulation()):
                deepspeed.step()
        return float(total), found

    def _losses(self, batch: Batch) -> Tensor:
        return checked_losses(self.token_losses(self.deepspeed, batch), batch["loss_mask"])

    def _per_token(self, batches: list[Batch]) -> LossOf:
        """Loss whose mean over all micro-batches of all ranks is that over all their unmasked tokens."""
        grid = self.engine.grid
        own = np.asarray([sum(float(batch["loss_mask"].sum()) for batch in batches)])
        tokens = max(float(grid.sum_over_dp(own)[0]), 1.0)
        scale = len(batches) * grid.dp_size / tokens
        return lambda losses_BT, mask_BT: (losses_BT.float() * mask_BT.float()).sum() * scale

    def _micro_batches(self, positions: Int64, size: int) -> list[Batch]:
        assert self.feed is not None
        return self.feed.micro_batches(positions, size)

    def _on_device(self, batches: list[Batch]) -> Iterator[Batch]:
        for batch in batches:
            device = self.deepspeed.device
            yield MicroBatch((name, tensor.to(device, non_blocking=True)) for name, tensor in batch.items())


def place_of(deepspeed: Any) -> tuple[int, int]:
    """This rank's data-parallel and tensor-parallel rank."""
    mpu = deepspeed.mpu
    if mpu is None:
        return torch.distributed.get_rank(), 0
    return int(mpu.get_data_parallel_rank()), int(mpu.get_model_parallel_rank())


def attach(  # noqa: PLR0913 - all but three have defaults
    deepspeed: Any,
    manifest: Manifest,
    rows: Rows,
    *,
    train_samples: int,
    config: EvolvedSamplingConfig | None = None,
    token_losses: TokenLosses | None = None,
    loss_of: LossOf = mean_loss,
    per_token: bool = False,
    workers: int = 0,
    prefetch: int = 2,
    warm_start: WarmStart = start_with_scores,
) -> EngineSampling:
    """Attach Evolved Sampling to a `DeepSpeedEngine`; collective.

    The engine's `train_batch_size` is the meta-batch. Its `save_checkpoint` and `load_checkpoint` take the ES state
    along from now on, until `detach`.

    Args:
        deepspeed: what `deepspeed.initialize` gave.
        manifest: the blend.
        rows: its samples by id.
        train_samples: draws of the plain run.
        config: settings; None: the `"evolved_sampling"` block of the engine's JSON.
        token_losses: calls the engine on a micro-batch and gives the losses of tokens, `[B, T]`; None: that of
            Hugging Face's models, or of Megatron-Core's.
        loss_of: makes the loss of a micro-batch of those and the loss mask.
        per_token: average over all unmasked tokens of a step, instead of over micro-batches' `loss_of`.
        workers: loader processes per rank.
        prefetch: meta-batches a worker reads ahead.
        warm_start: see `EvolvedSampling`.

    Raises:
        ConfigError: what cannot work, before the first iteration.
    """
    if type(deepspeed).__name__ == "PipelineEngine":
        raise ConfigError("A `PipelineEngine` must be attached to by `es_megatron.frameworks.deepspeed_pipe.attach`.")
    grid = rank_grid_of(place_of(deepspeed))
    engine = build_engine(deepspeed, config, manifest, grid, train_samples, warm_start)
    feed = build_feed(engine, rows, workers, prefetch)
    token_losses = token_losses or usual_token_losses(deepspeed)
    return EngineSampling(engine, feed, deepspeed, token_losses=token_losses, loss_of=loss_of, per_token=per_token)


def gradient_norm(deepspeed: Any) -> float:
    """Norm of the last step's gradients before clipping, nan where DeepSpeed does not keep it."""
    norm = deepspeed.get_global_grad_norm()
    return math.nan if norm is None else float(norm)
