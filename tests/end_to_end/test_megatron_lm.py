"""Unmodified Megatron-LM with Evolved Sampling: `MEGATRON_LM=CHECKOUT make test-megatron-lm`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.checkpoint.es_state import load_es_state
from es_megatron.checkpoint.transfer import saved_blend
from es_megatron.cli import main
from es_megatron.rank_grid import RankGrid
from tests.megatron_lm_helper import MODEL, SCORES, Outcome, Site, digest_tensors

CHECKOUT = os.environ.get("MEGATRON_LM", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(4000),
    pytest.mark.skipif(
        not CHECKOUT, reason="needs a checkout of Megatron-LM: MEGATRON_LM=FOLDER make test-megatron-lm"
    ),
]

LENGTH = ["--train-iters", "70"]
LAYOUTS = {
    "DP2": (2, []),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP2xDP2": (4, ["--pipeline-model-parallel-size", "2"]),
    "VPP2": (2, ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
    "DP2-distributed-optimizer": (
        2,
        [
            *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
            *("--es-scorer-micro-batch-size", "4", "--num-workers", "1"),
        ],
    ),
    "TP2-larger-scoring-batch": (2, ["--tensor-model-parallel-size", "2", "--es-scorer-micro-batch-size", "8"]),
}
PLAIN_LAYOUTS = ["DP2", "PP2", "TP2", "PP2xDP2", "VPP2"]
SHORT = ["--train-iters", "40"]
PRESETS = {
    "paper": SCORES,
    "default": ["--es-pruning-ratio", "0.25", "--es-selection-keep-ratio", "0.25", "--es-order-mask-lag", "2"],
}
EXPERTS = [
    *(
        "--num-experts",
        "4",
        "--moe-router-topk",
        "2",
        "--moe-token-dispatcher-type",
        "alltoall",
        "--disable-bias-linear",
    ),
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
]
PREDICTION = [
    *("--mtp-num-layers", "1", "--position-embedding-type", "rope"),
    "--untie-embeddings-and-output-weights",  # tied, upstream cannot load this on two stages
]
STAGES = ["--pipeline-model-parallel-size", "4", "--pipeline-model-parallel-layout"]
FEATURES = {"experts": (EXPERTS, "load_balancing_loss"), "prediction": (PREDICTION, "mtp_1 loss")}
"""Flags of a feature of the model, and what its loss is called in Megatron's log."""
FEATURE_LAYOUTS = {
    "experts-EP2": (2, ["--expert-model-parallel-size", "2"]),
    "prediction-PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "prediction-on-a-stage-of-its-own": (4, [*STAGES, "Et|ttt|m|L"]),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.make(tmp_path_factory.mktemp("megatron_lm"), Path(CHECKOUT).resolve())


@pytest.fixture(scope="module")
def weights(site: Site) -> list[str]:
    """Flags that load the same initial weights on every layout, which initialises them by stage otherwise."""
    folder = str(site.root / "weights")
    still = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0"]
    made = site.run("weights", [*still, "--save", folder, "--save-interval", "1"], patched=False)
    assert made.code == 0, made.text[-3000:]
    return ["--load", folder, "--finetune", "--no-load-optim", "--no-load-rng"]


@pytest.fixture(scope="module")
def reference(site: Site, weights: list[str]) -> Outcome:
    """One rank, uninterrupted."""
    return succeeded(site.run("reference", [*LENGTH, *SCORES, *weights]))


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.text[-4000:]
    return outcome


def test_reference_selects_prunes_and_tells(reference: Outcome) -> None:
    chosen = reference.chosen()
    iterations = len(chosen)
    assert list(chosen) == list(range(1, iterations + 1))
    assert 50 <= iterations < 70, "pruned epochs make the run shorter than the plain one"
    assert {len(ids) for ids in chosen.values()} == {4, 16}
    assert f"train_iters 70 -> {iterations}" in reference.text
    assert f"iteration {iterations:8d}/{iterations:8d}" in reference.text
    last = [line for line in reference.text.splitlines() if line.startswith(" es: iteration")][-1]
    trained = 32e-6 * sum(len(ids) for ids in chosen.values())
    scored = 32e-6 * sum(line["scored"] for line in reference.audit)
    assert f"| tokens forwarded: {scored + trained:.3f} M | tokens trained: {trained:.3f} M |" in last
    saved = float(last.split("saved so far: ")[1].split("%")[0])
    assert 40 < saved < 60


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_sequences_on_every_layout(site: Site, weights: list[str], reference: Outcome, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    if "--use-distributed-optimizer" in flags and site.minor_version < 14:
        pytest.skip("before core_v0.14 the distributed optimizer needs Transformer Engine")
    outcome = succeeded(site.run(layout, [*LENGTH, *SCORES, *weights, *flags], ranks=ranks))
    assert outcome.chosen() == reference.chosen()
    assert outcome.meta_losses() == pytest.approx(reference.meta_losses(), rel=2e-6)


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS)
def test_off_is_bit_identical_to_a_run_without_the_package(site: Site, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    digests: list[dict[str, str]] = []
    losses: list[dict[int, str]] = []
    for name, patched, more in (("untouched", False, []), ("off", True, []), ("no-es", True, ["--no-es"])):
        if name == "no-es" and layout != "DP2":
            continue
        folder = site.root / f"{layout}-{name}"
        keep = ["--train-iters", "6", "--save", str(folder), "--save-interval", "6"]
        outcome = succeeded(site.run(f"{layout}-{name}", [*keep, *flags, *more], ranks=ranks, patched=patched))
        digests.append(digest_tensors(folder / "iter_0000006"))
        losses.append(outcome.values("lm loss", after=1))
        assert not (folder / "iter_0000006" / "es_state").exists()
        if not patched:
            assert "es_megatron modules: es_megatron " in outcome.text
            assert "es_megatron.core.engine" not in outcome.text
    assert list(losses[0]) == [2, 3, 4, 5, 6]
    assert all(each == losses[0] for each in losses)
    assert len(digests[0]) > 40, "weights and the optimizer's moments"
    assert all(each == digests[0] for each in digests)


class Growing:
    """Runs of one checkout whose batch grows from 4 to 16: sizes 4, 8, 12 for the first draws."""

    def __init__(self, site: Site, weights: list[str]) -> None:
        self.site, self.weights = site, weights
        old = ["--rampup-batch-size", "4", "4", "40"]
        # from 0.19 on the old flag is taken and does nothing; the new one gives its own global batch size
        self.model = MODEL if site.minor_version < 19 else without(MODEL, "--global-batch-size")
        new = ["--step-batch-size-schedule", f"0:4 {32 * 14}:8 {32 * 27}:12 {32 * 41}:16"]
        self.flags = ["--train-samples", "720", *SCORES, *(old if site.minor_version < 19 else new)]

    def run(self, name: str, flags: list[str], ranks: int = 1) -> Outcome:
        model = without(self.model, "--lr-warmup-iters")
        return succeeded(self.site.run(f"ramp-{name}", [*self.flags, *flags], ranks=ranks, model=model))


def without(flags: list[str], name: str) -> list[str]:
    """Flags without one and its value."""
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2 :]]


@pytest.fixture(scope="module")
def growing(site: Site, weights: list[str]) -> Growing:
    return Growing(site, weights)


@pytest.fixture(scope="module")
def grown(growing: Growing) -> Outcome:
    return growing.run("one", growing.weights)


def test_a_growing_batch_trains_on_everything_and_then_selects(grown: Outcome) -> None:
    sizes = [len(ids) for ids in grown.chosen().values()]
    assert "B grows from 4 to 16 over 7 iterations, which train on everything" in grown.text
    ramp = sizes[:7]
    assert ramp == [4, 4, 4, 4, 8, 8, 12]
    assert set(sizes[7:]) == {4, 16}, "and anneals at the end"
    assert "train_samples 720 -> " in grown.text
    consumed = grown.values("consumed samples", after=0)
    assert int(consumed[len(ramp)]) == sum(ramp)
    assert len(consumed) == len(sizes), "Megatron and the plan end alike"


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_a_growing_batch_has_the_same_sequences_on_every_layout(growing: Growing, grown: Outcome, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    outcome = growing.run(layout, [*growing.weights, *flags], ranks)
    assert outcome.chosen() == grown.chosen()
    assert outcome.meta_losses() == pytest.approx(grown.meta_losses(), rel=2e-6)


@pytest.mark.parametrize("stop", [5, 25], ids=["inside", "after"])
def test_a_growing_batch_resumes(growing: Growing, grown: Outcome, stop: int) -> None:
    folder = growing.site.root / f"ramp-{stop}"
    keep = ["--save", str(folder), "--save-interval", "100"]
    growing.run(f"resume-{stop}", [*keep, *growing.weights, "--exit-interval", str(stop)])
    second = growing.run(f"resume-{stop}", [*keep, "--load", str(folder)])
    assert f"goes on at iteration {stop} with the scores saved there" in second.text
    assert second.chosen() == grown.chosen()
    assert second.meta_losses() == grown.meta_losses()[stop:]


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (2, 1)], ids=["DP1", "DP2", "DP2-to-DP1"])
def test_resume_equals_uninterrupted(
    site: Site, weights: list[str], reference: Outcome, ranks: tuple[int, int]
) -> None:
    name = f"resume-{ranks[0]}-{ranks[1]}"
    folder = site.root / name
    keep = [*LENGTH, *SCORES, "--save", str(folder), "--save-interval", "100"]
    # the exit saves; iteration 33 is within pruned epochs of both components
    first = succeeded(site.run(name, [*keep, *weights, "--exit-interval", "33"], ranks=ranks[0]))
    assert max(first.chosen()) == 33
    assert (folder / "iter_0000033" / "es_state" / "manifest.json").is_file()
    second = succeeded(site.run(name, [*keep, "--load", str(folder)], ranks=ranks[1]))
    assert "goes on at iteration 33 with the scores saved there" in second.text
    assert second.chosen() == reference.chosen()
    norms, whole = (each.values("grad norm", after=34) for each in (second, reference))
    assert list(norms) == list(whole) == list(range(35, len(reference.audit) + 1))
    assert {k: float(v) for k, v in norms.items()} == pytest.approx({k: float(v) for k, v in whole.items()}, abs=2e-3)
    if ranks == (1, 1):
        assert norms == whole
        assert second.meta_losses() == reference.meta_losses()[33:]


def test_passing_checkpoints_have_scores_too(site: Site, weights: list[str], reference: Outcome) -> None:
    """`--non-persistent-save-interval`: killed after one of them, the run goes on from it as if nothing had been."""
    folder = site.root / "passing"
    keep = [*LENGTH, *SCORES, "--save", str(folder), "--save-interval", "20", "--non-persistent-save-interval", "7"]
    keep += ["--non-persistent-ckpt-type", "global", "--exit-interval"]
    first = succeeded(site.run("passing", [*keep, "20", *weights]))
    assert max(first.chosen()) == 20
    beside = folder / "non_persistent"
    assert [each.name for each in sorted(beside.glob("es_state_*"))] == ["es_state_0000007", "es_state_0000014"]
    assert [each.name for each in sorted(beside.glob("iter_*"))] == ["iter_0000007", "iter_0000014"]
    (folder / "latest_checkpointed_iteration.txt").unlink()  # as if it had died before iteration 20 was saved
    second = succeeded(site.run("passing", [*keep, "1000", "--load", str(folder)]))
    assert "goes on at iteration 14 with the scores saved there" in second.text
    assert second.chosen() == reference.chosen()
    assert second.meta_losses() == reference.meta_losses()[14:]
    assert not (beside / "es_state_0000007").exists()


def test_a_skipped_iteration_leaves_no_trace(site: Site, weights: list[str], reference: Outcome) -> None:
    skipped = 12 if site.minor_version < 19 else 13  # older versions count from 0
    short = [*LENGTH, *SCORES, *weights, "--exit-interval", "20"]
    outcome = succeeded(site.run("skipped", [*short, "--iterations-to-skip", str(skipped)]))
    before, after = reference.chosen(), outcome.chosen()
    assert sorted(after) == [n for n in range(1, 21) if n != 13]
    assert {n: ids for n, ids in after.items() if n < 13} == {n: ids for n, ids in before.items() if n < 13}
    # the samples that would have come in the iterations after it do come there, of other losses by now
    assert all(set(after[n]) != set(before[13]) for n in range(14, 21))
    assert len(after[14]) == len(before[14]) == 4


def test_rows_left_out_are_not_trained_any_more(
    site: Site, weights: list[str], reference: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site.root / "left-out"
    keep = [*LENGTH, *SCORES, "--save", str(folder), "--save-interval", "10"]
    before = succeeded(site.run("left-out", [*keep, *weights, "--exit-interval", "10"])).chosen()
    manifest = saved_blend(folder / "iter_0000010" / "es_state")
    out = [n for n in reference.chosen()[15] if n not in before[10]]
    component, row = manifest.locate(np.asarray([*out, before[10][0]], np.int64))
    names = [f"{manifest.components[c].name}:{r}" for c, r in zip(component.tolist(), row.tolist(), strict=True)]
    assert main(["skip", str(folder), *names[:-1]]) == 0
    audit = site.root / "left-out.audit.jsonl"
    spike = ["spike", str(folder), "--iteration", "10", "--before", "0", "--audit", str(audit)]
    assert main(spike) == 0
    told = capsys.readouterr().out
    assert f"\n{names[-1]} " in told
    assert "oldest after iter_0000010" in told
    more = [*keep, "--load", str(folder), "--exit-interval", "20", "--es-order-skip", str(folder / "skipped.json")]
    after = succeeded(site.run("left-out", more))
    assert f"es: the run leaves out {len(out)} row" in after.text
    chosen = after.chosen()
    assert list(chosen) == list(range(1, 21))
    assert not set(out) & {n for number in range(11, 21) for n in chosen[number]}
    assert {len(chosen[number]) for number in range(11, 21)} == {4}
    refused = site.run("left-out", [*keep, "--load", str(folder), "--exit-interval", "25"])
    assert refused.code != 0
    assert f"leaves out {len(out)} row" in refused.text


def test_plain_checkpoint_is_adopted_and_given_back(site: Site, weights: list[str]) -> None:
    folder = site.root / "adopt"
    keep = [*LENGTH, "--save", str(folder), "--save-interval", "100"]
    succeeded(site.run("adopt-plain", [*keep, *weights, "--exit-interval", "20"], patched=False))
    adopted = succeeded(site.run("adopt-es", [*keep, *SCORES, "--load", str(folder), "--exit-interval", "40"]))
    assert "starts at iteration 20 of a plain checkpoint" in adopted.text
    chosen = adopted.chosen()
    assert list(chosen) == list(range(21, 41))
    assert len(chosen[21]) == 16, "scores are warmed up on whole meta-batches"
    assert len(chosen[40]) == 4
    resumed = succeeded(site.run("adopt-es", [*keep, *SCORES, "--load", str(folder), "--exit-interval", "45"]))
    assert list(resumed.chosen()) == list(range(21, 46))
    back = ["--load", str(folder), "--override-opt_param-scheduler", "--exit-interval", "50"]
    plain = succeeded(site.run("adopt-back", [*keep, *back], patched=False))
    assert list(plain.values("grad norm", after=45)) == list(range(46, 51))


def test_one_line_in_the_script(site: Site, weights: list[str], reference: Outcome) -> None:
    """`import es_megatron.auto`, for those who prefer it to the runner."""
    script = site.root / "with_auto.py"
    script.write_text(f"import es_megatron.auto\n{Path(site.script).read_text()}")
    flags = [*LENGTH, *SCORES, *weights, "--exit-interval", "12"]
    outcome = succeeded(site.run("auto", flags, patched=False, script=str(script)))
    assert outcome.chosen() == {k: v for k, v in reference.chosen().items() if k <= 12}


def test_validation_data_is_that_of_the_plain_run(site: Site, weights: list[str], reference: Outcome) -> None:
    def sizes(outcome: Outcome) -> list[str]:
        lines = [line.strip() for line in outcome.text.splitlines()]
        return [line for line in lines if line.startswith(("validation: ", "test: ", "train: "))]

    plain = succeeded(site.run("sizes", [*LENGTH, *weights, "--exit-interval", "1"], patched=False))
    assert len(sizes(plain)) >= 3
    assert sizes(plain) == sizes(reference)


class Feature:
    """A feature of the model in one checkout: its weights, and uninterrupted runs of one rank, made when asked for."""

    def __init__(self, site: Site, name: str) -> None:
        self.site, self.name = site, name
        self.flags = [*FEATURES[name][0], "--tensorboard-dir", str(site.root / f"{name}-board")]
        self.loss = FEATURES[name][1]
        folder = str(site.root / f"{name}-weights")
        still = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0"]
        made = site.run(folder, [*self.flags, *still, "--save", folder, "--save-interval", "1"], patched=False)
        self.fails_by_itself = made.code != 0
        self.weights = ["--load", folder, "--finetune", "--no-load-optim", "--no-load-rng"]
        self._uninterrupted: dict[tuple[str, str], Outcome] = {}

    def run(self, name: str, preset: str, flags: list[str], ranks: int = 1) -> Outcome:
        given = [*self.flags, *SHORT, *PRESETS[preset], *flags]
        return succeeded(self.site.run(f"{self.name}-{preset}-{name}", given, ranks=ranks))

    def uninterrupted(self, preset: str, layout: str = "one rank") -> Outcome:
        key = preset, layout
        if key not in self._uninterrupted:
            ranks, flags = FEATURE_LAYOUTS.get(layout, (1, []))
            self._uninterrupted[key] = self.run(layout.replace(" ", "-"), preset, [*self.weights, *flags], ranks)
        return self._uninterrupted[key]


@pytest.fixture(scope="module")
def features(site: Site) -> dict[str, Feature]:
    return {}


def feature_of(features: dict[str, Feature], site: Site, name: str) -> Feature:
    if name not in features:
        features[name] = Feature(site, name)
    if features[name].fails_by_itself:
        pytest.skip(f"{name} of this checkout fails by itself without Transformer Engine")
    return features[name]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", FEATURE_LAYOUTS)
def test_experts_and_multi_token_prediction(site: Site, features: dict[str, Feature], layout: str, preset: str) -> None:
    """On several ranks: the sequences of one rank, and auxiliary losses that are means over what was trained."""
    feature = feature_of(features, site, layout.partition("-")[0])
    if STAGES[-1] in FEATURE_LAYOUTS[layout][1] and site.minor_version < 16:
        pytest.skip("before core_v0.16 multi-token prediction is on the last stage only")
    reference, outcome = feature.uninterrupted(preset), feature.uninterrupted(preset, layout)
    assert outcome.chosen() == reference.chosen()
    # the balancing loss of a micro-batch depends on which sequences meet in it, and so on the number of ranks
    close = 1e-3 if feature.name == "experts" else 2e-6
    assert outcome.meta_losses() == pytest.approx(reference.meta_losses(), rel=close)
    for each in (reference, outcome):
        kept = {iteration: len(ids) for iteration, ids in each.chosen().items()}
        assert set(kept.values()) == {4, 16}
        lost = {iteration: float(value) for iteration, value in each.values(feature.loss, after=1).items()}
        assert len(lost) == len(kept) - 1
        whole = [lost[iteration] for iteration in lost if kept[iteration] == 16]
        # both losses change slowly; divided by the plain run's number of micro-batches they would be a quarter
        assert all(min(whole) * 0.8 < value < max(whole) * 1.2 for value in lost.values())
        assert "NAN" not in each.text
        lines = [line for line in each.text.splitlines() if line.startswith(" es: iteration")]
        assert all(" | trained loss: " in line for line in lines)
        assert ("| meta-batch loss: " in lines[len(lines) // 2]) == (preset == "paper"), "free scores do not know it"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", ["experts-EP2", "prediction-PP2"])
def test_experts_and_multi_token_prediction_resume(
    site: Site, features: dict[str, Feature], layout: str, preset: str
) -> None:
    feature = feature_of(features, site, layout.partition("-")[0])
    ranks, flags = FEATURE_LAYOUTS[layout]
    folder = site.root / f"{layout}-{preset}-resume"
    keep = [*flags, "--save", str(folder), "--save-interval", "100"]
    feature.run(f"{layout}-resume", preset, [*keep, *feature.weights, "--exit-interval", "25"], ranks)
    second = feature.run(f"{layout}-resume", preset, [*keep, "--load", str(folder)], ranks)
    assert "goes on at iteration 25 with the scores saved there" in second.text
    whole = feature.uninterrupted(preset, layout)
    assert second.chosen() == whole.chosen()
    for name in ("grad norm", feature.loss):
        # the first line of a process has the mean of two iterations
        mine, theirs = (each.values(name, after=27) for each in (second, whole))
        assert list(mine) == list(theirs) == list(range(28, len(whole.audit) + 1))
        assert [float(v) for v in mine.values()] == pytest.approx([float(v) for v in theirs.values()], abs=2e-3)


def test_untested_version_runs_and_is_refused_where_that_is_asked_for(
    site: Site, weights: list[str], reference: Outcome
) -> None:
    copy = site.untested()
    flags = [*LENGTH, *SCORES, *weights, "--exit-interval", "12"]
    outcome = succeeded(copy.run("untested", flags))
    assert outcome.chosen() == {k: v for k, v in reference.chosen().items() if k <= 12}
    told = [line for line in outcome.text.splitlines() if "has not been tested with these patches" in line]
    assert len(told) == 1
    assert told[0].startswith("es_megatron: megatron-lm 0.99.")
    strict = copy.run("untested-strict", [*flags, "--es-strict-versions"])
    assert strict.code != 0
    assert "`--es-strict-versions` is given" in strict.text
    assert not strict.audit
    assert succeeded(site.run("tested-strict", [*flags, "--es-strict-versions"])).chosen() == outcome.chosen()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sft", "--es"], "`--sft` must be off with Evolved Sampling"),
        (["--es-selection-keep-ratio", "0.1"], "`selection.keep_ratio` times the meta-batch must be a multiple of 2"),
        (["--es-scores-beta1", "1.5"], "`scores.beta1` must be in [0, 1], but is 1.5 instead"),
        (
            ["--context-parallel-size", "2", "--es-scorer", "prefix"],
            "`--context-parallel-size` must be 1 with `scorer: prefix`",
        ),
    ],
    ids=["fine-tuning", "keep-ratio", "beta", "context"],
)
def test_what_cannot_work_is_refused(site: Site, flags: list[str], told: str) -> None:
    ranks = 2 if "--context-parallel-size" in flags else 1
    outcome = site.run(f"refused-{flags[0][2:]}", [*LENGTH, *flags], ranks=ranks)
    assert outcome.code != 0
    assert told in outcome.text
    assert not outcome.audit


@pytest.fixture(scope="module")
def teacher(site: Site, weights: list[str]) -> Path:
    """A finished plain run, to score with."""
    folder = site.root / "teacher"
    keep = ["--train-iters", "20", "--save", str(folder), "--save-interval", "20"]
    succeeded(site.run("teacher", [*keep, *weights], patched=False))
    return folder


def losses_in(folder: Path) -> Any:
    found = load_es_state(folder, saved_blend(folder).total, RankGrid.alone())
    assert found.state["reference"]["tokens"] == 32
    assert found.visits.all()
    return found.score


def test_megatron_scores_a_reference_that_a_run_then_chooses_by(site: Site, weights: list[str], teacher: Path) -> None:
    """The losses are those of Megatron's own training forward, on every layout, and move the choice."""
    found: dict[str, Any] = {}
    for name, (ranks, flags) in {"one": (1, []), **{name: LAYOUTS[name] for name in ("DP2", "TP2", "VPP2")}}.items():
        folder = site.root / f"losses-{name}"
        more = [*flags, "--es-score-reference", str(folder)]
        told = succeeded(site.run(f"score-{name}", ["--train-iters", "20", "--load", str(teacher), *more], ranks=ranks))
        assert "rows scored" in told.text
        assert not told.audit
        found[name] = losses_in(folder)
    for loss in found.values():
        np.testing.assert_allclose(loss, found["one"], rtol=1e-5)
    still = [
        "--load",
        str(teacher),
        "--finetune",
        "--no-load-optim",
        "--no-load-rng",
        "--train-iters",
        "20",
        "--exit-interval",
        "2",
    ]
    plain = succeeded(site.run("plain-of-teacher", [*still, "--es-arm", "plain"]))
    mean = found["one"][plain.chosen()[1]].mean()
    assert float(plain.values("lm loss", after=0)[1]) == pytest.approx(mean, rel=1e-5)
    by = ["--es-reference", str(site.root / "losses-one"), "--es-selection-policy", "reducible"]
    chosen = succeeded(site.run("reducible", [*SHORT, *by, "--es-selection-keep-ratio", "0.25", *weights])).chosen()
    few = [ids for ids in chosen.values() if len(ids) < 16]
    assert np.mean([found["one"][ids].mean() for ids in few]) < found["one"].mean() - 0.01, (
        "what it finds easy goes first"
    )


def test_a_reference_needs_a_checkpoint(site: Site) -> None:
    outcome = site.run("score-nothing", [*LENGTH, "--es-score-reference", str(site.root / "none")])
    assert outcome.code != 0
    assert "`--load` must name the checkpoint to score with" in outcome.text


def test_flags_are_in_the_help(site: Site) -> None:
    outcome = site.run("help", ["--help"])
    if outcome.code != 0:
        assert site.run("help-untouched", ["--help"], patched=False).code != 0, "our flags have broken it"
        pytest.skip("--help of this checkout fails by itself")
    for flag in ("--es, --no-es", "--es-selection-keep-ratio", "--es-scorer-micro-batch-size", "--es-audit FILE"):
        assert flag in outcome.text
