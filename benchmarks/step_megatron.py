"""The Megatron-Core side of `benchmarks.step`: several arms over one model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from benchmarks.step_sizes import MICRO_BATCH, VOCAB
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.plan import Layout, Plan
from es_megatron.data.manifest import Manifest
from es_megatron.frameworks.feed import Rows
from es_megatron.frameworks.megatron_core import attach
from es_megatron.trainer.model import build_model, forward_step, initialize, shutdown, transformer_config
from es_megatron.trainer.optimizer import build_optimizer, step, zero_gradients
from es_megatron.trainer.passes import SchedulePasses, calibrate
from es_megatron.trainer.settings import (
    DataSettings,
    ModelSettings,
    ParallelSettings,
    PretrainSettings,
    TrainingSettings,
)


class MegatronBench:
    """One model, one optimizer, and an attached engine for each arm."""

    def __init__(
        self, arguments: argparse.Namespace, arms: Mapping[str, EvolvedSamplingConfig], manifest: Manifest, rows: Rows
    ) -> None:
        """Build model and arms."""
        meta_batch = arguments.micro_batches * MICRO_BATCH
        self.settings = PretrainSettings(
            model=ModelSettings(
                num_layers=4,
                hidden_size=arguments.hidden_size,
                num_attention_heads=4,
                seq_length=arguments.seq_length,
            ),
            parallel=ParallelSettings(pipeline=arguments.pipeline[0]),
            data=DataSettings(blend=Path("synthetic")),
            training=TrainingSettings(passes=1.0, global_batch_size=meta_batch, micro_batch_size=MICRO_BATCH),
        )
        initialize(self.settings)
        self.rank = dist.get_rank()
        self.chunks = build_model(self.settings, VOCAB)
        self.optimizer = build_optimizer(self.settings, self.chunks)
        self._schedule = get_forward_backward_func()
        self._arms = {
            name: attach(
                config,
                manifest,
                rows,
                model_config=transformer_config(self.settings),
                global_batch_size=meta_batch,
                micro_batch_size=MICRO_BATCH,
                train_samples=arguments.iterations * meta_batch,
            )
            for name, config in arms.items()
        }
        first = next(iter(self._arms.values()))
        self._passes = SchedulePasses(self.settings, self.chunks, self._schedule, first.engine.grid, first.loss_source)

    def done(self, name: str) -> bool:
        """Whether an arm's planned run is over."""
        return self._arms[name].engine.done

    def plan(self, name: str) -> Plan:
        """The plan of an arm."""
        return self._arms[name].engine.plan

    def calibrate(self) -> Layout:
        """Time forward and backward alone."""
        return calibrate(self._passes, self._zero)

    def warm_up(self, name: str) -> None:
        """Run the arm's forward and backward once, uncounted: its iteration is not finished."""
        self._zero()
        self._forward_backward(name)

    def step(self, name: str) -> dict[str, float]:
        """One iteration of an arm; the seconds of its parts."""
        self._zero()
        self._forward_backward(name)
        succeeded, _ = step(self.optimizer)
        self._arms[name].finish(succeeded)
        record: Any = self._arms[name].engine.last
        return {part: record.seconds.get(part, 0.0) for part in ("score", "train", "exchange", "order")}

    def close(self) -> None:
        """Leave the process groups."""
        shutdown()

    def _zero(self) -> None:
        zero_gradients(self.chunks, self.optimizer)

    def _forward_backward(self, name: str) -> None:
        self._arms[name].wrap(self._schedule)(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.chunks,
            num_microbatches=self.settings.training.global_batch_size // MICRO_BATCH,
            seq_length=self.settings.model.seq_length,
            micro_batch_size=MICRO_BATCH,
        )
