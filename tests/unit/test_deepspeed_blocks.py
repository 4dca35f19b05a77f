"""DeepSpeed's own ways to choose samples and drop tokens, wherever their blocks stand in a config."""

from __future__ import annotations

import json

import pytest

from es_megatron import cli

CURRICULUM = {"curriculum_learning": {"enabled": True, "curriculum_metrics": {}}}
DYNAMIC = {"dynamic_batching": {"enabled": True, "max_tokens": 4096}}
DROPPING = {"random_ltd": {"enabled": True, "random_ltd_layer_num": 2}}
SIZES = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
NEOX = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8, "global_num_gpus": 16, "num_layers": 2}


def efficiency(*, outer: bool, **parts: object) -> dict[str, object]:
    """A block of the data efficiency library; DeepSpeed passes over its outer switches."""
    return {"data_efficiency": {"enabled": outer, **{name: {"enabled": outer, **part} for name, part in parts.items()}}}


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"data_sampling": CURRICULUM}, "data_efficiency"),
        ({"data_sampling": DYNAMIC}, "data_efficiency"),
        ({"data_routing": DROPPING}, "random_ltd"),
    ],
    ids=["curriculum", "dynamic", "dropping"],
)
@pytest.mark.parametrize("kind", ["json", "yml", "nested.yml"])
def test_a_part_that_is_switched_on_is_refused(kind, outer, parts, named, tmp_path, capsys):
    block = efficiency(outer=outer, **parts)
    content = {
        "json": {**SIZES, **block},
        "yml": {**NEOX, **block},
        "nested.yml": {**NEOX, "deepspeed": block},
    }[kind]
    path = tmp_path / f"run.{kind}"
    path.write_text(json.dumps(content))
    assert cli.main(["patch", str(path), "--check", "--world-size", "16"]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("REFUSE")]
    assert len(told) == 1
    assert told[0].startswith(f"REFUSE  `{named}`: ")


@pytest.mark.parametrize("kind", ["json", "yml"])
def test_the_old_block_is_refused_and_the_page_named(kind, tmp_path, capsys):
    path = tmp_path / f"run.{kind}"
    path.write_text(json.dumps({**(SIZES if kind == "json" else NEOX), **CURRICULUM}))
    assert cli.main(["patch", str(path), "--check", "--world-size", "16"]) == 1
    told = capsys.readouterr().out
    assert "REFUSE  `curriculum_learning`: it shortens sequences behind the sampler's back." in told
    assert "docs/coming-from-curriculum-learning.md" in told
    assert cli.main(["patch", str(path), "--check", "--world-size", "16", "--es-arm", "plain"]) == 0


def test_what_is_switched_off_is_let_through_and_an_old_key_noted(tmp_path, capsys):
    parts = {"data_sampling": {"curriculum_learning": {"enabled": False}}, "data_routing": {}}
    path = tmp_path / "run.json"
    old = {"curriculum_learning": {"enabled": False}, "elasticity": {"enabled": False}}
    path.write_text(json.dumps({**SIZES, **efficiency(outer=True, **parts), **old}))
    assert cli.main(["patch", str(path), "--check", "--world-size", "16"]) == 0
    told = capsys.readouterr().out
    assert "OK      data order: " in told
    assert "NOTE    `curriculum_learning` `elasticity`: DeepSpeed 0.19.8 ends with an error" in told
