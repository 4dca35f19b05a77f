"""References: margins by hand, sums that follow the scores, and losses that are not this run's."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.algorithm.margin import ENOUGH, RULES, Against, Moments, judge, make_rule
from es_megatron.algorithm.policies import EXCLUDED
from es_megatron.core.choosing import exponentials
from es_megatron.core.engine import EvolvedSampling
from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores import reference as scores_reference
from es_megatron.scores.reference import ReferenceLosses
from tests.es_config import es_config
from tests.reference_helper import write_reference
from tests.unit.naive import make_manifest
from tests.unit.test_engine import SIZES, Fake, Naive, loss_of, run

B = 16
MANIFEST = make_manifest(SIZES)


def reference_of(manifest: Manifest = MANIFEST) -> Any:
    return 0.5 + 3 * ((np.arange(manifest.total) * 37) % 89) / 89


def make(tmp_path: Path, loss: Any = None, manifest: Manifest = MANIFEST, **settings: Any) -> EvolvedSampling:
    folder = tmp_path / "reference"
    if not folder.exists():
        write_reference(folder, manifest, reference_of(manifest) if loss is None else loss)
    rule = settings.pop("rule", "excess")
    options = {"pruning_ratio": 0.3, "mask_lag": 3, "seed": 5, **settings}
    chosen = {"policy": "reducible", "keep_ratio": 0.25, "options": {"rule": rule}, **options.pop("selection", {})}
    config = es_config(**{"scorer": "history", "reference": str(folder), "selection": chosen, **options})
    return EvolvedSampling(config, manifest, RankGrid.alone(), meta_batch=B, micro_batch=1, train_samples=60 * B)


def against(losses: Any, component: Any = None, **fields: Any) -> Against:
    reference = np.asarray(losses, np.float64)
    moments = Moments(*(np.asarray(fields.get(name, default), np.float64) for name, default in MOMENTS.items()))
    which = np.zeros(len(reference), np.int64) if component is None else np.asarray(component)
    ceiling = np.asarray(fields.get("ceiling", [np.inf]), np.float64)
    return Against(reference, which, moments, ceiling, np.asarray(fields.get("missing", [False])))


MOMENTS = {"count": [100.0], "loss": [3.0], "reference": [2.0], "slope": [0.5]}


def test_rules_by_hand() -> None:
    loss = np.asarray([4.0, 2.0, 9.0])  # the last one has no h, and counts as its component's mean, 3 against 2
    of = against([2.0, 4.0, np.nan])
    assert judge(make_rule("excess", 1.0), loss, of).margin_N.tolist() == [2.0, -2.0, 1.0]
    assert judge(make_rule("residual", 1.0), loss, of).margin_N.tolist() == [1.0, -2.0, 0.0]
    assert judge(make_rule("static", 1.0), loss, of).margin_N.tolist() == [-2.0, -4.0, -2.0]
    band = judge(make_rule("band", 1.5), loss, against([2.0, 4.0, np.nan], ceiling=[4.5]))
    assert band.margin_N.tolist() == [0, 0, 0]
    assert band.left_out_N.tolist() == [False, True, False], "2 nats below the line through (4, 4)"
    high = judge(make_rule("band", 9.0), loss, against([2.0, 4.0, np.nan], ceiling=[3.0]))
    assert high.left_out_N.tolist() == [False, True, False]
    low = judge(make_rule("band", 9.0), loss, against([2.0, 4.0, np.nan], ceiling=[1.0]))
    assert low.left_out_N.tolist() == [True, True, False], "what is not known is not left out"


def test_losses_are_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.random.default_rng(2).lognormal(1, 0.5, MANIFEST.total).astype(np.float32)
    value[::7] = np.nan
    found: list[ReferenceLosses] = []
    for block in (1 << 20, 13):
        monkeypatch.setattr(scores_reference, "BLOCK", block)
        found.append(ReferenceLosses(MANIFEST, 0, value, "x"))
        found[-1].count_known(RankGrid.alone())
        found[-1].find_ceilings(0.2, RankGrid.alone())
    whole, pieces = found
    parts = [value[low:high][np.isfinite(value[low:high])] for low, high in itertools.pairwise(MANIFEST.offsets)]
    assert pieces.known[:, 0].tolist() == whole.known[:, 0].tolist() == [len(part) for part in parts]
    assert pieces.known.tolist() == whole.known.tolist()
    assert pieces.ceiling_C.tolist() == whole.ceiling_C.tolist()
    assert whole.ceiling_C == pytest.approx([np.quantile(part, 0.8) for part in parts], rel=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_a_component_without_reference_is_judged_by_its_losses(rule: str) -> None:
    fields = {name: value * 2 for name, value in MOMENTS.items()}
    of = against([np.nan, np.nan, 2.0], [1, 1, 0], **fields, ceiling=[np.inf] * 2, missing=[False, True])
    found = judge(make_rule(rule, 1.0), np.asarray([np.e, 1.0, 3.0]), of)
    assert found.margin_N[:2] == pytest.approx([1.0, 0.0])
    assert not found.left_out_N.any()


def test_weights_far_apart_stay_apart_and_what_is_left_out_comes_last() -> None:
    weight = exponentials(np.asarray([800.0, 792.0, -np.inf, -500.0]), np.asarray([0, 0, 0, 1]))
    assert weight[:2] == pytest.approx([1, np.exp(-8)])
    assert weight[2] == EXCLUDED
    assert weight[3] == 1
    alone = exponentials(np.asarray([-np.inf, -np.inf]), np.asarray([0, 0]))
    assert (alone == EXCLUDED).all()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_sums_are_those_of_the_visited_rows(tmp_path: Path, precision: str) -> None:
    loss = reference_of()
    loss[[0, 61, 62]] = np.nan
    engine = make(tmp_path, loss, reference={"folder": str(tmp_path / "reference"), "precision": precision})
    fake = Fake(engine)
    reference = engine.store.reference
    assert reference is not None
    assert reference.value.itemsize == (4 if precision == "float32" else 2)
    assert reference.known[:, 0].tolist() == [59, 23, 6]
    while not engine.done:
        fake.iterate(succeeded=engine.iteration % 7 != 6)
    found = reference.moments(reference.total)
    used = engine.store.usable(engine.store.score, engine.store.visits, 0.0)
    for c, (low, high) in enumerate(zip(MANIFEST.offsets, MANIFEST.offsets[1:], strict=False)):
        h = reference.value[low:high].astype(np.float64)
        rows = np.isfinite(h) & (engine.store.visits[low:high] > 0)
        x, y = h[rows], used[low:high][rows].astype(np.float64)
        assert found.count_C[c] == len(x)
        assert found.loss_C[c] == pytest.approx(y.mean(), abs=1e-5)
        assert found.reference_C[c] == pytest.approx(x.mean(), abs=1e-5)
        slope = np.clip(np.polyfit(x, y, 1)[0], 0, 4) if len(x) >= ENOUGH else 1.0
        assert found.slope_C[c] == pytest.approx(slope, abs=2e-3)
    assert found.count_C.max() > ENOUGH


def test_before_the_first_visit_the_reference_alone_decides(tmp_path: Path) -> None:
    """Nothing is known of the run, and the lowest reference losses are drawn most often."""
    engine = make(tmp_path, pruning_ratio=0.0, scorer="external", selection={"options": {"rule": "excess", "k": 200.0}})
    fake = Fake(engine)
    chosen, other = [], []
    h = reference_of()
    while not engine.done:
        record = fake.iterate()
        if record.evolving:
            chosen += h[record.chosen].tolist()
            other += h[np.setdiff1d(fake.batch.id, record.chosen)].tolist()
    assert not engine.store.visits.any()
    assert np.mean(chosen) < np.mean(other) - 0.8


def test_ceilings_leave_out_what_they_say(tmp_path: Path) -> None:
    engine = make(tmp_path, rule="band", selection={"options": {"rule": "band", "highest": 0.25, "known": 100.0}})
    reference = engine.store.reference
    assert reference is not None
    h = reference_of()
    for c, (low, high) in enumerate(zip(MANIFEST.offsets, MANIFEST.offsets[1:], strict=False)):
        assert (h[low:high] > reference.ceiling_C[c]).mean() == pytest.approx(0.25, abs=1.01 / (high - low))
    _, records = run(engine)
    chosen = np.concatenate([record.chosen for record in records if record.evolving])
    assert (h[chosen] > reference.ceiling_C[MANIFEST.locate(chosen)[0]]).mean() < 0.05


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scorer", ["fresh", "history", "every-k"])
@pytest.mark.parametrize("mixture", ["kept", "free"])
def test_a_resumed_run_chooses_what_an_uninterrupted_one_does(
    tmp_path: Path, rule: str, scorer: str, mixture: str
) -> None:
    settings = {"rule": rule, "scorer": scorer, "selection": {"mixture": mixture, "options": {"rule": rule}}}
    engine = make(tmp_path, **settings)
    fake = Fake(engine)
    for _ in range(23):
        fake.iterate()
    engine.save(tmp_path / "state")
    other = make(tmp_path, **settings)
    other.load(tmp_path / "state")
    twin = Fake(other)
    while not engine.done:
        assert fake.iterate().chosen.tolist() == twin.iterate().chosen.tolist()
    assert engine.store.reference is not None
    assert other.store.reference is not None
    assert engine.store.reference.total.tolist() == other.store.reference.total.tolist()


def test_pruning_keeps_what_is_left_to_learn(tmp_path: Path) -> None:
    engine = make(tmp_path, manifest=make_manifest((400,)), pruner_options={"sharpness": 4.0})
    fake = Fake(engine, lambda sample, iteration: 2.0)
    kept = {}
    while not engine.done:
        fake.iterate()
        kept |= {key: mask.to_bool() for key, mask in engine.sampler.masks.items()}
    h = reference_of(make_manifest((400,)))
    assert kept
    for mask in kept.values():
        assert h[mask].mean() < h[~mask].mean() - 0.5, (
            "all losses are alike: the lower the reference's, the more is left"
        )


def test_another_reference_does_not_resume(tmp_path: Path) -> None:
    engine = make(tmp_path)
    state = copy.deepcopy(engine.state_dict())
    assert state["terms"]["reference.folder"] == str(tmp_path / "reference")
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "reference"
    (tmp_path / "reference").rename(moved)
    make(tmp_path / "elsewhere").load_state_dict(state, {})  # the same losses under another path
    with pytest.raises(CheckpointError, match=r"`fingerprint of reference.folder` was '\w+' and is '\w+'"):
        make(tmp_path, reference_of() + 0.25).load_state_dict(state, {})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"reference": None}, r"`reference.folder` must be given with policy `reducible`"),
        (
            {"selection": {"policy": "es", "options": {}}},
            r"`selection.policy` must be `reducible` with `reference.folder`",
        ),
        ({"selection": {"weight_floor": 0.5}}, r"`selection.weight_floor` must be 0 with policy `reducible`"),
        ({"score_correction": "paper"}, r"`scores.correction` must be `debiased` with `reference`"),
        ({"rule": "residuum"}, r"Option `rule` of policy `reducible` must be one of excess, residual, band, static"),
        ({"selection": {"options": {"k": 0}}}, r"Option `k` of policy `reducible` must be above 0"),
        ({"selection": {"options": {"highest": 1}}}, r"Option `highest` of policy `reducible` must be in \[0, 1\)"),
        ({"scorer": "prefix"}, r"about the first 8 tokens of a row, as the run's are, but are about 16"),
        ({"reference": {"folder": "/nowhere"}}, r"`/nowhere` must be an `es_state` folder"),
        ({"reference": {"precision": "bfloat16"}}, r"`reference.precision` must be one of float32, float16"),
        ({"pruner_options": {"sharpness": 0}}, r"Option `sharpness` of pruner `eswp` must be above 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=told):
        make(tmp_path, **settings)


def test_whose_losses_they_are_is_asked(tmp_path: Path) -> None:
    engine = make(tmp_path)
    engine.save(tmp_path / "scores")
    with pytest.raises(CheckpointError, match=r"must hold the losses of one model, but holds the scores of a run"):
        make(tmp_path, reference=str(tmp_path / "scores"))
    other = Manifest((Component("c0", "x", 60, 60.0, "another file"), *MANIFEST.components[1:]), 16)
    with pytest.raises(CheckpointError, match=r"files of component `c0` must be those"):
        make(tmp_path, manifest=other)
    shorter = Manifest(MANIFEST.components, 8)
    with pytest.raises(CheckpointError, match=r"about the first 8 tokens|`seq_length` must be 16"):
        make(tmp_path, manifest=shorter)


def test_components_without_losses_are_named_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loss = reference_of()
    loss[85:] = np.nan  # all of c2
    loss[3:8] = np.nan
    engine = make(tmp_path, loss)
    assert any("no reference losses for c2: chosen by their own" in line for line in caplog.messages)
    assert any("5 of 60 rows of c0 have no reference loss" in line for line in caplog.messages)
    _, records = run(engine)
    assert {2} <= set(np.concatenate([record.components for record in records if record.evolving]).tolist())
    with pytest.raises(
        CheckpointError, match=r"Every component must have reference losses with `mixture: free`, but c2"
    ):
        make(tmp_path, selection={"mixture": "free"})


def test_arms_without_scores_read_no_reference(tmp_path: Path) -> None:
    for arm in ("uniform", "plain", "shortened", "uniform-prune"):
        assert make(tmp_path, arm=arm).store.reference is None
    assert make(tmp_path, arm="shuffled").store.reference is not None


def test_the_excess_is_followed_as_the_run_learns(tmp_path: Path) -> None:
    """What the reference finds hard too is left alone, what only the run finds hard is trained."""
    manifest = make_manifest((400,))
    h = np.where(np.arange(400) % 2 == 0, 1.0, 4.0)
    engine = make(tmp_path, h, manifest, pruning_ratio=0.0)
    _, records = run(engine, lambda sample, iteration: 4.0 + loss_of(sample, 0) / 100)
    chosen = np.concatenate([record.chosen for record in records if record.evolving])
    assert (chosen % 2 == 0).mean() > 0.9


class NaiveReducible(Naive):
    """Algorithm 1 with reducible weights, in dictionaries and loops: what is not Algorithm 1's own is overridden."""

    def __init__(self, engine: EvolvedSampling, reference: Any, rule: str) -> None:
        super().__init__(engine)
        self.reference, self.rule = [float(np.float32(h)) for h in reference], rule

    def weights(self, batch: list[int], loss: dict[int, float]) -> list[float]:
        return [math.exp(8.0 * self.margin(sample, loss[sample])) for sample in batch]

    def pruning_weight(self, sample: int) -> float:
        return math.exp(self.margin(sample, self.used(sample)))

    def rows(self, sample: int) -> range:
        c = int(self.manifest.locate(np.asarray([sample]))[0][0])
        return range(int(self.manifest.offsets[c]), int(self.manifest.offsets[c + 1]))

    def used(self, sample: int) -> float:
        """Debiased; what was never seen counts as the mean of its component, or of all where nothing of it was seen."""
        if self.visits[sample]:
            left = self.config.decay ** self.visits[sample]
            return (self.score[sample] - left / self.manifest.total) / (1 - left)
        seen = [row for row in self.rows(sample) if self.visits[row]] or [row for row in self.score if self.visits[row]]
        return float(np.mean([self.used(row) for row in seen])) if seen else 1 / self.manifest.total

    def margin(self, sample: int, loss: float) -> float:
        h = self.reference[sample]
        if self.rule == "static":
            return -h
        seen = [row for row in self.rows(sample) if self.visits[row]]
        if self.rule == "excess" or not seen:
            return loss - h
        x, y = [self.reference[row] for row in seen], [self.used(row) for row in seen]
        slope = min(max(float(np.polyfit(x, y, 1)[0]), 0.0), 4.0) if len(seen) >= ENOUGH else 1.0
        return loss - (float(np.mean(y)) + slope * (h - float(np.mean(x))))


@pytest.mark.parametrize("rule", ["excess", "residual", "static"])
@pytest.mark.parametrize("mixture", ["kept", "free"])
def test_a_whole_run_equals_a_naive_one(tmp_path: Path, rule: str, mixture: str) -> None:
    engine = make(tmp_path, scorer="fresh", selection={"mixture": mixture, "options": {"rule": rule}})
    naive = NaiveReducible(engine, reference_of(), rule)
    fake, chosen, masks = Fake(engine), [], {}
    expected = naive.run()
    while not engine.done:
        chosen.append(fake.iterate().chosen.tolist())
        masks |= {key: np.flatnonzero(mask.to_bool()).tolist() for key, mask in engine.sampler.masks.items()}
    assert chosen == expected
    assert len(naive.kept) >= 8
    assert {key: rows for key, rows in masks.items() if key in naive.kept} == naive.kept
