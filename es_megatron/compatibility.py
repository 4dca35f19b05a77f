"""What Evolved Sampling cannot be combined with, and why: one place for the run-time check and for reading configs."""

from __future__ import annotations

OFF_VALUES = (None, False, 0, "none")
"""Values of a model setting that switch it off."""

UNSUPPORTED = {
    "fp8": "FP8 keeps scaling history that the scoring pass would move",
    "fp4": "FP4 keeps scaling history that the scoring pass would move",
    "mtp_num_layers": "multi-token prediction adds losses that the score does not see",
    "enable_cuda_graph": "a captured graph is bound to one micro-batch shape and mode",
    "external_cuda_graph": "a captured graph is bound to one micro-batch shape and mode",
    "cuda_graph_impl": "a captured graph is bound to one micro-batch shape and mode",
    "overlap_moe_expert_parallel_comm": "the combined forward-backward schedule has no forward-only pass",
}
"""Fields of Megatron-Core's `TransformerConfig` that must be off -> why."""

CONTEXT_PARALLEL = "losses of one sequence would be spread over ranks"
"""Why the context-parallel size must be 1."""

REFUSED_BY_MEGATRON_DEEPSPEED = {
    "curriculum_learning_legacy": "it shortens sequences behind the sampler's back",
    "data_efficiency_curriculum_learning": "it shortens sequences behind the sampler's back",
    "random_ltd": "it drops tokens in training that the score would see",
    "kd": "distillation has not been tried",
    "mos": "distillation has not been tried",
    "compression_training": "compression has not been tried",
    "train_tokens": "the run's length is planned in iterations",
    "train_data_exact_num_epochs": "the epochs are planned",
    "return_data_index": "a sample has tokens alone",
    "use_dataset_only": "a sample has tokens alone",
}
"""Arguments of Megatron-DeepSpeed that must be off, beside those of Megatron-LM -> why."""
