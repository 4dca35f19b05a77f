"""The DeepSpeed side of `benchmarks.step`: several arms over one engine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.step_sizes import MICRO_BATCH, VOCAB
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.plan import Layout, Plan
from es_megatron.data.manifest import Manifest
from es_megatron.frameworks.feed import Rows
from es_megatron.trainer.backends import stop
from es_megatron.trainer.deepspeed_backend import DeepSpeedPasses, attach_rows, build_deepspeed, initialize
from es_megatron.trainer.deepspeed_settings import DeepSpeedSettings
from es_megatron.trainer.passes import calibrate, dummy_batch
from es_megatron.trainer.settings import (
    DataSettings,
    ModelSettings,
    ParallelSettings,
    PretrainSettings,
    TrainingSettings,
)


class DeepSpeedBench:
    """One DeepSpeed engine (ZeRO-1), and Evolved Sampling attached to it for each arm."""

    def __init__(
        self, arguments: argparse.Namespace, arms: Mapping[str, EvolvedSamplingConfig], manifest: Manifest, rows: Rows
    ) -> None:
        """Build model and arms."""
        meta_batch = arguments.micro_batches * MICRO_BATCH
        self.settings = PretrainSettings(
            backend="deepspeed",
            deepspeed=DeepSpeedSettings(zero_stage=1),
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
        engine = build_deepspeed(self.settings, VOCAB)
        samples = arguments.iterations * meta_batch
        self._arms: dict[str, Any] = {}
        for name, config in arms.items():
            options = {"train_samples": samples, "config": config}
            self._arms[name] = attach_rows(self.settings, engine, manifest, rows, options)
            self._arms[name].detach()
        self._passes = DeepSpeedPasses(self.settings, next(iter(self._arms.values())))

    def done(self, name: str) -> bool:
        """Whether an arm's planned run is over."""
        return self._arms[name].engine.done

    def plan(self, name: str) -> Plan:
        """The plan of an arm."""
        return self._arms[name].engine.plan

    def calibrate(self) -> Layout:
        """Time forward and backward alone."""
        return calibrate(self._passes, lambda: None)

    def warm_up(self, name: str) -> None:
        """Run a scoring and a training pass of the arm's size, without a step."""
        own = self._arms[name].engine.own
        batches = [dummy_batch(self.settings, MICRO_BATCH) for _ in range(len(own) // MICRO_BATCH)]
        self._passes.score(batches)
        self._passes.train(batches)

    def step(self, name: str) -> dict[str, float]:
        """One iteration of an arm; the seconds of its parts, the optimizer's step in `train`."""
        self._arms[name].step()
        record: Any = self._arms[name].engine.last
        return {part: record.seconds.get(part, 0.0) for part in ("score", "train", "exchange", "order")}

    def close(self) -> None:
        """Leave the process groups."""
        stop()
