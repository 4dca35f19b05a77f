"""Evolved Sampling on DeepSpeed's `PipelineEngine`, with data and tensor parallelism.

    engine, *_ = deepspeed.initialize(model=PipelineModule(...), optimizer=optimizer, config="deepspeed.json")
    sampling = attach(engine, manifest, rows, train_samples=1_000_000, token_losses=token_losses)
    while not sampling.engine.done:
        loss = sampling.step()

A meta-batch is scored by forward-only evaluation with a loss function that gives one loss per sequence, and trained by
`train_batch` with as many accumulation steps as there are chosen micro-batches. Losses and choice reach the stages
between by broadcast. Shape suffixes: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.simulation import Times, best_order
from es_megatron.core.step import Trained, Work
from es_megatron.data.manifest import Manifest
from es_megatron.data.sampler import MetaBatch
from es_megatron.errors import ConfigError
from es_megatron.frameworks.deepspeed_accumulation import discard_gradients
from es_megatron.frameworks.deepspeed_common import (
    DeepSpeedSampling,
    LossOf,
    build_engine,
    build_feed,
    mean_loss,
    rank_grid_of,
)
from es_megatron.frameworks.feed import MetaBatchFeed, Rows
from es_megatron.frameworks.gradient_norm import norm_bounds, square_sums
from es_megatron.frameworks.merged_pipe import merged_schedule
from es_megatron.frameworks.samples import MicroBatch, checked_losses, shape_of
from es_megatron.frameworks.scoring import join, scored_part, sequence_losses, traceless

Batch = dict[str, Tensor]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
TokenLosses = Callable[[Any, Any], tuple[Tensor, Tensor]]
Pack = Callable[[Batch], tuple[Any, Any]]


def pack_gpt(batch: Batch) -> tuple[Any, Any]:
    """A micro-batch as what the first stage takes, and what the last stage's loss takes."""
    return (batch["tokens"], batch["position_ids"]), (batch["labels"], batch["loss_mask"])


class PipeSampling(DeepSpeedSampling):
    """Evolved Sampling attached to a `PipelineEngine`; `attach` makes it."""

    def __init__(
        self,
        engine: EvolvedSampling,
        feed: MetaBatchFeed | None,
        deepspeed: Any,
        *,
        token_losses: TokenLosses,
        loss_of: LossOf,
        pack: Pack,
    ) -> None:
        """Join the parts; see `attach`."""
        tensor = int(deepspeed.grid.get_slice_parallel_world_size())
        super().__init__(engine, feed, deepspeed, loss_source=(deepspeed.num_stages - 1) * tensor)
        self.token_losses, self.loss_of, self.pack = token_losses, loss_of, pack
        self._norms_known = False

    @override
    def score(self, positions: Int64) -> Float32 | None:
        config = self.engine.config
        size = config.scorer.micro_batch_size or self.engine.micro_batch
        packed = self._packed(positions, size, scoring=True)
        other_shape = size != self.engine.micro_batch or self.engine.scorer.shortens
        return self._score(packed, len(positions) // size, other_shape=other_shape, norms=self.engine.needs_norm)

    def score_batches(self, batches: list[Batch]) -> Float32 | None:
        """Mean token loss of each sequence of some micro-batches, None but on the last stage; leaves no trace."""
        packed = iter([self.pack(batch) for batch in batches])
        return self._score(packed, len(batches), other_shape=len(batches[0]["tokens"]) != self.engine.micro_batch)

    @override
    def train(self, work: Work) -> Trained:
        if work.ahead is not None:
            return self._train_merged(work, work.ahead)
        size = self.engine.micro_batch
        count = len(work.positions) // size
        found: list[Tensor] = []
        with self._accumulating(count), self._loss(self._training_loss(work.weights, found)):
            mean = self.deepspeed.train_batch(self._packed(work.positions, size))
        return Trained(float(mean), join(found) if work.capture else None)

    def _train_merged(self, work: Work, ahead: MetaBatch) -> Trained:
        """The same, and forward passes over the next meta-batch, in one `train_batch`."""
        size, own = self.engine.micro_batch, self.engine.own
        count = len(work.positions) // size
        order = best_order(self.deepspeed.num_stages, 1, count, len(own) // size, Times())
        batches: list[Batch] = []
        if self.feed is not None:
            self.feed.fetch_ahead(ahead)
            early = self.feed.micro_batches(own, size, ahead.iteration)
            batches = [*early[: order.before], *self.feed.micro_batches(work.positions, size), *early[order.before :]]
        found: list[Tensor] = []

        def losses_of(outputs: Any, labels: Any) -> Tensor:
            return sequence_losses(*self._token_losses(outputs, labels))

        training_loss = self._training_loss(work.weights, [])
        merged = merged_schedule(self.deepspeed, order, losses_of, found)
        with self._accumulating(count), self._loss(training_loss), merged:
            mean = self.deepspeed.train_batch(iter([self.pack(MicroBatch(batch)) for batch in batches]))
        return Trained(float(mean), None, join(found))

    def train_batches(self, batches: list[Batch]) -> None:
        """Forward and backward without a step, for timing; the gradients are dropped."""
        from deepspeed.runtime.pipe import schedule

        class WithoutStep(schedule.TrainSchedule):
            def steps(self) -> Generator[list[Any]]:
                at_the_end = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)
                for commands in super().steps():
                    yield [command for command in commands if not isinstance(command, at_the_end)]

        deepspeed = self.deepspeed
        with traceless([deepspeed.module]), self._accumulating(len(batches)), self._loss(self._training_loss(None, [])):
            deepspeed.module.train()
            deepspeed.total_loss, deepspeed._compute_loss = None, True
            deepspeed.set_dataiterator(iter([self.pack(batch) for batch in batches]))
            deepspeed._exec_schedule(WithoutStep(len(batches), deepspeed.num_stages, deepspeed.stage_id))
        discard_gradients(deepspeed)

    def _score(self, packed: Iterator[Any], count: int, *, other_shape: bool, norms: bool = False) -> Float32 | None:
        """Evaluate forward only; micro-batches of another shape make the stages exchange shapes anew."""
        deepspeed = self.deepspeed
        other_shape = other_shape and not deepspeed.dynamic_shape

        refused: list[str] = []

        def losses_of(outputs: Any, labels: Any) -> Tensor:
            # before the losses, which Megatron's cross entropy makes in the logits' own memory
            squares_BT = square_sums(outputs) if norms and isinstance(outputs, Tensor) and outputs.dim() == 3 else None
            losses_BT, mask_BT = self._token_losses(outputs, labels)
            losses = sequence_losses(losses_BT, mask_BT)
            if not norms:
                return losses
            if squares_BT is not None and squares_BT.shape == losses_BT.shape:
                return torch.stack([losses, norm_bounds(losses_BT, mask_BT, squares_BT)])
            told = (
                f"the shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"type {type(outputs).__name__}"
            )
            refused.append(f"{told}, for {losses_BT.shape[0]} sequences of {losses_BT.shape[1]} tokens")
            return torch.stack([losses, torch.full_like(losses, torch.nan)])

        with traceless([deepspeed.module]), torch.no_grad(), self._loss(losses_of), silent(deepspeed):
            if other_shape:
                deepspeed.reset_activation_shape()
            deepspeed.total_loss = None  # else it is added to the losses of sequences
            found = deepspeed.eval_batch(packed, reduce_output=None, bcast_loss=False, num_micro_batches=count)
            if other_shape:
                deepspeed.reset_activation_shape()
        deepspeed.total_loss = None
        if norms and not self._norms_known:
            with agreed(self.engine.grid, "bound gradient norms", kind=ConfigError):
                if refused:
                    raise ConfigError(
                        "Policy `grad-norm` needs logits [tokens, sequences, vocabulary] from the last stage, but its "
                        f"outputs have {refused[0]}. Return them in that order, or choose another `policy`."
                    )
            self._norms_known = True
        return join(list(found)) if deepspeed.is_last_stage() else None

    def _training_loss(
        self, weights: npt.NDArray[np.float64] | None, found: list[Tensor]
    ) -> Callable[[Any, Any], Tensor]:
        """The loss of a micro-batch on the last stage: notes that of each sequence, and weights it."""
        size = self.engine.micro_batch

        def training_loss(outputs: Any, labels: Any) -> Tensor:
            losses_BT, mask_BT = self._token_losses(outputs, labels)
            start = len(found) * size
            found.append(sequence_losses(losses_BT, mask_BT, self.engine.scorer.tokens(losses_BT.shape[1])))
            if weights is not None:
                weight = torch.as_tensor(weights[start : start + size], dtype=losses_BT.dtype)
                losses_BT = losses_BT * weight.to(losses_BT.device)[:, None]
            return self.loss_of(losses_BT, mask_BT)

        return training_loss

    def _token_losses(self, outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
        found: Any = self.token_losses(outputs, labels)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Tensor)):
            raise ConfigError(
                "`token_losses` must give the losses of tokens and their mask, two tensors [B, T], but gives "
                f"{shape_of(found)} instead. Return both."
            )
        return checked_losses(found[0], found[1]), found[1]

    def _packed(self, positions: Int64, size: int, *, scoring: bool = False) -> Iterator[Any]:
        batches = [] if self.feed is None else self.feed.micro_batches(positions, size)
        batches = scored_part(batches, self.engine.scorer) if scoring else batches
        return iter([self.pack(MicroBatch(batch)) for batch in batches])

    @contextmanager
    def _loss(self, function: Callable[[Any, Any], Tensor]) -> Generator[None]:
        module = self.deepspeed.module
        before = module.loss_fn
        module.loss_fn = function
        try:
            yield
        finally:
            module.loss_fn = before

    @contextmanager
    def _accumulating(self, micro_batches: int) -> Generator[None]:
        """Have the pipeline run over so many micro-batches; put its batch size back after."""
        deepspeed = self.deepspeed
        before = deepspeed.train_batch_size()
        deepspeed.set_train_batch_size(micro_batches * self.engine.micro_batch * self.engine.grid.dp_size)
        try:
            yield
        finally:
            deepspeed.set_train_batch_size(before)


@contextmanager
def silent(deepspeed: Any) -> Generator[None]:
    """Keep the engine's monitor out of an evaluation: it would broadcast one number where there is a list."""
    before = deepspeed.monitor.enabled
    deepspeed.monitor.enabled = False
    try:
        yield
    finally:
        deepspeed.monitor.enabled = before


def attach(  # noqa: PLR0913 - all but four have defaults
    deepspeed: Any,
    manifest: Manifest,
    rows: Rows,
    *,
    train_samples: int,
    token_losses: TokenLosses,
    config: EvolvedSamplingConfig | None = None,
    loss_of: LossOf = mean_loss,
    pack: Pack = pack_gpt,
    workers: int = 0,
    prefetch: int = 2,
    warm_start: WarmStart = start_with_scores,
) -> PipeSampling:
    """Attach Evolved Sampling to a `PipelineEngine`; collective.

    The engine's `train_batch_size` is the meta-batch. Its `save_checkpoint` and `load_checkpoint` take the ES state
    along from now on, until `detach`.

    Args:
        deepspeed: what `deepspeed.initialize` gave for a `PipelineModule`.
        manifest: the blend.
        rows: its samples by id; only read on the first and last stage.
        train_samples: draws of the plain run.
        token_losses: makes the losses of tokens `[B, T]`, and their mask, of the last stage's outputs and the labels;
            policy `grad-norm` takes those outputs as logits `[T, B, V]`.
        config: settings; None: the `"evolved_sampling"` block of the engine's JSON.
        loss_of: makes the loss of a micro-batch of losses and mask.
        pack: makes (inputs of the first stage, labels of the last) of a micro-batch.
        workers: loader processes per rank.
        prefetch: meta-batches a worker reads ahead.
        warm_start: see `EvolvedSampling`.

    Raises:
        ConfigError: what cannot work, before the first iteration.
    """
    if not hasattr(deepspeed, "grid"):
        raise ConfigError(
            "A `DeepSpeedEngine` must be attached to by `es_megatron.frameworks.deepspeed_engine.attach`."
        )
    topology = deepspeed.grid
    tensor = int(topology.get_slice_parallel_world_size())
    model_rank = int(deepspeed.stage_id) * tensor + int(topology.get_slice_parallel_rank())
    grid = rank_grid_of((int(topology.get_data_parallel_rank()), model_rank))
    engine = build_engine(deepspeed, config, manifest, grid, train_samples, warm_start)
    engine.epochs.read_ahead(workers * prefetch)  # stages between read nothing, and decide masks alike
    reads = deepspeed.is_first_stage() or deepspeed.is_last_stage()
    feed = build_feed(engine, rows, workers, prefetch) if reads else None
    return PipeSampling(engine, feed, deepspeed, token_losses=token_losses, loss_of=loss_of, pack=pack)
