"""Settings of Megatron-Bridge that Evolved Sampling does not go with, beside those of Megatron-LM."""

from __future__ import annotations

from es_megatron.refusals.table import Refusal

MEGATRON_BRIDGE: tuple[Refusal, ...] = (
    Refusal("rampup_batch_size", "a batch that grows has not been tried there", cure="use Megatron-LM for that"),
    Refusal("num_epochs", "the epochs are planned", cure="give `train.train_iters`"),
    Refusal("peft", "adapters train on few passes over little data, which has not been tried"),
    Refusal("non_persistent_save_interval", "scores are saved with persistent checkpoints only there"),
)
"""Settings of Megatron-Bridge beside those of Megatron-LM."""
