"""Evolved Sampling in Hugging Face's `Trainer`, on DeepSpeed.

    trainer = EvolvedTrainer(model, args, train_dataset=dataset, seq_length=2048)
    trainer.train()

One optimizer step of the Trainer is one step of Evolved Sampling: the batch that its arguments make (batch size of a
device, accumulation steps, devices) is the meta-batch. Logging, evaluation, checkpoints and callbacks are the
Trainer's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.plan import Plan
from es_megatron.errors import ConfigError
from es_megatron.frameworks.deepspeed_engine import EngineSampling, TokenLosses, huggingface_token_losses
from es_megatron.frameworks.front_door import attach
from es_megatron.frameworks.run_plan import plan_run
from es_megatron.frameworks.samples import OwnBlend, blend_of

try:
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise ConfigError(
        "transformers and accelerate must be installed for `EvolvedTrainer`. Install `es_megatron[huggingface]`."
    ) from error


class EvolvedTrainer(Trainer):
    """A `Trainer` that scores a meta-batch, and trains on the sequences of it that are chosen."""

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        seq_length: int,
        evolved: EvolvedSamplingConfig | None = None,
        weights: Mapping[str, float] | None = None,
        token_losses: TokenLosses = huggingface_token_losses,
        **more: Any,
    ) -> None:
        """Plan the run; `args.max_steps` becomes the plan's, on a copy of the arguments.

        Args:
            model: a causal language model.
            args: with `deepspeed=`. The plain run is `max_steps` steps where that is given, else `num_train_epochs`
                passes over the data.
            seq_length: tokens of a sample, T; shorter ones are padded.
            evolved: settings; None: the `"evolved_sampling"` block of the DeepSpeed configuration.
            weights: where `train_dataset` has several datasets by name: their shares of the draws; None: by size.
            token_losses: gives the losses of tokens `[B, T]` of the engine and a micro-batch.
            more: the Trainer's. `train_dataset` is map-style, or a mapping of names to such; `data_collator` is called
                for one item at a time. Labels are in Hugging Face's way, or missing, and are shifted here.

        Raises:
            ConfigError: no DeepSpeed, or something that this cannot do.
            DataError: the dataset cannot be trained on.
        """
        super().__init__(model, copy.copy(args), **more)
        self._check()
        given: Any = self.train_dataset
        datasets: dict[str, Any] = given if isinstance(given, dict) else {"train": given}
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        self.blend: OwnBlend = blend_of(datasets, seq_length, weights=weights, collate=collate, shift_labels=True)
        self.token_losses = token_losses
        own, settings = self.args, self.args.hf_deepspeed_config.config
        batch = own.world_size * own.per_device_train_batch_size * own.gradient_accumulation_steps
        passes = math.ceil(own.num_train_epochs * self.blend.manifest.total)
        self.train_samples: int = own.max_steps * batch if own.max_steps > 0 else passes
        self.plan: Plan = plan_run(
            self.blend,
            train_samples=self.train_samples,
            deepspeed=settings,
            config=evolved,
            global_batch_size=batch,
            micro_batch_size=own.per_device_train_batch_size,
            data_parallel=own.world_size,
        )
        own.max_steps = self.plan.iterations

    def _check(self) -> None:
        """Refuse what would be passed over in silence.

        Raises:
            ConfigError: names it.
        """
        if not self.is_deepspeed_enabled or getattr(self.args, "hf_deepspeed_config", None) is None:
            raise ConfigError("`TrainingArguments` must have `deepspeed=` for `EvolvedTrainer`: its engine is needed.")
        if self.train_dataset is None:
            raise ConfigError("`train_dataset` must be given to `EvolvedTrainer`, which plans the run by its size.")
        opposed = {
            "label_smoothing_factor": bool(self.args.label_smoothing_factor),
            "compute_loss_func": self.compute_loss_func is not None,
            "auto_find_batch_size": self.args.auto_find_batch_size,
            "model.config.output_router_logits": getattr(
                getattr(self.model, "config", None), "output_router_logits", False
            ),
        }
        for name in (name for name, on in opposed.items() if on):
            raise ConfigError(
                f"`{name}` must be off with `EvolvedTrainer`, which trains by the loss of each token alone, in batches "
                "of a fixed size. Switch it off."
            )

    @property
    def deepspeed(self) -> Any:
        """The engine; the Trainer sets it as soon as it is made, before a checkpoint is loaded."""
        return self._engine

    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        self._engine = engine
        if engine is not None and self.is_in_train:
            self.sampling: EngineSampling = attach(
                engine,
                self.blend,
                train_samples=self.train_samples,
                config=self.plan.config,
                token_losses=self.token_losses,
                per_token=True,
                workers=self.args.dataloader_num_workers,
            )

    @override
    def get_train_dataloader(self) -> DataLoader[Any]:
        """Nothing, as many times as the Trainer asks for a micro-batch: samples are read by the step itself."""
        turns = range(self.plan.iterations * self.args.gradient_accumulation_steps)
        return DataLoader(turns, batch_size=1, collate_fn=nothing)  # pyright: ignore[reportArgumentType]

    @override
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Train on one meta-batch where the Trainer's accumulation ends, do nothing before; gives the mean loss."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        return torch.tensor(float(self.sampling.step()), device=self.args.device)

    @override
    def log(self, logs: dict[str, float], *args: Any, **more: Any) -> None:
        """Log as the Trainer does, with what Evolved Sampling has counted."""
        if "loss" in logs:
            totals = self.sampling.totals
            logs["es_sequences_trained"] = totals.sequences_trained
            logs["es_sequences_scored"] = totals.sequences_scored
            logs["es_skipped_steps"] = totals.skipped
        super().log(logs, *args, **more)


def nothing(_: Any) -> dict[str, Tensor]:
    """A batch without anything in it."""
    return {}
