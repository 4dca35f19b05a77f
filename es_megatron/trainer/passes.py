"""Passes of the trainer outside of training: evaluation by domain, and the timing of forward and backward."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from es_megatron.algorithm.evolution import NO_LOSS
from es_megatron.core.plan import Layout
from es_megatron.frameworks.feed import Rows, collate
from es_megatron.frameworks.megatron_core import mask_of_partial
from es_megatron.frameworks.scoring import means_of, padded, sequence_sums, traceless
from es_megatron.rank_grid import RankGrid
from es_megatron.trainer.model import forward_step
from es_megatron.trainer.settings import PretrainSettings

Chunks = list[DistributedDataParallel]
Float32 = npt.NDArray[np.float32]
MicroBatches = list[dict[str, Tensor]]

TIMED_TURNS = 4


class BarePasses(Protocol):
    """The passes of a backend by themselves, without Evolved Sampling around them."""

    @property
    def settings(self) -> PretrainSettings:
        """Of the run."""
        ...

    @property
    def grid(self) -> RankGrid:
        """This rank's place."""
        ...

    @property
    def loss_source(self) -> int:
        """Model-parallel rank that computes losses."""
        ...

    def score(self, micro_batches: MicroBatches) -> Float32 | None:
        """Mean token loss of each sequence, forward only; None on ranks without losses."""
        ...

    def train(self, micro_batches: MicroBatches) -> None:
        """Forward and backward, leaving no trace but gradients."""
        ...


class SchedulePasses(NamedTuple):
    """Passes through Megatron-Core's schedule."""

    settings: PretrainSettings
    chunks: Chunks
    schedule: Callable[..., Any]
    """Megatron-Core's own forward-backward function."""
    grid: RankGrid
    loss_source: int

    def run(self, micro_batches: MicroBatches, **changes: Any) -> Any:
        """Call the schedule on micro-batches that every data-reading rank has."""
        size, tokens = micro_batches[0]["tokens"].shape
        single = len(self.chunks) == 1
        return self.schedule(
            forward_step_func=changes.pop("forward_step_func", forward_step),
            data_iterator=iter(micro_batches) if single else [iter(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=tokens,
            micro_batch_size=size,
            **changes,
        )

    def score(self, micro_batches: MicroBatches) -> Float32 | None:
        """Mean token loss of each sequence by a forward-only schedule; None on ranks without losses."""

        def scoring_step(*args: Any, **kwargs: Any) -> Any:
            output, loss_func = forward_step(*args, **kwargs)
            return output, lambda out, non_loss_data=True: sequence_sums(out, mask_of_partial(loss_func))

        with traceless(list(self.chunks)), torch.no_grad():
            found = self.run(
                micro_batches, forward_step_func=scoring_step, forward_only=True, collect_non_loss_data=True
            )
        return means_of(found, self.grid)

    def train(self, micro_batches: MicroBatches) -> None:
        """Forward and backward by the schedule that training uses, leaving no trace but gradients."""
        with traceless(list(self.chunks)):
            for chunk in self.chunks:
                chunk.train()
            self.run(micro_batches)


def evaluate(passes: BarePasses, domains: Mapping[str, Rows]) -> dict[str, float]:
    """Mean validation loss of each domain in nats per token; collective.

    Args:
        passes: what a pass needs.
        domains: validation rows by name; the first `eval_samples` of each are used.

    Returns:
        The same on every rank.
    """
    settings, grid = passes.settings, passes.grid
    losses: dict[str, float] = {}
    for name, rows in domains.items():
        count = min(settings.training.eval_samples, len(rows))  # pyright: ignore[reportArgumentType]
        if count == 0:
            continue
        mine = np.arange(grid.dp_rank, count, grid.dp_size)
        own = losses_of_rows(passes, rows, mine, math.ceil(count / grid.dp_size))
        own = own[own != NO_LOSS]
        total = grid.sum_over_dp(np.asarray([own.sum(dtype=np.float64), len(own)]))
        losses[name] = float(total[0] / total[1]) if total[1] else math.nan
    return losses


def losses_of_rows(
    passes: BarePasses, rows: Rows, mine: npt.NDArray[np.int64], share: int, tokens: int | None = None
) -> Float32:
    """Mean token loss of rows, forward only; collective over the ranks of one copy of the model.

    Args:
        passes: what a pass needs.
        rows: samples by number.
        mine: int64[N], numbers of this data-parallel rank's.
        share: >= N, for how many the pass is made: the same on every rank where experts are spread over them.
        tokens: first tokens of a row that count; None: all.

    Returns:
        float32[N], the same on every rank of the copy; `NO_LOSS` where all tokens of a row are masked.
    """
    settings = passes.settings
    size = settings.training.micro_batch_size
    multiple = size * (settings.parallel.pipeline if settings.parallel.chunks > 1 else 1)
    samples = [rows[int(row)] for row in padded(mine, share, multiple)]
    micro_batches = [collate(samples[start : start + size]) for start in range(0, len(samples), size)]
    if tokens is not None:
        micro_batches = [{name: each[:, :tokens] for name, each in batch.items()} for batch in micro_batches]
    found = passes.score(micro_batches)
    own = np.zeros(len(samples), np.float32) if found is None else found
    return passes.grid.broadcast_over_mp(own, passes.loss_source)[: len(mine)]


def calibrate(passes: BarePasses, zero: Callable[[], None]) -> Layout:
    """Time forward and backward of this model on this layout; collective, leaves no trace.

    Args:
        passes: what a pass needs.
        zero: zeroes the gradients.

    Returns:
        The layout with measured times in seconds, the same on every rank.
    """
    settings, parallel = passes.settings, passes.settings.parallel
    dp_size = passes.grid.dp_size
    own = settings.training.global_batch_size // dp_size
    train_size = settings.training.micro_batch_size
    score_size = settings.evolved_sampling.scorer.micro_batch_size or train_size
    layout = Layout(own // train_size, own // score_size, parallel.pipeline, parallel.chunks)
    few = 4 * parallel.pipeline
    train_count, score_count = min(few, layout.micro_batches), min(few, layout.scoring_micro_batches)
    train_batches = [dummy_batch(settings, train_size) for _ in range(train_count)]
    score_batches = [dummy_batch(settings, score_size) for _ in range(score_count)]
    forward, both, scoring = quickest(
        passes,
        zero,
        [
            lambda: passes.score(train_batches),
            lambda: passes.train(train_batches),
            lambda: passes.score(score_batches),
        ],
    )
    forward, both = forward / layout.pass_time(train_count, 1.0), both / layout.pass_time(train_count, 1.0)
    return dataclasses.replace(
        layout,
        forward=forward,
        backward=max(both - forward, 0.0),
        scoring_forward=scoring / layout.pass_time(score_count, 1.0),
    )


def quickest(passes: BarePasses, zero: Callable[[], None], runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Least seconds of each run on all stages; in turns, so that a slow spell of the machine falls on all of them."""
    best = np.full(len(runs), np.inf)
    for turn in range(TIMED_TURNS + 1):
        for at, run in enumerate(runs):
            zero()
            passes.grid.barrier()
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            passes.grid.barrier()  # a pass is over when its last stage is
            if turn > 0:  # the first one pays for what is made once
                best[at] = min(best[at], time.perf_counter() - begin)
    zero()
    return passes.grid.broadcast(best).tolist()


def dummy_batch(settings: PretrainSettings, size: int) -> dict[str, Tensor]:
    """A micro-batch of one repeated token: its cost is that of any other."""
    tokens = torch.ones(size, settings.model.seq_length, dtype=torch.int64)
    positions = torch.arange(settings.model.seq_length).expand(size, -1).contiguous()
    return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape), "position_ids": positions}


def reported_loss(results: Sequence[Mapping[str, Tensor]]) -> tuple[float, int]:
    """Sum and count of the `lm loss` that a training call reports; (0, 0) on ranks without losses."""
    values = [float(result["lm loss"]) for result in results]
    return sum(values), len(values)
