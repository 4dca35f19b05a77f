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
