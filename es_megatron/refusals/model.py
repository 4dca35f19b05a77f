"""Settings of a Megatron-Core model that Evolved Sampling does not go with."""

from __future__ import annotations

from collections.abc import Callable

from es_megatron.refusals.table import Refusal, Setting, is_above_one, is_on, words

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


# --- Losses of experts and of multi-token prediction, where scoring micro-batches stand in the training call.


def _divided(name: str) -> Callable[[Setting], bool]:
    return lambda setting: is_on(setting(name)) and not is_on(setting("calculate_per_token_loss"))


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
        "which of a rank's tokens are among the first ones of a sequence is upstream's to say",
        "first tokens",
        "use tensor or pipeline parallelism",
        must="1",
        applies=lambda setting: is_above_one(setting("context_parallel_size")),
    ),
    *(
        Refusal(
            name,
            "the schedule would divide their losses by the micro-batches that score, too",
            "merged",
            "set `calculate_per_token_loss`",
            must="off without `calculate_per_token_loss`",
            applies=_divided(name),
        )
        for name in ("num_moe_experts", "num_experts", "mtp_num_layers")
    ),
    *(
        Refusal(name, "the first micro-batch, which may score, makes the weights in this precision for all", "merged")
        for name in ("fp8", "fp4")
    ),
    *(
        Refusal(name, "its replay of micro-batches that train and that score has not been tried", "merged")
        for name in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph")
    ),
    Refusal(
        "context_parallel_size",
        "ranks that share a sequence have not been tried with it",
        "merged",
        "use tensor parallelism",
        must="1",
        applies=lambda setting: is_above_one(setting("context_parallel_size")),
    ),
    Refusal("defer_embedding_wgrad_compute", "it keeps an input of every forward pass, scoring ones too", "merged"),
    *(
        Refusal(name, "it has not been tried with micro-batches without a backward pass", "merged")
        for name in ("delay_wgrad_compute", "fine_grained_activation_offloading")
    ),
)
"""Settings of a Megatron-Core model (`TransformerConfig`)."""
