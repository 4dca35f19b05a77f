"""Arguments of Megatron-DeepSpeed that Evolved Sampling does not go with, beside those of Megatron-LM."""

from __future__ import annotations

from es_megatron.refusals.megatron_lm import DISTILLATION
from es_megatron.refusals.table import Refusal, Setting, is_above_one, is_given


def _two_lengths(setting: Setting) -> bool:
    return is_given(setting("train_tokens")) and (
        is_given(setting("train_samples")) or is_given(setting("train_iters"))
    )


MEGATRON_DEEPSPEED: tuple[Refusal, ...] = (
    Refusal("curriculum_learning_legacy", "it shortens sequences behind the sampler's back"),
    Refusal("data_efficiency_curriculum_learning", "it shortens sequences behind the sampler's back"),
    Refusal("random_ltd", "it drops tokens in training that the score would see"),
    Refusal("kd", DISTILLATION),
    Refusal("mos", DISTILLATION),
    Refusal("compression_training", "compression has not been tried"),
    Refusal(
        "iterations_to_skip",
        "skipped iterations read training data outside the schedule",
        applies=lambda setting: is_given(setting("iterations_to_skip")),
    ),
    Refusal("rampup_batch_size", "a batch that grows has not been tried there", cure="use Megatron-LM for that"),
    Refusal(
        "train_tokens",
        "the run would end at the shorter of two lengths, and one is planned",
        cure="drop `--train-tokens` and keep `--train-samples` or `--train-iters`, set to tokens / sequence length "
        "(/ global batch size) where the tokens would have ended the run",
        must="left out beside `--train-samples` or `--train-iters`",
        applies=_two_lengths,
    ),
    Refusal("train_data_exact_num_epochs", "the epochs are planned"),
    Refusal(
        "num_experts",
        "mixtures of experts have not been tried there",
        cure="use Megatron-LM for those",
        must="1",
        applies=lambda setting: is_above_one([setting("num_experts"), setting("num_moe_experts")]),
    ),
    Refusal(
        "ds_sequence_parallel_size",
        "ranks that share a sequence are not told apart there, and its losses would be spread over them",
        cure="use tensor or pipeline parallelism, or Megatron-LM with context parallelism",
        must="1",
        applies=lambda setting: is_above_one([setting("ds_sequence_parallel_size"), setting("context_parallel_size")]),
    ),
    Refusal("return_data_index", "a sample has tokens alone"),
    Refusal("use_dataset_only", "a sample has tokens alone"),
)
"""Arguments of Megatron-DeepSpeed beside those of Megatron-LM."""
