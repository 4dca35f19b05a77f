"""Megatron-Core as the framework of a run: its model, data-parallel wrapper, optimizer, schedules and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from typing_extensions import override

from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.core.plan import Layout
from es_megatron.frameworks.feed import Rows
from es_megatron.frameworks.megatron_core import attach
from es_megatron.frameworks.megatron_data import LoadedBlend
from es_megatron.frameworks.rate import scaled_rate
from es_megatron.trainer.backend import Backend, Iteration
from es_megatron.trainer.model import build_model, forward_step, settled_weights, transformer_config
from es_megatron.trainer.model_state import load_model, load_weights, save_model
from es_megatron.trainer.optimizer import (
    build_optimizer,
    build_scheduler,
    learning_rate,
    step,
    take_settings,
    zero_gradients,
)
from es_megatron.trainer.passes import SchedulePasses, calibrate, evaluate, reported_loss
from es_megatron.trainer.settings import PretrainSettings


class MegatronBackend(Backend):
    """A model in Megatron-Core's own schedules, with Evolved Sampling attached."""

    def __init__(
        self,
        settings: PretrainSettings,
        blend: LoadedBlend,
        train_samples: int,
        warm_start: WarmStart = start_with_scores,
    ) -> None:
        """Build the model and attach; see `build_backend`."""
        training = settings.training
        self.settings = settings
        self.sampling = attach(
            settings.evolved_sampling,
            blend.manifest,
            blend.rows,
            model_config=transformer_config(settings),
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            train_samples=train_samples,
            workers=settings.data.num_workers,
            prefetch=settings.data.prefetch,
            warm_start=warm_start,
        )
        self.engine, self.loss_source = self.sampling.engine, self.sampling.loss_source
        self.chunks = build_model(settings, blend.vocab_size)
        self.parameters = sum(each.numel() for chunk in self.chunks for each in chunk.parameters())
        self.optimizer = build_optimizer(settings, self.chunks)
        self.scheduler: Any = build_scheduler(settings, self.optimizer, self.engine.plan.schedule.iterations)
        schedule = get_forward_backward_func()
        self.passes = SchedulePasses(settings, self.chunks, schedule, self.engine.grid, self.loss_source)
        self.forward_backward = self.sampling.wrap(schedule)

    @override
    def begin_with(self, weights: Path) -> None:
        load_weights(weights, self.chunks)
        self.optimizer.reload_model_params()  # copies in full precision

    @override
    def iterate(self) -> Iteration:
        training = self.settings.training
        self._zero()
        results: Any = self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=None if len(self.chunks) == 1 else [None for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(self.engine.own) // training.micro_batch_size,
            seq_length=self.settings.model.seq_length,
            micro_batch_size=training.micro_batch_size,
        )
        began = time.perf_counter()
        with scaled_rate(self.optimizer, self.engine.rate_factor):
            succeeded, norm = step(self.optimizer)
            rate = learning_rate(self.optimizer)
        if succeeded:
            self.scheduler.step(1)
        self.sampling.finish(succeeded)
        updating = time.perf_counter() - began
        return Iteration(*reported_loss(results), succeeded, norm, rate, updating)

    @override
    def evaluate(self, domains: Mapping[str, Rows]) -> dict[str, float]:
        with settled_weights(self.chunks):
            return evaluate(self.passes, domains)

    @override
    def calibrate(self) -> Layout:
        return calibrate(self.passes, self._zero)

    @override
    def save(self, directory: Path) -> None:
        with settled_weights(self.chunks):
            save_model(directory, self.chunks, self.optimizer, self.scheduler, self.engine.iteration)

    @override
    def load(self, directory: Path) -> None:
        load_model(directory, self.chunks, self.optimizer, self.scheduler)
        take_settings(self.settings, self.optimizer, self.scheduler)

    def _zero(self) -> None:
        zero_gradients(self.chunks, self.optimizer)
