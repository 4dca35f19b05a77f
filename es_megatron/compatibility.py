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
    "overlap_moe_expert_parallel_comm": "the combined forward-backward schedule has no forward-only pass per micro-batch",
}
"""Fields of Megatron-Core's `TransformerConfig` that must be off -> why."""

CONTEXT_PARALLEL = "losses of one sequence would be spread over ranks"
"""Why the context-parallel size must be 1."""

UNSUPPORTED_RUN = {
    "rampup_batch_size": "the meta-batch must have one size, or the share of it that is kept has no meaning",
    "mock_data": "made-up samples have no stable identity to keep a score for",
    "fim_data": "fill-in-the-middle rewrites a sample each time it is read, so its score is another sample's",
    "sft": "fine-tuning data is packed by its own dataset, whose samples have no stable identity here",
    "reset_position_ids": "rows are read without document resets",
    "reset_attention_mask": "rows are read without document resets",
    "eod_mask_loss": "rows are read without a mask at document ends",
    "hybrid_context_parallel": CONTEXT_PARALLEL,
    "retro_add_retriever": "retrieval samples carry neighbours that the data order does not know",
    "perform_rl_step": "reinforcement learning makes its samples as it goes",
    "defer_embedding_wgrad_compute": "gradients kept back across micro-batches would miss the schedule's shorter count",
}
"""Options of Megatron-LM's training script that must be off -> why."""
