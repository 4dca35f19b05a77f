"""Evolved Sampling around Megatron-Core's forward-backward schedules.

The schedules themselves are upstream's: this wraps the function that `get_forward_backward_func()` returns. A training
call becomes a forward-only call over the meta-batch, a choice, and a call with fewer micro-batches. Middle pipeline
stages hold no data; they get losses and choice by broadcast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.merged import check_merged, merged_size
from es_megatron.core.plan import check_micro_batches
from es_megatron.core.step import Trained, Work
from es_megatron.data.manifest import Manifest
from es_megatron.data.ramp import Ramp
from es_megatron.data.sampler import MetaBatch
from es_megatron.errors import ConfigError
from es_megatron.frameworks.feed import MetaBatchFeed, Rows
from es_megatron.frameworks.gradient_norm import OutputWatch, norm_sums
from es_megatron.frameworks.handle import Handle
from es_megatron.frameworks.megatron_core_checks import (
    check_context,
    check_model,
    check_packing,
    check_scoring_size,
)
from es_megatron.frameworks.merged_call import MergedCall, early_micro_batches, merged_order, warn_without_stages
from es_megatron.frameworks.scoring import by_sequence, join, means_of, sequence_sums, shortened, traceless
from es_megatron.rank_grid import RankGrid

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Schedule = Callable[..., Any]
LossMaskOf = Callable[[Callable[..., Any]], Tensor]


def rank_grid_of_parallel_state() -> tuple[RankGrid, int]:
    """This rank's place in Megatron-Core's grid, and the model-parallel rank that computes losses. Collective.

    The losses are on the last pipeline stage; its first tensor rank of the first context rank tells them.
    """
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    data, context = parallel_state.get_data_parallel_world_size(), context_parallel_size()
    source = (pipeline - 1) * tensor
    if dist.get_world_size() == 1:
        return RankGrid.alone(), source
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if context > 1:
        stage += pipeline * parallel_state.get_context_parallel_rank()
    place = (
        parallel_state.get_data_parallel_rank(),
        stage * tensor + parallel_state.get_tensor_model_parallel_rank(),
    )
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, place)
    ranks = {each: rank for rank, each in enumerate(places)}
    size = tensor * pipeline * context
    return RankGrid.of_grid([[ranks[d, m] for m in range(size)] for d in range(data)], context), source


def context_parallel_size() -> int:
    """Ranks that share each sequence; Megatron-DeepSpeed's old Megatron-Core does not know of any."""
    known = getattr(parallel_state, "get_context_parallel_world_size", None)
    return 1 if known is None else known()


def mask_of_partial(loss_func: Callable[..., Any]) -> Tensor:
    """The loss mask in Megatron-LM's `functools.partial(loss_func, loss_mask, ...)`.

    Raises:
        ConfigError: the forward step returns something else.
    """
    if isinstance(loss_func, functools.partial) and loss_func.args and isinstance(loss_func.args[0], Tensor):
        return loss_func.args[0]
    raise ConfigError(
        "The forward step must return `(output, functools.partial(loss_func, loss_mask))` as Megatron-LM's does, but "
        f"its loss function is {loss_func!r} instead. Pass `loss_mask_of`, from your loss function to its mask."
    )


class MegatronCoreSampling(Handle):
    """Evolved Sampling attached to a Megatron-Core training loop."""

    def __init__(
        self, engine: EvolvedSampling, feed: MetaBatchFeed | None, loss_source: int, loss_mask_of: LossMaskOf
    ) -> None:
        """Join the parts; `attach` is the usual way.

        Args:
            engine: the step and its state.
            feed: samples, None on ranks that read no data.
            loss_source: model-parallel rank that computes losses.
            loss_mask_of: finds the loss mask in what the forward step returns.
        """
        super().__init__(engine, feed, loss_source)
        self.loss_mask_of = loss_mask_of
        self._give_back: Callable[[], None] = lambda: None

    def wrap(self, schedule: Schedule) -> Schedule:
        """A function for `get_forward_backward_func()`'s place; forward-only calls pass through untouched."""

        @functools.wraps(schedule)
        def forward_backward(**call: Any) -> Any:
            if call.get("forward_only", False):
                return schedule(**call)
            self._check_call(call)
            batch = self.engine.draw()
            if self.feed is not None:
                self.feed.fetch(batch)
            return self.engine.step(batch, ScheduleCall(self, schedule, call))

        return forward_backward

    def finish(self, succeeded: bool) -> None:
        """Tell whether the optimizer stepped; call it after every training iteration, unless `finish_with` does."""
        self.engine.finish(succeeded)

    def finish_with(self, optimizer: Any) -> None:
        """Close every iteration when an optimizer has stepped, until `detach`.

        Args:
            optimizer: Megatron-Core's, whose `step` returns (whether it stepped, norm, zeros), or torch's, whose
                step always counts.
        """
        original = optimizer.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            outcome = original(*args, **kwargs)
            self.finish(bool(outcome[0]) if isinstance(outcome, tuple) else True)
            return outcome

        own = vars(optimizer).get("step")  # a learning-rate schedule of torch's puts one there
        optimizer.step = step
        self._give_back = lambda: vars(optimizer).pop("step", None) if own is None else setattr(optimizer, "step", own)

    def detach(self) -> None:
        """Give the optimizer its own `step` back."""
        self._give_back()

    def _check_call(self, call: dict[str, Any]) -> None:
        engine = self.engine
        drawn = engine.plan.schedule.ramp.size(engine.iteration)
        expected = drawn // (engine.micro_batch * engine.grid.dp_size)
        if call["num_microbatches"] != expected or call["micro_batch_size"] != engine.micro_batch:
            raise ConfigError(
                f"The schedule must be called with {expected} micro-batches of {engine.micro_batch}, but is called "
                f"with {call['num_microbatches']} of {call['micro_batch_size']} instead. Attach with the run's own "
                "batch sizes, and with `ramp` where they grow at first."
            )


class ScheduleCall:
    """One training call of the schedule, as the passes that the engine asks for."""

    def __init__(self, sampling: MegatronCoreSampling, schedule: Schedule, call: dict[str, Any]) -> None:
        """Remember the call's keywords; they are passed on as they came, but for what a pass changes."""
        self._sampling, self._schedule, self._call = sampling, schedule, call
        self.loss_source = sampling.loss_source
        self._chunks: list[torch.nn.Module] = (
            list(call["model"]) if isinstance(call["model"], list | tuple) else [call["model"]]
        )
        self._scored = False

    def score(self, positions: Int64) -> Float32 | None:
        """Forward-only pass in evaluation mode; see `Framework.score`."""
        size = self._sampling.engine.config.scorer.micro_batch_size or self._call["micro_batch_size"]
        forward_step, mask_of = self._call["forward_step_func"], self._sampling.loss_mask_of
        watch = OutputWatch(self._chunks) if self._sampling.engine.needs_norm else None

        def scoring_step(*args: Any, **kwargs: Any) -> tuple[Any, Callable[..., Any]]:
            output, loss_func = forward_step(*args, **kwargs)

            def scores_of(out: Tensor, non_loss_data: bool = True) -> Tensor:
                mask, losses_BT = mask_of(loss_func), by_sequence(out, size)
                sums = sequence_sums(losses_BT, mask)
                if watch is None:
                    return sums
                squares_BT = by_sequence(watch.take(), size)
                return torch.cat([sums, norm_sums(losses_BT, mask, squares_BT)[None]])

            return output, scores_of

        with traceless(self._chunks), torch.no_grad(), watch or nullcontext():
            found = self._run(
                positions,
                size,
                tokens=self._scored_tokens,
                forward_step_func=scoring_step,
                forward_only=True,
                collect_non_loss_data=True,
            )
        self._scored = True
        return means_of(found, self._sampling.engine.grid)

    def train(self, work: Work) -> Trained:
        """Forward and backward on the chosen sequences; see `Framework.train`."""
        if work.ahead is not None:
            return self._train_merged(work, work.ahead)
        found: list[Tensor] = []
        step = self._call["forward_step_func"]
        if work.capture or work.weights is not None:
            step = self._watching(step, work, found)
        size = self._call["micro_batch_size"]
        with parameters_gathered(self._chunks, self._scored):
            result = self._run(work.positions, size, forward_step_func=step)
        return Trained(result, means_of(found, self._sampling.engine.grid) if work.capture else None)

    def _train_merged(self, work: Work, ahead: MetaBatch) -> Trained:
        """The same, and forward passes over the next meta-batch, in one call of the schedule."""
        engine, size = self._sampling.engine, self._call["micro_batch_size"]
        rows = merged_size(engine.config, self._call["seq_length"], size)
        order = merged_order(len(work.positions) // size, len(engine.own) // rows)
        step, mask_of = self._call["forward_step_func"], self._sampling.loss_mask_of
        train_step = step if work.weights is None else self._watching(step, work, [])
        merged = MergedCall(self._chunks, order, train_step, step, mask_of, rows if rows != size else None)
        packed = None
        if self._sampling.feed is not None:
            early = early_micro_batches(self._sampling.feed, ahead, engine.own, rows, self._scored_tokens)
            packed = early[: order.before] + self._sampling.feed.micro_batches(work.positions, size)
            packed += early[order.before :]
        changes = {"num_microbatches": len(order.trains), "forward_step_func": merged.step}
        with merged.watching(), parameters_gathered(self._chunks, self._scored):
            found = self._schedule(**{**self._call, **changes, "data_iterator": self._each_chunk(packed)})
        result, scored = merged.split(found)
        return Trained(result, None, join(scored))

    def _watching(self, forward_step: Callable[..., Any], work: Work, found: list[Tensor]) -> Callable[..., Any]:
        """Wrap the forward step: note each sequence's loss, and weight it, before the user's own loss function."""
        mask_of, size, weights = self._sampling.loss_mask_of, self._call["micro_batch_size"], work.weights

        def watching_step(*args: Any, **kwargs: Any) -> tuple[Any, Callable[..., Any]]:
            output, loss_func = forward_step(*args, **kwargs)

            def watching_loss(out: Tensor, *rest: Any, **named: Any) -> Any:
                start, losses_BT = len(found) * size, by_sequence(out, size)
                found.append(sequence_sums(losses_BT, mask_of(loss_func), self._scored_tokens))
                if weights is not None:
                    weight = torch.as_tensor(weights[start : start + size], dtype=out.dtype, device=out.device)
                    out = (losses_BT * weight[:, None]).reshape(out.shape)
                return loss_func(out, *rest, **named)

            return output, watching_loss

        return watching_step

    @property
    def _scored_tokens(self) -> int:
        return self._sampling.engine.scorer.tokens(self._call["seq_length"])

    def _run(self, positions: Int64, size: int, *, tokens: int | None = None, **changes: Any) -> Any:
        """Call upstream's schedule over some positions; keywords pass through but for the ones that change."""
        call = {**self._call, "num_microbatches": len(positions) // size, "micro_batch_size": size, **changes}
        length = self._call["seq_length"]
        shorter = tokens if tokens is not None and tokens < length else None
        if shorter is not None:
            names = ("seq_length", "decoder_seq_length")
            call.update({name: shorter for name in names if self._call.get(name) == length})
        call["data_iterator"] = self._iterators(positions, size, shorter)
        return self._schedule(**call)

    def _iterators(self, positions: Int64, size: int, tokens: int | None) -> Any:
        feed = self._sampling.feed
        packed = None if feed is None else feed.micro_batches(positions, size)
        if packed is not None and tokens is not None:
            packed = [shortened(batch, tokens) for batch in packed]
        return self._each_chunk(packed)

    def _each_chunk(self, packed: list[dict[str, Tensor]] | None) -> Any:
        """An iterator over micro-batches for each model chunk, as the schedule was given them."""
        if not isinstance(self._call["data_iterator"], list) and len(self._chunks) == 1:
            return None if packed is None else iter(packed)
        return [None if packed is None else iter(packed) for _ in self._chunks]


@contextmanager
def parameters_gathered(chunks: list[torch.nn.Module], gathered: bool) -> Generator[None]:
    """Keep an interleaved schedule from gathering parameters again after the scoring pass has done so."""
    configs = [config for chunk in chunks if (config := getattr(chunk, "config", None)) is not None]
    before = [(config, config.param_sync_func) for config in configs if hasattr(config, "param_sync_func")]
    if gathered:
        for config, _ in before:
            config.param_sync_func = None
    try:
        yield
    finally:
        for config, function in before:
            config.param_sync_func = function


def reads_data(model_config: Any) -> bool:
    """Whether the forward step of this stage asks for data.

    The first and the last stage do, and those that a `pipeline_model_parallel_layout` gives layers of multi-token
    prediction (`mtp_on_this_rank` of Megatron-Core 0.16 and later).
    """
    layout = getattr(getattr(model_config, "pipeline_model_parallel_layout", None), "layout", None)
    own: Any = [] if layout is None else layout[parallel_state.get_pipeline_model_parallel_rank()]
    ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return ends or any(layer.name == "mtp" for chunk in own for layer in chunk)


def attach(  # noqa: PLR0913 - one call says all
    config: EvolvedSamplingConfig,
    manifest: Manifest,
    rows: Rows | None,
    *,
    model_config: Any,
    global_batch_size: int,
    micro_batch_size: int,
    train_samples: int,
    workers: int = 0,
    prefetch: int = 2,
    loss_mask_of: LossMaskOf = mask_of_partial,
    warm_start: WarmStart = start_with_scores,
    optimizer: Any = None,
    ramp: Ramp | None = None,
) -> MegatronCoreSampling:
    """Attach Evolved Sampling to a Megatron-Core run; collective, after `parallel_state` is initialised.

    Args:
        config: settings.
        manifest: the blend.
        rows: its samples by id; only read on the stages that `reads_data`.
        model_config: the model's `TransformerConfig`.
        global_batch_size: the meta-batch, B.
        micro_batch_size: sequences in a training micro-batch.
        train_samples: draws of the plain run.
        workers: loader processes per rank.
        prefetch: meta-batches a worker reads ahead.
        loss_mask_of: finds the loss mask in what the forward step returns.
        warm_start: see `EvolvedSampling`.
        optimizer: the loop's; its `step` then closes every iteration, and `finish` must not be called. None: call it.
        ramp: sizes of meta-batches where they grow to `global_batch_size` at first; None: all are of that size.

    Raises:
        ConfigError, LayoutError: what cannot work, before the first iteration.
    """
    check_model(model_config, config)
    sizes, (grid, source) = ramp or Ramp(global_batch_size), rank_grid_of_parallel_state()
    check_context(manifest.seq_length, grid.cp_size)
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    multiple = pipeline if virtual > 1 else 1
    sizes.check(micro_batch_size * grid.dp_size * multiple, "rampup_batch_size")
    engine = EvolvedSampling(
        config,
        manifest,
        grid,
        meta_batch=sizes,
        micro_batch=micro_batch_size,
        train_samples=train_samples,
        micro_batch_multiple=multiple,
        warm_start=warm_start,
    )
    _check_sizes(engine, pipeline, virtual)
    feed = _feed_of(engine, rows, model_config, workers, prefetch)
    sampling = MegatronCoreSampling(engine, feed, source, loss_mask_of)
    if optimizer is not None:
        sampling.finish_with(optimizer)
    return sampling


def _feed_of(
    engine: EvolvedSampling, rows: Rows | None, model_config: Any, workers: int, prefetch: int
) -> MetaBatchFeed | None:
    check_packing(engine.config, rows, engine.grid)
    lag = engine.epochs.read_ahead(workers * prefetch)
    if rows is None or not reads_data(model_config):
        return None
    return MetaBatchFeed(rows, engine.sampler, engine.own, workers=workers, prefetch=prefetch, mask_lag=lag)


def _check_sizes(engine: EvolvedSampling, pipeline: int, virtual: int) -> None:
    """Refuse sizes that the schedules cannot be called with."""
    own, multiple = len(engine.own), pipeline if virtual > 1 else 1
    check_micro_batches(engine.plan, engine.micro_batch * engine.grid.dp_size, pipeline, virtual)
    check_merged(engine.config, engine.manifest.seq_length, own, engine.micro_batch, multiple)
    check_scoring_size(engine.config, own, pipeline, virtual)
    warn_without_stages(engine.scorer)
