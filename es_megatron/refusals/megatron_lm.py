"""Arguments of Megatron-LM that Evolved Sampling does not go with, beside those of the model."""

from __future__ import annotations

from es_megatron.refusals.table import Refusal, is_above_one, is_given, is_on, words

UNTRIED = "it has not been tried"
DISTILLATION = "distillation has not been tried"

MEGATRON_LM: tuple[Refusal, ...] = (
    Refusal("decrease_batch_size_if_needed", "the size of the meta-batch would depend on the number of ranks"),
    Refusal("phase_transition_iterations", "a phase begins anew in its own data order"),
    Refusal("perform_rl_step", "training data is made during the run, so no sample comes back"),
    Refusal("sft", "packed samples are not rows of a one-epoch packing", cure="use the pretraining data path"),
    Refusal(
        "fim_data",
        "samples are transformed at random, so a sample has no identity",
        cure="write the rewritten documents to a corpus of their own once, and train on that",
    ),
    Refusal("mock_data", "there is no text to score", cure="give real data with `--data-path`"),
    Refusal(
        "hybrid_context_parallel",
        "sequences of a batch would be regrouped",
        cure="use tensor or pipeline parallelism",
    ),
    Refusal(
        "dataloader_inter_document_masking",
        "context-parallel ranks share a whole micro-batch of packed rows, not each of them",
        cure="use one of the two",
        must="off with `--context-parallel-size` above 1",
        applies=lambda setting: (
            is_on(setting("dataloader_inter_document_masking")) and is_above_one(setting("context_parallel_size"))
        ),
    ),
    Refusal("dataloader_inter_document_masking", "the documents of a packed row would be cut", "first tokens"),
    Refusal("dataloader_inter_document_masking", "packed rows have not been tried with it", "merged"),
    Refusal(
        "non_persistent_save_interval",
        "checkpoints in memory or on local disks have no folder for scores that other nodes could read",
        cure="give `--non-persistent-ckpt-type global`",
        must="off without `--non-persistent-ckpt-type global`",
        applies=lambda setting: (
            is_on(setting("non_persistent_save_interval")) and words(setting("non_persistent_ckpt_type")) != ["global"]
        ),
    ),
    Refusal("ckpt_convert_format", "a conversion does not train"),
    Refusal("freeze_all_layers", "nothing is trained"),
    Refusal("use_megatron_fsdp", UNTRIED),
    Refusal("use_torch_fsdp2", UNTRIED),
    Refusal("optimizer_cuda_graph", UNTRIED),
    Refusal("moe_expert_rank_capacity_factor", "its wrapper of the schedule has not been tried"),
    Refusal("modelopt_enabled", "distillation and pruning of weights have not been tried"),
    Refusal("logits_load_dir", DISTILLATION),
    Refusal("logits_save_dir", "logits are gathered until the plain run's number of micro-batches is reached"),
    Refusal("vision_pretraining", "only text is supported"),
    Refusal("inprocess_restart", "a restarted run would keep the process groups of the one before"),
    Refusal("yaml_cfg", "flags of the command line are not read with it", cure="give the same settings as flags"),
    Refusal(
        "use_legacy_models",
        "legacy models refresh their FP8 weights by the plain run's number of micro-batches",
        "selection",
        "use the models of Megatron-Core",
        must="off with FP8",
        applies=lambda setting: is_on(setting("use_legacy_models")) and is_on(setting("fp8")),
    ),
    Refusal("te_precision_config_file", "what recipes of single modules keep between passes is not known", "scoring"),
    Refusal("kitchen_config_file", "what recipes of single modules keep between passes is not known", "scoring"),
    Refusal(
        "kitchen_recipe_number",
        "what recipes of single modules keep between passes is not known",
        "scoring",
        applies=lambda setting: is_given(setting("kitchen_recipe_number")),
    ),
)
"""Arguments of Megatron-LM beside those of the model."""
