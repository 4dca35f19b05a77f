"""One call of Megatron-Core's own schedule in which some micro-batches train and the others score the next meta-batch.

The schedules skip the backward pass of an output that needs no gradient, so that a scoring micro-batch is an ordinary
one whose forward step runs without autograd. Everything that takes happens in the forward step: it sends zeros upstream
in place of a gradient, starts the reduction of gradients with the last micro-batch that trains, and scales losses to
the number of those, since the schedule divides by all micro-batches of the call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from torch import Tensor

from es_megatron.core.simulation import Order, Times, best_order
from es_megatron.data.sampler import MetaBatch
from es_megatron.errors import ConfigError
from es_megatron.frameworks.feed import MetaBatchFeed
from es_megatron.frameworks.scoring import sequence_losses, shortened, traceless
from es_megatron.scoring import Scorer

LOGGER = logging.getLogger(__name__)

Int64 = npt.NDArray[np.int64]
ForwardStep = Callable[..., tuple[Any, Callable[..., Any]]]
SCORED = "es scored"


class MergedCall:
    """The forward step of such a call, and what came of it."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        order: Order,
        train_step: ForwardStep,
        score_step: ForwardStep,
        mask_of: Callable[[Callable[..., Any]], Tensor],
        rows: int | None = None,
    ) -> None:
        """Take what runs in the call.

        Args:
            chunks: model chunks of this rank, as the schedule is given them.
            order: of its micro-batches.
            train_step: forward step of those that train.
            score_step: the user's own, for those that score.
            mask_of: finds the loss mask in what it returns.
            rows: sequences of a scoring micro-batch, where it has more, shorter ones than a training micro-batch.
        """
        self._trains = order.trains
        self._last_trained = order.before + order.train - 1
        self._flips = order.after > 0
        self._scale = len(self._trains) / order.train
        self._train_step, self._score_step, self._mask_of = train_step, score_step, mask_of
        self._rows = rows
        self._turn = {id(chunk): 0 for chunk in chunks}
        self._inputs: dict[int, list[Any]] = {}
        self._zeros: dict[tuple[Any, ...], Tensor] = {}
        self._holders = {id(chunk): taking_input(chunk) for chunk in chunks}

    @contextmanager
    def watching(self) -> Generator[None]:
        """Note what the schedule gives the chunks of this rank as their input."""
        for holder in self._holders.values():
            holder.set_input_tensor = self._noting(holder, holder.set_input_tensor)
        try:
            yield
        finally:
            for holder in self._holders.values():
                del holder.set_input_tensor  # of the instance; the class has its own

    def step(self, iterator: Any, model: Any, *rest: Any, **named: Any) -> tuple[Any, Callable[..., Any]]:
        """The forward step: of the micro-batch whose turn it is for this chunk."""
        number = self._turn[id(model)]
        self._turn[id(model)] = number + 1
        if not self._trains[number]:
            return self._score(iterator, model, *rest, **named)
        output, loss_func = self._train_step(iterator, model, *rest, **named)
        if self._flips and number == self._last_trained and starts_reduction(model):
            output.register_hook(lambda _: start_reduction_in_backward(model))
        return output, self._scaled(loss_func, model)

    def split(self, result: list[Any]) -> tuple[list[Any], list[Tensor]]:
        """What the schedule returned: of micro-batches that train, and losses of sequences that were scored."""
        trained = [each for each, trains in zip(result, self._trains, strict=False) if trains]
        return trained, [each[SCORED] for each, trains in zip(result, self._trains, strict=False) if not trains]

    def _score(self, iterator: Any, model: Any, *rest: Any, **named: Any) -> tuple[Any, Callable[..., Any]]:
        holder = self._holders[id(model)]
        given = self._inputs.pop(id(holder), [])
        if self._rows is not None and given:
            # as many numbers as stages expect of each other, [s, b, h] in another shape
            type(holder).set_input_tensor(holder, [each.view(-1, self._rows, each.shape[-1]) for each in given])
        with traceless([model]), torch.no_grad():
            output, loss_func = self._score_step(iterator, model, *rest, **named)
        for tensor in given:
            tensor.grad = self._zeros_like(tensor)

        def scored(out: Tensor, *_: Any, **__: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return out.new_zeros(()), {SCORED: sequence_losses(out, self._mask_of(loss_func))}

        return output, scored

    def _scaled(self, loss_func: Callable[..., Any], model: Any) -> Callable[..., Any]:
        """The loss function, whose loss the schedule will divide by all micro-batches of the call."""
        per_token = bool(getattr(getattr(model, "config", None), "calculate_per_token_loss", False))

        def scaled(*args: Any, **named: Any) -> Any:
            found = loss_func(*args, **named)
            if len(found) == 3 and per_token:  # it is divided by tokens, which scoring does not count
                return found
            return (found[0] * self._scale, *found[1:])

        return scaled

    def _noting(self, holder: Any, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def set_input_tensor(given: Any) -> None:
            tensors = given if isinstance(given, list | tuple) else [given]
            self._inputs[id(holder)] = [each for each in tensors if each is not None]
            original(given)

        return set_input_tensor

    def _zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros that all micro-batches share: they are sent, and never written to."""
        key = (tensor.shape, tensor.dtype, tensor.device)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros_like(tensor, requires_grad=False)
        return self._zeros[key]


def merged_order(train: int, score: int) -> Order:
    """The order of a call on this run's pipeline: the best where a backward pass costs two forward passes.

    Args:
        train: micro-batches of a rank that train.
        score: those that score.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    return best_order(pipeline, virtual, train, score, Times())


def warn_without_stages(scorer: Scorer) -> None:
    """Say once that merging saves nothing where nothing is idle; it still works, so that a run may change layouts."""
    if scorer.merges and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        LOGGER.warning("`scorer.overlap: merged` saves nothing without pipeline stages, where nothing is idle")


def early_micro_batches(
    feed: MetaBatchFeed, ahead: MetaBatch, own: Int64, rows: int, tokens: int
) -> list[dict[str, Tensor]]:
    """This rank's share of the next meta-batch, in scoring micro-batches.

    Args:
        feed: samples.
        ahead: the next meta-batch.
        own: positions that this rank loads.
        rows: sequences of a micro-batch.
        tokens: first tokens of a sequence that are scored.
    """
    feed.fetch_ahead(ahead)
    batches = feed.micro_batches(own, rows, ahead.iteration)
    whole = next(iter(batches[0].values())).shape[1] == tokens
    return batches if whole else [shortened(batch, tokens) for batch in batches]


def taking_input(chunk: Any) -> Any:
    """The module inside a chunk's wrappers that takes the input of its stage.

    Raises:
        ConfigError: there is none.
    """
    inner = chunk
    while not hasattr(type(inner), "set_input_tensor"):
        inner = getattr(inner, "module", None)
        if inner is None:
            raise ConfigError(
                "`scorer.overlap` must be `none` with a model without `set_input_tensor`, such as "
                f"{type(chunk).__name__}: its stages cannot be told what scoring micro-batches send back. Leave it out."
            )
    return inner


def bucket_groups(chunk: Any) -> list[Any]:
    """Groups of gradients that Megatron-Core's data-parallel wrapper reduces while the backward pass goes on."""
    settings = getattr(chunk, "ddp_config", None)
    if not getattr(settings, "overlap_grad_reduce", False):
        return []
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def starts_reduction(chunk: Any) -> bool:
    """Whether a chunk's reductions begin by themselves in its last backward pass.

    With `grad_sync_func` the schedules begin them, but on the first stage where stages are not interleaved.
    """
    if not bucket_groups(chunk):
        return False
    if getattr(chunk.config, "grad_sync_func", None) is None:
        return True
    interleaved = (parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1) > 1
    return not interleaved and parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def start_reduction_in_backward(chunk: Any) -> None:
    """Have the backward pass that begins be the last one in the eyes of a chunk's groups of gradients."""
    for group in bucket_groups(chunk):
        group.is_last_microbatch = True
