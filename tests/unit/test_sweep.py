"""`es-megatron plan --sweep`, and the collectives of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from es_megatron.cli import main
from es_megatron.core.plan import plan_run
from es_megatron.data.manifest import Component, Manifest
from es_megatron.forecast.collectives import ALPHA, BETA, Collective, collectives_of
from tests.es_config import es_config

SAVED = {
    "p=4": "21.2 / 36.4 / 48.5%  29.8 / 38.6 / 45.6%  35.2 / 40.0 / 43.8%",
    "p=8": "6.7 / 33.3 / 53.3%   18.8 / 36.2 / 49.3%  28.2 / 38.5 / 46.2%  34.3 / 39.9 / 44.1%",
}
"""Score-then-train, merged and bound for 8, 16, 32 and 64 micro-batches; forward 1, backward 2, b/B = 1/4."""


def test_the_table_is_that_of_the_cost_model_and_of_the_document(capsys: Any) -> None:
    assert main(["plan", "--sweep"]) == 0
    told = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in reversed(told.splitlines()) if " / " in line[:20]}
    for pipeline, saved in SAVED.items():
        assert rows[pipeline].startswith(saved)
    document = Path(__file__).parents[2] / "docs" / "merged-scoring.md"
    assert f"$ es-megatron plan --sweep\n{told}```" in document.read_text()


def sweep(capsys: Any, *flags: str) -> dict[str, Any]:
    assert main(["plan", "--sweep", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_count(capsys: Any) -> None:
    plain = sweep(capsys)
    assert (plain["keep_ratio"], plain["backward_over_forward"], len(plain["cells"])) == (0.25, 2.0, 16)
    one = sweep(capsys, "--pipeline", "4", "--es-selection-keep-ratio", "0.5", "--backward-over-forward", "1.5")
    assert [cell["trained"] for cell in one["cells"]] == [4, 8, 16, 32]
    assert one["backward_over_forward"] == 1.5
    recomputed = sweep(capsys, "--recompute", "full")
    assert recomputed["backward_over_forward"] == 3.0
    assert recomputed["cells"][0]["merged"] > plain["cells"][0]["merged"]


def test_interleaved_stages_leave_out_what_they_cannot_run(capsys: Any) -> None:
    found = sweep(capsys, "--virtual", "2", "--pipeline", "8")
    assert [cell["micro_batches"] for cell in found["cells"]] == [32, 64]
    for cell in found["cells"]:
        assert cell["score_then_train"] < cell["merged"] < cell["bound"] < cell["history"]
    assert main(["plan", "--sweep", "--virtual", "2", "--pipeline", "8"]) == 0
    assert "  p=8  -    -     " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value"), [("--virtual", "-1"), ("--pipeline", "0"), ("--backward-over-forward", "-2")]
)
def test_sizes_must_be_sizes(flag: str, value: str, capsys: Any) -> None:
    assert main(["plan", "--sweep", flag, value]) == 2
    assert f"`{flag}` must be" in capsys.readouterr().err


def names(scorer: str, **more: Any) -> list[tuple[str, int]]:
    config = es_config(preset="paper", anneal=0.0, scorer=scorer).replaced(more)
    plan = plan_run(config, Manifest((Component("a", "", 10_000, 1.0, ""),), 8), 64, 4, 640)
    return [(one.name, one.bytes) for one in collectives_of(plan, 768, 4, 8)]


def test_collectives_are_those_of_the_scorer() -> None:
    looked_up, choice = ("scores looked up", 768), ("choice", 128)
    assert names("fresh") == [("losses", 64), looked_up, choice]
    assert names("fresh", **{"scorer.overlap": "merged"}) == [("losses, scored early", 64), looked_up, choice]
    learned = [("losses of what is trained", 16), ("the same, of all", 512)]
    assert names("history") == [looked_up, choice, *learned]
    assert names("history", **{"guard.fallback": "plain"})[1] == ("worth of the scores", 8)
    assert names("fresh", arm="uniform") == [choice]
    assert names("fresh", arm="plain") == []


@pytest.mark.parametrize(
    ("kind", "ranks", "size", "expected"),
    [
        ("sum", 1, 1000, 0.0),
        ("sum", 8, 1000, 3 * (ALPHA + 1000 * BETA)),
        ("sum", 6, 1000, 4 * (ALPHA + 1000 * BETA)),
        ("sum", 4, 1 << 21, 6 * (ALPHA + BETA * (1 << 19))),
        ("broadcast", 6, 1000, 3 * (ALPHA + 1000 * BETA)),
    ],
)
def test_seconds_by_alpha_and_beta(kind: str, ranks: int, size: int, expected: float) -> None:
    assert Collective("it", kind, "world", ranks, size, "").seconds == pytest.approx(expected)
