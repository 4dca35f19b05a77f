"""Losses of a reference by Megatron-LM itself: any model that its training script builds, from any checkpoint it loads.

The run loads, and its first training call scores every row of the training data instead, and ends the process.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from typing_extensions import override

from es_megatron.checkpoint.agreement import compute_on_first
from es_megatron.checkpoint.row_scoring import RowScoring, about_losses, told
from es_megatron.errors import ConfigError
from es_megatron.frameworks.arguments import read_switches
from es_megatron.frameworks.feed import MetaBatchFeed, collate
from es_megatron.frameworks.megatron_core import MegatronCoreSampling, ScheduleCall, attach
from es_megatron.frameworks.megatron_lm import Dialect, open_data, read_manifest
from es_megatron.frameworks.megatron_lm_data import UnreadLoader
from es_megatron.frameworks.megatron_lm_settings import loaded_iteration, sized_by_call
from es_megatron.frameworks.scoring import padded
from es_megatron.scoring.scorers import settings_of_pass

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class RowFeed(MetaBatchFeed):
    """Rows by id: what a scoring pass takes for positions are ids."""

    @override
    def micro_batches(self, positions: Int64, size: int, iteration: int | None = None) -> list[Any]:
        """Read rows, int64[k * size], as k dicts of tensors `[size, T]`."""
        rows = [self._rows[int(row)] for row in positions]
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


@dataclass
class Job:
    """What is to be scored in this process."""

    args: Namespace
    dialect: Dialect
    output: Path
    sampling: MegatronCoreSampling
    """Makes the passes; its scores are not used."""


_job: Job | None = None


def start(dialect: Dialect) -> bool:
    """Check what is asked for once Megatron's process groups stand; collective. False: to train, not to score.

    Raises:
        EsError: on every rank, what cannot work.
    """
    global _job  # noqa: PLW0603
    args: Namespace = importlib.import_module(dialect.home).get_args()
    switches = read_switches(args)
    if switches.config is None or switches.score_reference is None:
        return False
    config = settings_of_pass(switches.config)
    dialect.check(args, config)
    if not args.load:
        raise ConfigError("`--load` must name the checkpoint to score with, with `--es-score-reference`. Give it.")
    if getattr(args, "skip_train", False):
        raise ConfigError("`--skip-train` must be left out with `--es-score-reference`, which takes training's place.")
    args.exit_on_missing_checkpoint = True  # or Megatron would go on with weights at random
    sampling = attach(
        config,
        read_manifest(dialect, args),
        None,
        model_config=dialect.model_config(args),
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        train_samples=args.global_batch_size,
    )
    _job = Job(args, dialect, switches.score_reference, sampling)
    return True


def loaded(iteration: int) -> None:
    """Have Megatron's loop make one more training call, even if the run that it has loaded is over."""
    if _job is not None:
        _job.args.train_iters = max(_job.args.train_iters, iteration + 1)


def take_training_data(dataset: Any) -> Any:
    """Have upstream's training dataset make our rows; on ranks that have one."""
    if _job is None or dataset is None:
        return dataset
    sampling = _job.sampling
    if sampling.feed is None:
        rows = open_data(_job.dialect, _job.args)[1]
        made = _job.dialect.make_samples(sampling.engine.manifest, rows, dataset)
        sampling.feed = RowFeed(made, sampling.engine.sampler, sampling.engine.own)
    return UnreadLoader(len(dataset))


def wrap_schedule(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Score at the first training call of a schedule, and end the process; forward-only calls pass through."""
    if _job is None:
        return schedule
    job = _job

    def score_or_pass(**call: Any) -> Any:
        if call.get("forward_only", False):
            return schedule(**call)
        _score(job, sized_by_call(schedule, job.args), call)
        dist.barrier()
        sys.exit(0)

    return score_or_pass


def _score(job: Job, schedule: Callable[..., Any], call: dict[str, Any]) -> None:
    engine, source = job.sampling.engine, job.sampling.loss_source
    args, grid = job.args, engine.grid
    iteration = loaded_iteration(args)
    checkpoint = Path(args.load) / ("release" if iteration is None else f"iter_{iteration:07d}")
    tokens = engine.scorer.tokens(args.seq_length)
    about = compute_on_first(grid, f"read {checkpoint}", lambda: about_losses(Path(args.load), checkpoint, tokens))
    size = engine.config.scorer.micro_batch_size or args.micro_batch_size
    multiple = size * (args.pipeline_model_parallel_size if args.virtual_pipeline_model_parallel_size else 1)

    def losses_of(ids: Int64, share: int) -> Float32:
        scored = padded(ids, share, multiple)
        found = ScheduleCall(job.sampling, schedule, call).score(scored)
        own = np.zeros(len(scored), np.float32) if found is None else found
        return grid.broadcast_over_mp(own, source)[: len(ids)]

    def say(text: str) -> None:
        print(f"es: {text}", flush=True)

    done = RowScoring(grid, engine.manifest, losses_of, job.output, about, say).run()
    if grid.world_rank == 0:
        say(told(job.output, done))
        say(f"choose by it: --es-reference {job.output} --es-selection-policy reducible")
