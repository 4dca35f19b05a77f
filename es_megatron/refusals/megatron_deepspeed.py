"""Arguments of Megatron-DeepSpeed that Evolved Sampling does not go with, beside those of Megatron-LM."""

from __future__ import annotations

from es_megatron.refusals.megatron_lm import DISTILLATION
from es_megatron.refusals.table import Refusal, is_above_one

MEGATRON_DEEPSPEED: tuple[Refusal, ...] = (
    Refusal("curriculum_learning_legacy", "it shortens sequences behind the sampler's back"),
    Refusal("data_efficiency_curriculum_learning", "it shortens sequences behind the sampler's back"),
    Refusal("random_ltd", "it drops tokens in training that the score would see"),
    Refusal("kd", DISTILLATION),
    Refusal("mos", DISTILLATION),
    Refusal("compression_training", "compression has not been tried"),
    Refusal("train_tokens", "the run's length is planned in iterations"),
    Refusal("train_data_exact_num_epochs", "the epochs are planned"),
    Refusal(
        "num_experts",
        "mixtures of experts have not been tried there",
        cure="use Megatron-LM for those",
        must="1",
        applies=lambda setting: is_above_one([setting("num_experts"), setting("num_moe_experts")]),
    ),
    Refusal("return_data_index", "a sample has tokens alone"),
    Refusal("use_dataset_only", "a sample has tokens alone"),
)
"""Arguments of Megatron-DeepSpeed beside those of Megatron-LM."""
