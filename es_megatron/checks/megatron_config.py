"""Checks of an existing run: what must change before Evolved Sampling can be added, and what is worth knowing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from es_megatron.checks.findings import Finding, note, ok, refuse
from es_megatron.checks.training_script import check_script
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.existing_run import ExistingRun
from es_megatron.config_files.shell.traced import shown
from es_megatron.refusals.megatron_deepspeed import MEGATRON_DEEPSPEED
from es_megatron.refusals.megatron_lm import MEGATRON_LM
from es_megatron.refusals.model import MODEL
from es_megatron.refusals.table import Refusal, find

LOADER_PREFETCH = 2
"""Meta-batches that a loader worker reads ahead."""

READERS = {
    "yaml": (
        "the block does nothing by itself, and Megatron-LM's `--yaml-cfg` does not know it",
        "read it with `es_megatron.config.build` and pass it to `es_megatron.frameworks.megatron_core.attach`",
    ),
    "deepspeed": (
        "the block does nothing by itself: DeepSpeed passes over it",
        "call `attach` of `es_megatron.frameworks.deepspeed_engine` or `.deepspeed_pipe` after `deepspeed.initialize`",
    ),
}
"""Kinds of configs whose block something has to read: why, cure."""
PACKING = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def check(run: ExistingRun, config: EvolvedSamplingConfig) -> list[Finding]:
    """Findings about a run that do not depend on its sizes."""
    groups = (
        check_script,
        check_model,
        check_run,
        check_untried,
        check_data,
        check_moe,
        check_recompute,
        check_precision,
        check_reading,
    )
    return [finding for group in groups for finding in group(run, config)]


def flag(run: ExistingRun, name: str, default: str | None = None) -> str:
    """An option as it stands in the config, with its value, or the one it has where it is not given."""
    values = " ".join(shown(value) for value in run.options.get(name, (default,) if default else ()))
    if run.kind in ("yaml", "deepspeed"):
        return f"`{name}: {values}`"
    spelled = {"num_moe_experts": "num-experts", "fp8": "fp8-format", "fp4": "fp4-format"}.get(name, name)
    return f"`--{spelled.replace('_', '-')}{' ' if values else ''}{values}`"


def refusals(run: ExistingRun, rows: Sequence[Refusal], config: EvolvedSamplingConfig) -> list[Finding]:
    """Rows of the table of refusals that a run breaks; the run itself would refuse the same."""

    def setting(name: str) -> list[str] | bool | None:
        """An option's values; True for one without any."""
        return [shown(value) for value in run.options[name]] or True if name in run.options else None

    found = list(find(rows, setting, config))
    return [refuse(flag(run, row.name, row.default), row.why + told_of(row, config), row.way_out()) for row in found]


def told_of(row: Refusal, config: EvolvedSamplingConfig) -> str:
    """Which setting of Evolved Sampling makes a row hold, where not all of them do."""
    if row.extent == "merged":
        return " (`scorer.overlap: merged` scores in the training pass)"
    return f" (`scorer: {config.scorer.kind}` makes a scoring pass)" if row.extent == "scoring" else ""


def check_model(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Model settings that this arm and scorer cannot live with."""
    found = refusals(run, MODEL, config)
    yield from found
    if not found:
        yield ok("model", "precision, CUDA graphs and parallelism go with this arm and scorer")


def check_run(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Options of the training script that the data order or the schedule cannot live with."""
    found = refusals(run, (*MEGATRON_LM, *(MEGATRON_DEEPSPEED if run.on("deepspeed") else ())), config)
    yield from found
    if not found:
        yield ok("batches", "of one size, without made-up or rewritten samples")
    packing = [name for name in PACKING if run.on(name)]
    if packing:
        yield ok(
            " ".join(flag(run, name) for name in packing),
            "documents are packed by Megatron's own dataset, one epoch each; scores are means over unmasked tokens",
        )


def check_untried(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Options that change what the training script is."""
    for option in ("use_custom_fsdp", "use_legacy_models"):
        if run.on(option):
            yield note(
                flag(run, option), "not tried with Evolved Sampling", "compare a short run against `--es-arm plain`"
            )
    if run.on("use_checkpoint_args"):
        yield note(
            flag(run, "use_checkpoint_args"),
            "the layout may come from the checkpoint, which is not read here",
            "give what differs with `--set NAME=VALUE`",
        )


def check_data(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Loaders, and how far they read ahead."""
    loader = run.value("dataloader_type")
    if loader == "external":
        yield refuse(
            flag(run, "dataloader_type"),
            "batches of your own loader carry no sample ids to keep scores for",
            "use `single` with `--data-path`",
        )
    elif loader in ("cyclic", "batch"):
        yield note(
            flag(run, "dataloader_type"),
            "Evolved Sampling has its own order: every sample of a component once per epoch, shuffled anew each time",
            "none needed; the order will differ from a run without it",
        )
    if not any(name in run.options for name in ("data_path", "train_data_path", "data_args_path")):
        for name in ("train_weighted_split_paths", "train_weighted_split_paths_path"):
            if run.on(name):
                yield refuse(
                    flag(run, name),
                    "these lists of weighted splits, of BigScience's fork, are not read",
                    "give the files and their weights with `--data-path`",
                )
    workers = run.number("num_workers") if run.on("num_workers") else None
    lag = config.order.mask_lag
    if workers is not None and lag is not None and workers * LOADER_PREFETCH > lag:
        yield refuse(
            flag(run, "num_workers"),
            f"{workers} workers reading {LOADER_PREFETCH} batches ahead need kept masks {workers * LOADER_PREFETCH} "
            f"iterations early, but `order.mask_lag` is {lag}",
            "leave `order.mask_lag` out: it follows the loader",
        )


def check_moe(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Mixture of experts: works, but what a score sees is worth knowing."""
    if not run.on("num_moe_experts"):
        return
    if run.on("deepspeed"):
        return  # refused, unless there is one
    yield note(
        flag(run, "num_moe_experts"),
        "scores see the language-model loss without the balancing losses, scoring leaves the experts' counters as "
        "they are, and experts are balanced over the kept sequences only",
        "watch the balancing loss in the first hundred selecting iterations",
    )
    if run.on("moe_expert_capacity_factor") or run.on("moe_token_dropping"):
        name = "moe_expert_capacity_factor" if run.on("moe_expert_capacity_factor") else "moe_token_dropping"
        yield note(
            flag(run, name),
            "dropped tokens make the loss of a sequence depend on its neighbours in the micro-batch: noisier scores",
            "score with the training micro-batch size, or train without dropping",
        )


def check_recompute(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Full recompute makes the backward pass dearer, and skipping it worth more."""
    if run.recomputed > 0:
        names = ("recompute_granularity", "checkpoint_activations", "activations_checkpoint_method")
        yield ok(
            flag(run, next(name for name in names if run.on(name))),
            f"a backward pass costs {2 + run.recomputed:g} forward passes here, which the prediction counts; scoring "
            "recomputes nothing",
        )


def check_precision(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """Loss scaling, dropout."""
    if run.on("fp16") and run.kind != "deepspeed":
        yield note(
            flag(run, "fp16"),
            "an iteration that the loss scaler skips leaves the scores as they were",
            "none needed; bf16 skips none",
        )
    dropout = [name for name in ("hidden_dropout", "attention_dropout") if run.share(name) > 0]
    if dropout:
        named = " ".join(flag(run, name) for name in dropout)
        yield note(named, "scores are taken without dropout, training has it, as in the paper", "none needed")


def check_reading(run: ExistingRun, config: EvolvedSamplingConfig) -> Iterator[Finding]:
    """What reading the config could not decide, and who reads what is written."""
    if run.kind in READERS:
        yield note("`evolved_sampling`", *READERS[run.kind])
    for what, why, cure in run.notes:
        yield note(what, why, cure)
    if run.missing:
        names = ", ".join(f"`{name}`" for name in run.missing)
        example = f"`--set {run.missing[0]}=VALUE`" if run.missing[0].isidentifier() else "`--set NAME=VALUE`"
        yield note(
            names, "not known from the file alone, so sizes that depend on it are not checked", f"give {example}"
        )
    if run.undecided:
        yield note(
            " ".join(f"`{name}`" for name in run.undecided[:8]),
            "set in a branch that may or may not run; read here as if it does",
            "give the variable that decides with `--set NAME=VALUE`",
        )
