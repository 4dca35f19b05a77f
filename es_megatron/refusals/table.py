"""What Evolved Sampling cannot be combined with, and why: one table for run time, `patch --check` and `doctor`.

Each row states for which runs it holds. Most of what a scoring pass would get wrong is no matter to a scorer that makes
none (`history`, `external`, or the arm `uniform`), so that a row that is about the pass holds only where there is one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError
from es_megatron.scoring import arm_of, scorer_of

Setting = Callable[[str], Any]
"""From a setting's name to its value, None where it is not given; numbers, texts, lists, or upstream's enumerations."""

Extent = Literal["order", "selection", "scoring"]

EXTENTS: Mapping[Extent, str] = {
    "order": "with Evolved Sampling",
    "selection": "where fewer sequences are trained",
    "scoring": "with a scoring pass (`fresh`, `prefix`, `every-k`)",
}
"""Runs that a row holds for: all whose data order is ours, those that select, those that make a scoring pass."""

WAYS_OUT: Mapping[Extent, str] = {
    "order": "",
    "selection": ", or use `arm: plain`",
    "scoring": ", or use `scorer: history`, which makes no scoring pass",
}

OFF = ("", "false", "none", "null", "no", "off", "~", "0")
"""Values, as words, that switch a setting off."""


def words(value: Any) -> list[str]:
    """A value as words in lower case: `[CudaGraphScope.attn, "moe"]` and "attn moe" are ["attn", "moe"]."""
    if value is None:
        return []
    if isinstance(value, enum.Enum):
        return words(value.value) if isinstance(value.value, str) else [value.name.lower()]
    if isinstance(value, str):
        return value.lower().replace(",", " ").split()
    if isinstance(value, Sequence):
        return [word for each in value for word in words(each)]  # pyright: ignore[reportUnknownVariableType]
    return [str(value).lower()]


def is_on(value: Any) -> bool:
    """Whether a value switches its setting on."""
    return any(word not in OFF for word in words(value))


def is_given(value: Any) -> bool:
    """Whether an index or a list of them is there, which may be 0."""
    return any(word not in OFF or word == "0" for word in words(value))


def is_above_one(value: Any) -> bool:
    """Whether a size is more than one; a text that is no number may be."""
    return any(word not in (*OFF, "1") for word in words(value))


def block_is_on(config: Mapping[str, Any], name: str) -> bool:
    """Whether a block of a DeepSpeed configuration switches something on, as DeepSpeed reads it."""
    block: Any = config.get(name)
    if not isinstance(block, dict):
        return False
    if name == "compression_training":  # its parts are switched on one by one
        return _any_enabled(block)
    return block.get("enabled", False) is True  # pyright: ignore[reportUnknownMemberType]


def _any_enabled(value: Any) -> bool:
    """Whether `"enabled": true` stands anywhere in nested blocks."""
    if not isinstance(value, dict):
        return False
    return value.get("enabled") is True or any(map(_any_enabled, value.values()))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


@dataclass(frozen=True)
class Refusal:
    """One thing that a run must not have."""

    name: str
    """The setting, as upstream's settings object or argument namespace spells it."""

    why: str
    """What would go wrong."""

    extent: Extent = "order"
    """Runs that it holds for."""

    cure: str = "switch it off"
    """What to do, but for the way out that goes with the extent."""

    must: str = "off"
    """What it must be."""

    default: str | None = None
    """Its value where it is not given, if upstream has one that is not off."""

    applies: Callable[[Setting], bool] | None = None
    """Whether it holds for some settings; None: where the setting is on."""

    def holds(self, setting: Setting) -> bool:
        """Whether a run with these settings has it."""
        return is_on(setting(self.name)) if self.applies is None else self.applies(setting)

    def way_out(self) -> str:
        """The whole cure."""
        return self.cure + WAYS_OUT[self.extent]

    def error(self, setting: Setting, spelled: str) -> ConfigError:
        """What a run that has it is told.

        Args:
            setting: of the run.
            spelled: the name as the user wrote it.
        """
        value = setting(self.name)
        shown = self.default if value is None else (value.value if isinstance(value, enum.Enum) else value)
        cure = self.way_out()
        return ConfigError(
            f"`{spelled}` must be {self.must} {EXTENTS[self.extent]}, but is {shown!r} instead: {self.why}. "
            f"{cure[0].upper()}{cure[1:]}."
        )


def extents_of(config: EvolvedSamplingConfig) -> frozenset[Extent]:
    """Which rows hold for a run: what its arm and scorer make it do."""
    found: set[Extent] = {"order"}
    if arm_of(config).selects:
        found.add("selection")
    if scorer_of(config).makes_passes:
        found.add("scoring")
    return frozenset(found)


def find(rows: Sequence[Refusal], setting: Setting, config: EvolvedSamplingConfig) -> Iterator[Refusal]:
    """Rows that a run breaks, in the table's order."""
    extents = extents_of(config)
    return (row for row in rows if row.extent in extents and row.holds(setting))


def refuse(
    rows: Sequence[Refusal], setting: Setting, config: EvolvedSamplingConfig, spell: Callable[[str], str] = str
) -> None:
    """Refuse a run that breaks a row.

    Args:
        rows: of the table.
        setting: of the run.
        config: of Evolved Sampling.
        spell: from a setting's name to how the user writes it.

    Raises:
        ConfigError: names the setting, why, and the cure.
    """
    for row in find(rows, setting, config):
        raise row.error(setting, spell(row.name))


# --- FP8 and FP4. Of Transformer Engine's recipes `delayed` alone keeps state between passes (a history of maxima per
# tensor, written in evaluation mode too); what a factory of the user's keeps is not known.

STATELESS = {"fp8": ("tensorwise", "blockwise", "mxfp8"), "fp4": ("nvfp4",)}
DEFAULT_RECIPES = {"fp8": "delayed", "fp4": "nvfp4"}
STATELESS_MIXED = ("current_scaling", "subchannel_scaling", "blockwise", "mxfp8", "nvfp4")
"""Parts of the names of Megatron-Bridge's `mixed_precision` that mean one of those recipes."""


def _recipe(setting: Setting, kind: str) -> str | None:
    """The recipe of `fp8` or `fp4`; None where that is off."""
    if not is_on(setting(kind)):
        return None
    return " ".join(words(setting(f"{kind}_recipe"))) or DEFAULT_RECIPES[kind]


def _keeps_history(setting: Setting) -> bool:
    return _recipe(setting, "fp8") == "delayed"


def _unknown_recipe(kind: str) -> Callable[[Setting], bool]:
    return lambda setting: _recipe(setting, kind) not in (None, "delayed", *STATELESS[kind])


def _mixed_precision(setting: Setting) -> bool:
    text = " ".join(words(setting("mixed_precision")))
    quantised = "fp8" in text or "fp4" in text
    return quantised and not any(part in text for part in STATELESS_MIXED) and not is_on(setting("fp8"))


# --- CUDA graphs. Of one layer: `enable_cuda_graph` or `cuda_graph_impl: local` are Megatron's own,
# `external_cuda_graph` or `transformer_engine` are Transformer Engine's. Of a whole iteration: `full_iteration`, an
# implementation in newer versions and a scope in older ones.


def _graphs(setting: Setting) -> bool:
    return any(is_on(setting(name)) for name in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"))


def _whole_iteration(setting: Setting) -> bool:
    places = (setting("cuda_graph_impl"), setting("cuda_graph_scope"), setting("cuda_graph_modules"))
    return _graphs(setting) and "full_iteration" in words(places)


def _graphs_of_stages(setting: Setting) -> bool:
    return _graphs(setting) and is_above_one(setting("pipeline_model_parallel_size"))


def _own_graphs(setting: Setting) -> bool:
    return is_on(setting("enable_cuda_graph")) or "local" in words(setting("cuda_graph_impl"))


def _graph_setting(setting: Setting) -> str:
    """The setting that switches graphs on."""
    names = ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph")
    return next((name for name in names if is_on(setting(name))), names[0])


def _graph_rows(name: str) -> list[Refusal]:
    """Rows about CUDA graphs, for one of the settings that switch them on."""

    def by_this(holds: Callable[[Setting], bool]) -> Callable[[Setting], bool]:
        return lambda setting: _graph_setting(setting) == name and holds(setting)

    return [
        Refusal(
            name,
            "a graph of the whole iteration replays the choice that it was captured with for ever",
            cure="capture single layers instead",
            applies=by_this(_whole_iteration),
        ),
        Refusal(
            name,
            "graphs of several pipeline stages are captured in the order of the plain run's micro-batches",
            "selection",
            must="off with more than one pipeline stage",
            applies=by_this(_graphs_of_stages),
        ),
        Refusal(
            name,
            "once captured, Megatron's own graphs replay the training pass in evaluation mode too, dropout included",
            "scoring",
            "use Transformer Engine's (`cuda_graph_impl: transformer_engine`, before 0.15 `external_cuda_graph`)",
            applies=by_this(_own_graphs),
        ),
    ]


MODEL: tuple[Refusal, ...] = (
    Refusal(
        "fp8_recipe",
        "delayed scaling keeps a history of maxima, which the pass would move",
        "scoring",
        "use `tensorwise`, `blockwise` or `mxfp8`",
        must="`tensorwise`, `blockwise` or `mxfp8`",
        default="delayed",
        applies=_keeps_history,
    ),
    Refusal(
        "fp8_recipe",
        "what this recipe keeps between passes is not known",
        "scoring",
        "use `tensorwise`, `blockwise` or `mxfp8`",
        must="`tensorwise`, `blockwise` or `mxfp8`",
        applies=_unknown_recipe("fp8"),
    ),
    Refusal(
        "fp4_recipe",
        "what this recipe keeps between passes is not known",
        "scoring",
        "use `nvfp4`",
        must="`nvfp4`",
        applies=_unknown_recipe("fp4"),
    ),
    Refusal(
        "mixed_precision",
        "delayed scaling keeps a history of maxima, which the pass would move",
        "scoring",
        "use bf16, or a recipe with current, blockwise or MX scaling",
        must="without delayed scaling",
        applies=_mixed_precision,
    ),
    Refusal(
        "fp8_dot_product_attention",
        "FP8 attention keeps a scaling history of its own whatever the recipe, which the pass would move",
        "scoring",
    ),
    Refusal(
        "fp8_multi_head_attention",
        "FP8 attention keeps a scaling history of its own whatever the recipe, which the pass would move",
        "scoring",
    ),
    Refusal("quant_recipe", "what recipes of single modules keep between passes is not known", "scoring"),
    *_graph_rows("cuda_graph_impl"),
    *_graph_rows("enable_cuda_graph"),
    *_graph_rows("external_cuda_graph"),
    Refusal(
        "overlap_moe_expert_parallel_comm",
        "its combined forward and backward passes have not been tried with fewer micro-batches",
        "selection",
    ),
    Refusal(
        "context_parallel_size",
        "ranks that share a sequence are not told apart yet, and its losses would be spread over them",
        cure="use tensor or pipeline parallelism, with sequence parallelism for long sequences",
        must="1",
        applies=lambda setting: is_above_one(setting("context_parallel_size")),
    ),
)
"""Settings of a Megatron-Core model (`TransformerConfig`)."""


SAME_BATCH = "the meta-batch must stay the same through the run"
UNTRIED = "it has not been tried"
DISTILLATION = "distillation has not been tried"

MEGATRON_LM: tuple[Refusal, ...] = (
    Refusal(
        "rampup_batch_size",
        SAME_BATCH,
        cure="drop it, and begin with the final global batch size (a lower rate or a longer warm-up helps)",
    ),
    Refusal("step_batch_size_schedule", SAME_BATCH),
    Refusal("decrease_batch_size_if_needed", SAME_BATCH),
    Refusal(
        "iterations_to_skip",
        "skipped iterations read training data outside the schedule",
        applies=lambda setting: is_given(setting("iterations_to_skip")),
    ),
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
    Refusal("dataloader_inter_document_masking", "packed sequences have not been tried"),
    Refusal("non_persistent_save_interval", "scores are saved with persistent checkpoints only"),
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

OWN_ORDER = "DeepSpeed's own sampler would choose the samples, and it knows them by index only"

DEEPSPEED: tuple[Refusal, ...] = (
    Refusal("curriculum_learning", "it shortens sequences behind the sampler's back", "selection"),
    Refusal("data_efficiency", OWN_ORDER),
    Refusal("random_ltd", "it drops tokens in training that the score would see", "selection"),
    Refusal("progressive_layer_drop", "the pass would go through other layers than training does", "scoring"),
    Refusal("hybrid_engine", "it is for reinforcement learning, which makes its samples as it goes"),
    Refusal(
        "autotuning",
        "it changes batch sizes from run to run",
        cure="tune first, then use the configuration that it found",
    ),
    Refusal("compression_training", "quantisation and pruning schedules count forward passes", "scoring"),
    Refusal("moe_layers", "DeepSpeed's experts have not been tried with fewer micro-batches", "selection"),
    Refusal(
        "sequence_parallel_size",
        "ranks that share a sequence are not told apart yet, and its losses would be spread over them",
        must="1",
        applies=lambda setting: is_above_one(setting("sequence_parallel_size")),
    ),
)
"""Blocks of a DeepSpeed configuration, and features of its engine."""
