"""Unmodified Megatron-DeepSpeed with Evolved Sampling: `MEGATRON_DEEPSPEED=CHECKOUT make test-megatron-lm`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.megatron_lm_helper import SCORES, Outcome, Site

CHECKOUT = os.environ.get("MEGATRON_DEEPSPEED", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(4000),
    pytest.mark.skipif(
        not CHECKOUT, reason="needs a checkout: MEGATRON_DEEPSPEED=FOLDER make test-megatron-lm (DeepSpeed installed)"
    ),
]

LENGTH = ["--train-iters", "70"]
WITHOUT_PIPELINE = ["--no-pipeline-parallel"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.make(tmp_path_factory.mktemp("megatron_deepspeed"), Path(CHECKOUT).resolve())


def run(site: Site, name: str, flags: list[str], ranks: int, stage: int = 1) -> Outcome:
    """Run under DeepSpeed with a ZeRO stage."""
    config = site.root / f"zero{stage}.json"
    batch = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "steps_per_print": 100000}
    config.write_text(json.dumps({**batch, "zero_optimization": {"stage": stage}}))
    engine = ["--deepspeed", "--deepspeed_config", str(config), "--zero-stage", str(stage)]
    outcome = site.run(name, [*LENGTH, *engine, *flags], ranks=ranks, model=MODEL_FLAGS)
    assert outcome.code == 0, outcome.text[-4000:]
    return outcome


MODEL_FLAGS = """
    --distributed-backend gloo --use-cpu-initialization --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 64 --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-gelu-fusion --no-bias-dropout-fusion --num-workers 0 --num-layers 4 --hidden-size 32
    --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 16
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 4 --log-interval 1 --eval-interval 1000
    --eval-iters 1 --attention-dropout 0 --hidden-dropout 0 --split 90,5,5
""".split()  # noqa: SIM905 - read as a command line


@pytest.fixture(scope="module")
def reference(site: Site) -> Outcome:
    return run(site, "reference", [*WITHOUT_PIPELINE, *SCORES], 1)


@pytest.mark.parametrize(
    ("name", "ranks", "stage", "flags"),
    [
        ("DP2", 2, 1, WITHOUT_PIPELINE),
        ("DP2-zero2", 2, 2, WITHOUT_PIPELINE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_same_sequences_on_every_layout(
    site: Site, reference: Outcome, name: str, ranks: int, stage: int, flags: list[str]
) -> None:
    assert 50 <= len(reference.chosen()) < 70
    outcome = run(site, name, [*flags, *SCORES], ranks, stage)
    assert outcome.chosen() == reference.chosen()


@pytest.mark.parametrize(
    ("name", "ranks", "flags"),
    [
        ("PP2", 2, ["--pipeline-model-parallel-size", "2"]),
        ("TP2", 2, ["--tensor-model-parallel-size", "2", *WITHOUT_PIPELINE]),
        ("TP2xPP2", 4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_layouts_select_and_end_with_their_schedule(site: Site, name: str, ranks: int, flags: list[str]) -> None:
    """Initial weights differ by layout here, and with them the choice; the learning rate ends at its minimum."""
    outcome = run(site, name, [*flags, *SCORES], ranks)
    chosen = outcome.chosen()
    assert {len(ids) for ids in chosen.values()} == {4, 16}
    rates = outcome.values("learning rate", after=1)
    assert list(rates) == list(range(2, len(chosen) + 1))
    assert float(rates[len(chosen)]) == pytest.approx(1e-4)


def test_resume_equals_uninterrupted(site: Site, reference: Outcome) -> None:
    keep = [*WITHOUT_PIPELINE, *SCORES, "--save", str(site.root / "saved"), "--save-interval", "100"]
    run(site, "resumed", [*keep, "--exit-interval", "33"], 2)
    assert (site.root / "saved" / "global_step33" / "es_state" / "manifest.json").is_file()
    outcome = run(site, "resumed", [*keep, "--load", str(site.root / "saved")], 2)
    assert "goes on at iteration 33 with the scores saved there" in outcome.text
    assert outcome.chosen() == reference.chosen()
