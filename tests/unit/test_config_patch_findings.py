"""What the report on a config tells: what is refused or noted, and the numbers of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from es_megatron.checks.config_report import Report, Wishes, examine
from es_megatron.config.names import given_names
from es_megatron.config_files.reading import Hints, read
from tests.es_config import es_config
from tests.unit.test_config_patch import SMALL


def wish(**settings: object) -> Wishes:
    return Wishes(es_config(**{"preset": "paper", **settings}), given_names(settings), None)  # pyright: ignore[reportArgumentType]


def examined(
    tmp_path: Path, text: str, name: str = "train.sh", hints: Hints | None = None, **settings: object
) -> Report:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return examine(name, read(path, hints or Hints()), wish(**settings))


def found(report: Report, severity: str) -> str:
    return "\n".join(finding.line() for finding in report.findings if finding.severity == severity)


@pytest.mark.parametrize(
    ("more", "severity", "told"),
    [
        ("--context-parallel-size 2 --es-scorer prefix", "REFUSE", "is upstream's to say"),
        ("--context-parallel-size 2", "OK", "precision, CUDA graphs and parallelism"),
        (
            "--context-parallel-size 4 --seq-length 4100",
            "REFUSE",
            "into 8 equal pieces, two for each rank. Cure: use 4096",
        ),
        (
            "--rampup-batch-size 4 4 2000 --train-samples 90000",
            "OK",
            "B grows from 4 over 112 iterations, which train on",
        ),
        ("--rampup-batch-size 2 2 2000 --train-samples 90000", "REFUSE", "must be a multiple of 4"),
        ("--rampup-batch-size 4 7 2000 --train-samples 90000", "REFUSE", "an increment that divides 60"),
        ("--deepspeed --rampup-batch-size 4 4 2000", "REFUSE", "a batch that grows has not been tried there"),
        ("--deepspeed --ds-sequence-parallel-size 2", "REFUSE", "are not told apart there"),
        ("--context-parallel-size 1", "OK", "precision, CUDA graphs and parallelism"),
        ("--fp8-hybrid --es-scorer fresh", "REFUSE", "`--fp8-recipe delayed`: delayed scaling keeps a history"),
        ("--dataloader-type external", "REFUSE", "sample ids"),
        ("--dataloader-type cyclic", "NOTE", "its own order"),
        ("--num-experts 8 --moe-token-dropping", "NOTE", "neighbours"),
        ("--deepspeed --num-experts 64", "REFUSE", "experts have not been tried there"),
        ("--deepspeed --random-ltd", "REFUSE", "drops tokens"),
        ("--checkpoint-activations", "OK", "costs 3 forward passes"),
        ("--num-workers 5 --es-order-mask-lag 8", "REFUSE", "10 iterations early, but `order.mask_lag` is 8"),
        ("--use-checkpoint-args", "NOTE", "may come from the checkpoint"),
        ("--tensor-model-parallel-size 3", "REFUSE", "cannot be cut into TP 3 = 3. Cure: use 3 or 6 ranks"),
        ("--tensor-model-parallel-size 0", "REFUSE", "at least 1"),
        (
            "--micro-batch-size 5",
            "REFUSE",
            "multiple of micro-batch size x data-parallel size, here 5 x 4. Cure: use 60",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers 10 --num-layers-per-virtual-pipeline-stage 3",
            "REFUSE",
            "chunks",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6",
            "REFUSE",
            "interleaved stages need a multiple of the 4 pipeline stages. Cure: use a global batch size of 8",
        ),
        ("--global-batch-size $B", "NOTE", "`B`: not known from the file alone"),
        ("--global-batch-size 4", "REFUSE", "b cannot be below B"),
    ],
)
def test_findings(more, severity, told, tmp_path):
    assert told in found(examined(tmp_path, f"{SMALL} {more}"), severity)


def test_set_tells_what_the_script_leaves_open(tmp_path):
    text = SMALL.replace("64", "$B").replace("per_node 4", "per_node $GPUS")
    assert examined(tmp_path, text).proposal.plan is None
    hints = Hints({"B": "96", "GPUS": "8"})
    plan = examined(tmp_path, text, hints=hints).proposal.plan
    assert plan is not None
    assert (plan.meta_batch, plan.kept) == (96, 24)
    plan = examined(tmp_path, text, hints=Hints({"global-batch-size": "32"}, world_size=4)).proposal.plan
    assert plan is not None
    assert (plan.meta_batch, plan.kept) == (32, 8)


def test_numbers_of_the_plan(tmp_path):
    # 16 micro-batches of 2 on DP 4, PP 2: plain (16 + 1) * 3, scoring 16 + 1, training (4 + 1) * 3
    text = (
        "torchrun --nproc_per_node 8 pretrain_gpt.py --pipeline-model-parallel-size 2 --micro-batch-size 2 "
        "--global-batch-size 128 --train-iters 1000"
    )
    proposal = examined(tmp_path, text, anneal=0.0).proposal
    assert proposal.plan is not None
    assert proposal.prediction is not None
    assert proposal.plan.kept == 32
    assert proposal.config.scorer.micro_batch_size is None
    assert proposal.prediction.selecting == pytest.approx(1 - (17 + 5 * 3) / (17 * 3))
    # full recompute: a backward pass costs three forward passes
    proposal = examined(tmp_path, text + " --recompute-granularity full", anneal=0.0).proposal
    assert proposal.prediction is not None
    assert proposal.prediction.selecting == pytest.approx(1 - (17 + 5 * 4) / (17 * 4))
    # without pipelining the scoring micro-batch may grow at no cost
    proposal = examined(tmp_path, SMALL, anneal=0.0).proposal
    assert proposal.config.scorer.micro_batch_size == 4
    assert proposal.prediction is not None
    assert proposal.prediction.saving == pytest.approx(1 - (1 + 3 * 0.25) / 3)


def test_keep_ratio_is_moved_only_if_it_was_not_told(tmp_path):
    text = SMALL.replace("size 64", "size 40")
    report = examined(tmp_path, text)
    assert report.proposal.plan is not None
    assert report.proposal.plan.kept == 8
    assert "b must be a multiple of 4 sequences here" in found(report, "NOTE")
    report = examined(tmp_path, text, keep_ratio=0.25)
    assert report.refused
    assert "Use `keep_ratio` 0.2 (b = 8)" in found(report, "REFUSE")


def test_a_run_that_would_cost_more_is_refused(tmp_path):
    told = found(examined(tmp_path, SMALL, keep_ratio=60 / 64), "REFUSE")
    assert "more than the plain one" in told
    assert "a scorer that makes no pass" in told


def test_scoring_micro_batch_that_was_told_must_fit(tmp_path):
    report = examined(tmp_path, SMALL, scoring_micro_batch_size=3)
    assert "must cut a rank's 16 sequences" in found(report, "REFUSE")
    assert examined(tmp_path, SMALL, scoring_micro_batch_size=16).proposal.config.scorer.micro_batch_size == 16


def test_second_launch_line_is_held_to_the_plan_of_the_first(tmp_path):
    other = SMALL.replace("per_node 4", "per_node 32")
    text = f"if [ $NODES = 1 ]; then\n{SMALL}\nelse\n{other}\nfi\n"
    report = examined(tmp_path, text)
    assert "launched on lines 2, 4" in report.heading
    assert "must be a multiple of 32" in found(report, "REFUSE")


def test_control_arms_cost_no_scoring(tmp_path):
    proposal = examined(tmp_path, SMALL, arm="uniform", anneal=0.0).proposal
    assert proposal.config.scorer.micro_batch_size is None
    assert proposal.prediction is not None
    assert proposal.prediction.saving == pytest.approx(0.75)
    assert not examined(tmp_path, SMALL, arm="plain").refused
