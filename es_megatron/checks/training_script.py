"""What a training script is, by its options and its name: what else than pretraining of a GPT is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from es_megatron.checks.findings import Finding, note, refuse
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.existing_run import ExistingRun
from es_megatron.config_files.shell.traced import shown

CORE = (
    "micro_batch_size",
    "global_batch_size",
    "num_layers",
    "hidden_size",
    "seq_length",
    "train_iters",
    "train_samples",
    "train_tokens",
    "num_attention_heads",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "data_path",
    "train_data_path",
)
"""Options that every run of Megatron has some of."""


@dataclass(frozen=True)
class Task:
    """Something else that a script of Megatron's family does."""

    name: str
    options: tuple[str, ...]
    """Any of them, switched on, shows it."""
    words: tuple[str, ...]
    """Any of them in the file's name shows it."""
    why: str


GENERIC = r"(train|main|finetune|run|pretrain)\.py"
STAGES = ("sft", "rm", "orm", "prm", "dpo", "ppo", "kto", "simpo", "rlhf")
OTHER_MODEL = "its losses and samples are not those of a causal language model"
INFERENCE = Task(
    "inference or evaluation",
    (
        "num_tokens_to_generate",
        "max_tokens_to_generate",
        "out_seq_length",
        "genfile",
        "sample_input_file",
        "output_bert_embeddings",
        "eval_only",
    ),
    ("generate", "generation", "inference", "infer", "serve", "server", "eval", "evaluate", "zeroshot"),
    "nothing is trained",
)
TASKS = (
    Task("BERT", ("bert_no_binary_head", "bert_embedder_type", "short_seq_prob"), ("bert",), OTHER_MODEL),
    Task("T5", ("decoder_seq_length", "decoder_num_layers", "vocab_extra_ids"), ("t5",), OTHER_MODEL),
    Task(
        "a model of images or several kinds of input",
        (
            "img_h",
            "patch_dim",
            "language_model_type",
            "vision_model_type",
            "freeze_ViT",
            "freeze_LM",
            "num_image_tiles",
        ),
        ("vlm", "vision", "vit", "multimodal", "mimo", "llava", "clip"),
        OTHER_MODEL,
    ),
    Task(
        "retrieval",
        ("retro_add_retriever", "retro_project_dir", "ict_head_size", "biencoder_projection_dim", "titles_data_path"),
        ("retro", "ict", "realm", "biencoder", "retrieval", "orqa"),
        OTHER_MODEL,
    ),
    Task(
        "post-training",
        (
            "dpo_beta",
            "reward_model",
            "kd_teacher_load",
            "export_kd_teacher_load",
            "prompt_type",
            "is_instruction_dataset",
            "repeated_dataloader",
        ),
        ("posttrain", "sft", "dpo", "ppo", "grpo", "rlhf", "rl", "reward", "eagle3", "distill", "modelopt"),
        "its samples are prompts or packed conversations from a loader of its own, not rows of a pretraining corpus",
    ),
    INFERENCE,
    Task(
        "a downstream task",
        ("task",),
        ("tasks", "glue", "race", "mnli", "qqp"),
        "its samples are labelled examples from a loader of its own, not rows of a pretraining corpus",
    ),
    Task(
        "conversion or preparation",
        ("target_tensor_parallel_size", "hf2megads", "megads2hf", "pretrained_model_path"),
        ("convert", "preprocess", "checkpoint", "quantize", "prune", "export", "validate", "test"),
        "nothing is trained",
    ),
)


def task_of(run: ExistingRun) -> tuple[Task, str] | None:
    """What else a run is, and what shows it; None for pretraining of a language model."""
    parts = shown(run.script or "").split("/")
    base = parts[-1]
    # Folders are asked about a plain `train.py` only: people keep a `pretrain_gpt.py` in all kinds of folders.
    told = "_".join(parts[-3:] if re.fullmatch(GENERIC, base) else parts[-1:])
    words = re.split(r"[_\W]+", told.lower().removesuffix(".py"))
    for task in TASKS:
        option = next((name for name in task.options if run.on(name)), None)
        if task.name == "post-training" and run.value("stage") in STAGES:
            option = "stage"
        if option is None and any(word in words for word in task.words):
            return task, f"`{base}`"
        if option is not None:
            return task, f"`{option}`" if run.kind == "yaml" else f"`--{option.replace('_', '-')}`"
    inference = next((name for name in run.options if name.startswith("inference_")), None)
    trains = any(run.on(name) for name in ("train_iters", "train_samples", "train_tokens"))
    return (INFERENCE, f"`{inference}`") if inference is not None and not trains else None


def was_read(run: ExistingRun) -> bool:
    """Whether any option of a training run was read, so that something can be said about it."""
    return run.kind == "deepspeed" or any(name in run.options for name in CORE)


def check_script(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """The launch line, what the training script is, and whether its options were read at all."""
    del config
    for reason in run.refused:
        yield refuse(*reason)
    name = shown((run.script or "").rpartition("/")[2])
    found = task_of(run)
    if found is not None:
        task, by = found
        yield refuse(by, f"this is {task.name}: {task.why}", "use a pretraining run of a GPT (`pretrain_gpt.py`)")
    elif run.script is not None and not was_read(run) and not run.refused:
        if run.unread:
            named = ", ".join(f"`${each}`" for each in run.unread)
            yield refuse(
                named,
                "holds the options of the run, and is not known from the file alone, so nothing was checked",
                f"give them with `--set '{run.unread[0]}=--micro-batch-size ...'`, or patch the file that sets them",
            )
        else:
            yield refuse(
                f"`{name}`",
                "is given no option of Megatron, so what it trains is not known",
                "patch the line that starts Megatron's training; `--script NAME.py` says which script that is",
            )
    elif name and name != "pretrain_gpt.py":
        yield note(
            f"`{name}`",
            "only `pretrain_gpt.py` has been tried; its loss function must be `partial(loss_func, loss_mask)` too",
            "try a few iterations, and look at `es kept` in the log",
        )
