"""The trainer on real DeepSpeed does what it does on Megatron-Core, at every ZeRO stage and with pipeline stages."""

import math

import pytest

from es_megatron.core.skipped import write_skipped
from es_megatron.frameworks.megatron_data import load_blend
from tests import deepspeed_helper, small_run

ZERO = {stage: f"deepspeed.zero_stage={stage}" for stage in range(4)}
PIPELINE = "parallel.pipeline=2"
MERGED = ("evolved_sampling.scorer.overlap=merged", "evolved_sampling.scorer.micro_batch_size=null")
STOP = 13
"""In the middle of epoch 1 of the larger components, past the edge of a pruned epoch."""

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(600)  # seconds on an idle machine


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    return small_run.write_blend(tmp_path_factory.mktemp("blend"))


@pytest.fixture(scope="module")
def reference(blend, tmp_path_factory):
    """What Megatron's backend does on one rank, by settings; each is run once."""
    seen = {}

    def of(*overrides):
        if overrides not in seen:
            directory = tmp_path_factory.mktemp("megatron")
            seen[overrides] = deepspeed_helper.run(1, blend, directory, *overrides)[0]
        return seen[overrides]

    return of


def assert_equal_runs(traces, expected, tolerance=1e-5):
    """Every rank chose the same ids, and saw the same losses and norms."""
    assert len(expected.chosen) > STOP
    for trace in traces:
        assert trace.chosen == expected.chosen
        assert trace.loss == pytest.approx(expected.loss, abs=tolerance, nan_ok=True)
        known = [(own, of) for own, of in zip(trace.norm, expected.norm, strict=True) if not math.isnan(own)]
        assert [own for own, _ in known] == pytest.approx([of for _, of in known], rel=1e-4)
        assert trace.trained == pytest.approx(expected.trained, abs=tolerance)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(1, [ZERO[0]], id="zero0"),
        pytest.param(2, [ZERO[0]], id="zero0-dp2"),
        pytest.param(2, [ZERO[1]], id="zero1-dp2"),
        pytest.param(2, [ZERO[2]], id="zero2-dp2"),
        pytest.param(2, [ZERO[3]], id="zero3-dp2", marks=slow),
        pytest.param(4, [ZERO[1], PIPELINE], id="pp2-dp2", marks=slow),
        pytest.param(4, [ZERO[1], "parallel.pipeline=4"], id="pp4", marks=slow),
        pytest.param(2, [ZERO[1], "parallel.tensor=2"], id="zero1-tp2", marks=slow),
        pytest.param(2, [ZERO[3], "parallel.tensor=2"], id="zero3-tp2", marks=slow),
        pytest.param(4, [ZERO[1], PIPELINE, "parallel.tensor=2"], id="pp2-tp2", marks=slow),
    ],
)
def test_it_equals_the_megatron_backend_on_one_rank(ranks, overrides, blend, reference, tmp_path):
    traces = deepspeed_helper.run(ranks, blend, tmp_path, "backend=deepspeed", *overrides)
    assert_equal_runs(traces, reference())


GPT2 = (
    "model.tie_embeddings=false",
    "model.position_embedding=learned",
    "model.normalization=LayerNorm",
    "model.swiglu=false",
    "model.bias=true",
)


@pytest.mark.parametrize("zero", [pytest.param(0, marks=slow), 1])
def test_pipeline_stages_of_the_other_kind_of_gpt_equal_the_megatron_backend(zero, blend, reference, tmp_path):
    options = (*GPT2, *(["training.clip_grad=0"] if zero == 0 else []))  # refused with clipping, since it clips wrongly
    traces = deepspeed_helper.run(2, blend, tmp_path, "backend=deepspeed", ZERO[zero], PIPELINE, *options)
    assert_equal_runs(traces, reference(*options))


VARIANTS = [
    ("evolved_sampling.scorer=history", "evolved_sampling.scores.correction=debiased"),
    ("evolved_sampling.scorer=every-k", "evolved_sampling.selection.inclusion_weights=true"),
    ("evolved_sampling.selection.granularity=microbatch", "evolved_sampling.scorer.micro_batch_size=1"),
    ("evolved_sampling.arm=uniform-prune",),
    ("evolved_sampling.arm=plain",),
    ("evolved_sampling.selection.policy=grad-norm",),
]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [pytest.param(1, [ZERO[1]], id="zero1"), pytest.param(2, [ZERO[1], PIPELINE], id="pp2", marks=slow)],
)
@pytest.mark.parametrize(
    "variant",
    [pytest.param(each, marks=slow if "micro" in each[0] or "prune" in each[0] else ()) for each in VARIANTS],
    ids=lambda variant: variant[0].partition("=")[2],
)
def test_scorers_and_arms_equal_the_megatron_backend(variant, ranks, layout, blend, reference, tmp_path):
    traces = deepspeed_helper.run(ranks, blend, tmp_path, "backend=deepspeed", *layout, *variant)
    assert_equal_runs(traces, reference(*variant))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [pytest.param(2, [ZERO[1]], id="zero1-dp2"), pytest.param(2, [ZERO[1], PIPELINE], id="pp2", marks=slow)],
)
def test_rows_left_out_are_those_of_the_megatron_backend(ranks, layout, blend, reference, tmp_path):
    file = blend.parent / "skipped.json"
    write_skipped(file, load_blend(blend, small_run.T).manifest, {"a": [3, 30], "c": [1]})
    option = f"evolved_sampling.order.skip={file}"
    traces = deepspeed_helper.run(ranks, blend, tmp_path, "backend=deepspeed", *layout, option)
    assert_equal_runs(traces, reference(option))
    assert not {3, 30, 101} & {each for ids in traces[0].chosen for each in ids}


@pytest.mark.parametrize("ranks", [pytest.param(2, id="pp2"), pytest.param(4, id="pp2-dp2", marks=slow)])
def test_merged_scoring_equals_the_megatron_backend(ranks, blend, reference, tmp_path):
    """One pass over the pipeline trains and scores: choices, losses and norms are those of one rank of the other."""
    traces = deepspeed_helper.run(ranks, blend, tmp_path, "backend=deepspeed", ZERO[1], PIPELINE, *MERGED)
    assert_equal_runs(traces, reference(*MERGED))


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(2, [ZERO[0]], id="zero0", marks=slow),
        pytest.param(2, [ZERO[1]], id="zero1"),
        pytest.param(2, [ZERO[2]], id="zero2", marks=slow),
        pytest.param(2, [ZERO[3]], id="zero3", marks=slow),
        pytest.param(2, [ZERO[2], "training.precision=bf16"], id="zero2-bf16", marks=slow),
        pytest.param(2, [ZERO[1], PIPELINE, *MERGED], id="pp2-merged", marks=slow),
        pytest.param(4, [ZERO[1], PIPELINE], id="pp2-dp2", marks=slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(ranks, overrides, blend, tmp_path):
    options = ["backend=deepspeed", "model.dropout=0.1", *overrides]
    whole = deepspeed_helper.run(ranks, blend, tmp_path / "whole", *options)
    deepspeed_helper.run(ranks, blend, tmp_path / "parts", *options, stop_at=STOP)
    resumed = deepspeed_helper.run(ranks, blend, tmp_path / "parts", *options)
    for before, after in zip(whole, resumed, strict=True):
        assert len(after.chosen) == len(before.chosen) - STOP
        assert after.chosen == before.chosen[STOP:]
        assert after.trained == pytest.approx(before.trained[STOP:], abs=0, nan_ok=True)
        assert after.loss == pytest.approx(before.loss[STOP:], abs=0, nan_ok=True)
        assert after.scores == before.scores
    assert small_run.audit_of(tmp_path / "parts") == whole[0].chosen


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 2)], ids=["2-to-1", "1-to-2"])
@pytest.mark.slow
def test_a_run_goes_on_under_another_data_parallel_size(old, new, stage, blend, reference, tmp_path):
    options = ["backend=deepspeed", ZERO[stage]]
    deepspeed_helper.run(old, blend, tmp_path, *options, stop_at=STOP)
    moved = deepspeed_helper.run(new, blend, tmp_path, *options)
    expected = reference()
    for trace in moved:
        assert trace.chosen == expected.chosen[STOP:]
        assert trace.loss == pytest.approx(expected.loss[STOP:], abs=1e-5, nan_ok=True)
    assert small_run.audit_of(tmp_path) == expected.chosen
