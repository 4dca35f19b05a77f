"""The table of refusals: what run time and `patch --check` make of the same settings, for every scorer."""

from __future__ import annotations

import enum
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from es_megatron.checks.megatron_config import check
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.existing_run import ExistingRun
from es_megatron.errors import ConfigError
from es_megatron.frameworks.megatron_lm_settings import refuse_arguments
from es_megatron.refusals.deepspeed import DEEPSPEED
from es_megatron.refusals.megatron_bridge import MEGATRON_BRIDGE
from es_megatron.refusals.megatron_deepspeed import MEGATRON_DEEPSPEED
from es_megatron.refusals.megatron_lm import MEGATRON_LM
from es_megatron.refusals.model import MODEL
from es_megatron.refusals.table import find, is_on, words
from tests.es_config import es_config

PASSES = ("fresh", "prefix", "every-k")
NO_PASS = ("history", "external", "uniform")
ALL = (*PASSES, *NO_PASS)
NONE: tuple[str, ...] = ()


class Scope(enum.Enum):
    """As upstream's `CudaGraphScope`."""

    full_iteration = 1
    attn = 2


# settings -> scorers (or the arm `uniform`) that are refused with them
CASES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, NONE),
    ({"fp8": "hybrid"}, PASSES),
    ({"fp8": "e4m3", "fp8_recipe": "delayed"}, PASSES),
    ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, NONE),
    ({"fp8": "hybrid", "fp8_recipe": "blockwise", "fp8_param_gather": True}, NONE),
    ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, NONE),
    ({"fp8": "hybrid", "fp8_recipe": "custom"}, PASSES),
    ({"fp8": "hybrid", "fp8_recipe": "of-next-year"}, PASSES),
    ({"fp8": None, "fp8_recipe": "delayed"}, NONE),
    ({"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_multi_head_attention": True}, PASSES),
    ({"fp8_dot_product_attention": True}, PASSES),
    ({"fp4": "e2m1"}, NONE),
    ({"fp4": "e2m1", "fp4_recipe": "nvfp4"}, NONE),
    ({"fp4": "e2m1", "fp4_recipe": "custom"}, PASSES),
    ({"mixed_precision": "bf16_with_fp8_delayed_scaling_mixed"}, PASSES),
    ({"mixed_precision": "bf16_with_fp8_current_scaling_mixed"}, NONE),
    ({"mixed_precision": "bf16_with_mxfp8_mixed"}, NONE),
    ({"mixed_precision": "bf16_mixed"}, NONE),
    ({"quant_recipe": "a.yaml"}, PASSES),
    ({"kitchen_recipe_number": 0}, PASSES),
    ({"iterations_to_skip": [0]}, NONE),
    ({"rampup_batch_size": [16, 16, 300]}, NONE),
    ({"non_persistent_save_interval": 5, "non_persistent_ckpt_type": "global"}, NONE),
    ({"non_persistent_save_interval": 5, "non_persistent_ckpt_type": "local"}, ALL),
    ({"dataloader_inter_document_masking": True}, ("prefix",)),
    ({"cuda_graph_impl": "transformer_engine", "pipeline_model_parallel_size": "$STAGES"}, ALL),
    ({"te_precision_config_file": "a.yaml"}, PASSES),
    ({"use_legacy_models": True}, NONE),
    ({"use_legacy_models": True, "fp8": "hybrid", "fp8_recipe": "tensorwise"}, ALL),
    ({"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}, NONE),
    ({"cuda_graph_impl": "none"}, NONE),
    ({"cuda_graph_impl": "transformer_engine"}, NONE),
    ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn", "moe_router"]}, NONE),
    ({"cuda_graph_impl": "transformer_engine", "pipeline_model_parallel_size": 1}, NONE),
    ({"cuda_graph_impl": "transformer_engine", "pipeline_model_parallel_size": 2}, ALL),
    ({"cuda_graph_impl": "local"}, PASSES),
    ({"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]}, PASSES),
    ({"cuda_graph_impl": "local", "pipeline_model_parallel_size": 4}, ALL),
    ({"cuda_graph_impl": "full_iteration"}, ALL),
    ({"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}, ALL),
    ({"enable_cuda_graph": True}, PASSES),
    ({"enable_cuda_graph": True, "cuda_graph_scope": "full_iteration"}, ALL),
    ({"external_cuda_graph": True}, NONE),
    ({"external_cuda_graph": True, "cuda_graph_scope": "attn"}, NONE),
    ({"external_cuda_graph": True, "pipeline_model_parallel_size": 2}, ALL),
    ({"overlap_moe_expert_parallel_comm": True}, ALL),
    ({"context_parallel_size": 1}, NONE),
    ({"context_parallel_size": 2}, ("prefix",)),
    *[({row.name: 8}, ALL) for row in MEGATRON_LM if row.extent == "order" and row.applies is None],
]


def settings_of(scorer: str) -> EvolvedSamplingConfig:
    if scorer == "uniform":
        return es_config(arm="uniform", scorer="fresh")
    return es_config(scorer=scorer, initial_scores="scores")  # pyright: ignore[reportArgumentType]


def as_text(value: Any) -> tuple[str, ...]:
    if value is True:
        return ()
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


@pytest.mark.parametrize(("given", "refused"), CASES, ids=lambda value: " ".join(map(str, value)) or "nothing")
def test_run_time_and_patch_agree(given: dict[str, Any], refused: tuple[str, ...]) -> None:
    run = ExistingRun("script", {name: as_text(value) for name, value in given.items()})
    for scorer in ALL:
        told = [finding for finding in check(run, settings_of(scorer)) if finding.severity == "REFUSE"]
        assert bool(told) is (scorer in refused), scorer
        assert all(finding.cure for finding in told)
        if scorer not in refused:
            refuse_arguments(Namespace(**given), MEGATRON_LM, settings_of(scorer))
            continue
        with pytest.raises(ConfigError) as raised:
            refuse_arguments(Namespace(**given), MEGATRON_LM, settings_of(scorer))
        assert told[0].told.split(" (")[0] in str(raised.value)
        assert str(raised.value).endswith(".")


MERGED_CASES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"num_experts": 8}, True),
    ({"num_moe_experts": 8, "calculate_per_token_loss": True}, False),
    ({"mtp_num_layers": 1}, True),
    ({"mtp_num_layers": 1, "calculate_per_token_loss": True}, False),
    ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, True),
    ({"cuda_graph_impl": "transformer_engine"}, True),
    ({"defer_embedding_wgrad_compute": True}, True),
    ({"delay_wgrad_compute": True}, True),
]


@pytest.mark.parametrize(("given", "refused"), MERGED_CASES, ids=str)
def test_a_merged_scorer_is_held_by_rows_of_its_own(given: dict[str, Any], refused: bool) -> None:
    for overlap in ("none", "merged"):
        config = es_config(scorer="fresh").replaced({"scorer.overlap": overlap})
        run = ExistingRun("script", {name: as_text(value) for name, value in given.items()})
        told = [finding for finding in check(run, config) if finding.severity == "REFUSE"]
        found = list(find(MODEL, given.get, config))
        assert bool(told) is bool(found) is (refused and overlap == "merged")
        assert all("overlap: none" in row.error(given.get, row.name).args[0] for row in found)


def test_upstreams_enumerations_are_read() -> None:
    given = {"enable_cuda_graph": True, "cuda_graph_scope": [Scope.full_iteration, Scope.attn]}
    assert [row.name for row in find(MODEL, given.get, settings_of("history"))] == ["enable_cuda_graph"]
    assert words([Scope.attn, "MoE, mlp", None, 3]) == ["attn", "moe", "mlp", "3"]


@pytest.mark.parametrize("value", [None, False, 0, "", "none", "False", [], ()])
def test_what_is_off(value: Any) -> None:
    assert not is_on(value)


def test_an_error_names_the_setting_the_reason_and_the_way_out() -> None:
    with pytest.raises(ConfigError) as raised:
        refuse_arguments(Namespace(fp8="hybrid"), MEGATRON_LM, settings_of("fresh"))
    assert str(raised.value) == (
        "`--fp8-recipe` must be `tensorwise`, `blockwise` or `mxfp8` with a scoring pass (`fresh`, `prefix`, "
        "`every-k`), but is 'delayed' instead: delayed scaling keeps a history of maxima, which the pass would move. "
        "Use `tensorwise`, `blockwise` or `mxfp8`, or use `scorer: history`, which makes no scoring pass."
    )


@pytest.mark.parametrize("arm", ["plain", "shortened"])
def test_arms_that_neither_score_nor_select_are_held_by_their_data_order_alone(arm: Any) -> None:
    config = es_config(arm=arm, preset="paper")
    names = {row.name for row in find((*MODEL, *MEGATRON_LM), lambda name: 2, config)}
    assert {"perform_rl_step", "fim_data"} <= names
    assert not {"overlap_moe_expert_parallel_comm", "fp8_recipe"} & names
    assert not list(find(MODEL, {"fp8": "hybrid", "cuda_graph_impl": "local"}.get, config))


INTRODUCTION = """# What is refused, and why

Written from the tables in `es_megatron/refusals/`, which run time, `es-megatron patch --check` and
`es-megatron doctor --config` share. A setting is refused before the first iteration, with the reason and the cure, for
these runs:

- **all**: whatever arm and scorer, since the row is about the order of the data or the shape of the run;
- **selecting**: arms that train on fewer sequences than the meta-batch has (all but `plain` and `shortened`);
- **scoring**: arms with scores whose scorer makes a pass of its own: `fresh`, `prefix`, `every-k`. So not `history`
  (the default), not `external`, and not the arm `uniform`;
- **prefix**: arms with scores and `scorer: prefix`, whose pass reads the first tokens of each sequence alone;
- **merged**: those with `scorer.overlap: merged`.

What is not in the table is allowed. FP8, FP4 and CUDA graphs need a GPU: that these settings pass the checks, and are
refused where they must be, is tested; how they train with Evolved Sampling was read in upstream's source and not run.
"""
RUNS = {
    "order": "all",
    "selection": "selecting",
    "scoring": "scoring",
    "first tokens": "prefix",
    "merged": "merged",
}
TABLES = {
    "Models of Megatron-Core": MODEL,
    "Megatron-LM": MEGATRON_LM,
    "Megatron-Bridge, besides those of Megatron-LM": MEGATRON_BRIDGE,
    "Megatron-DeepSpeed, besides those of Megatron-LM": MEGATRON_DEEPSPEED,
    "DeepSpeed's engines": DEEPSPEED,
}


def test_the_documents_have_the_table() -> None:
    """Write it anew with `ES_WRITE_GOLDEN=1 python -m pytest tests/unit/test_compatibility.py`."""
    path = Path(__file__).parents[2] / "docs" / "refusals.md"
    parts = [INTRODUCTION]
    for title, rows in TABLES.items():
        lines = [f"| `{row.name}` | {row.must} | {RUNS[row.extent]} | {row.why} |" for row in rows]
        head = ["| setting | must be | refused for runs | why |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {title}", "", *head, *lines, ""]))
    text = "\n".join(parts)
    if os.environ.get("ES_WRITE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text
