"""Meta-batches that are scored one step early, through the engine over a fake framework."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.merged import check_merged
from es_megatron.errors import ConfigError
from es_megatron.rank_grid import RankGrid
from tests.unit.naive import make_manifest
from tests.unit.test_engine import SIZES, B, Fake, Naive, loss_of, run


def make(**changes: Any) -> EvolvedSampling:
    given = {"pruning.ratio": 0.3, "order.mask_lag": 3, "seed": 5, "selection.max_bad_losses": 0.5, **changes}
    overlap = EvolvedSamplingConfig.from_mapping({"preset": "paper"}).replaced({"scorer.overlap": "merged", **given})
    blend = make_manifest(SIZES)
    return EvolvedSampling(overlap, blend, RankGrid.alone(), meta_batch=B, micro_batch=1, train_samples=40 * B)


def restless(sample: int, iteration: int) -> float:
    """A loss that a step changes much."""
    return loss_of(13 * sample + 29 * iteration, iteration)


def first_of(engine: EvolvedSampling) -> int:
    return engine.plan.schedule.phases.start


def test_a_whole_run_equals_algorithm_1_with_losses_one_step_old() -> None:
    """But for the first selecting iteration, which scores by a pass of its own, and annealing, which needs none."""
    engine = make()
    phases = engine.plan.schedule.phases

    def early(sample: int, iteration: int) -> float:
        return restless(sample, iteration - (phases.start < iteration < phases.stop))

    expected = Naive(engine, early).run()
    fake, records = run(engine, restless)
    assert [record.chosen.tolist() for record in records] == expected
    assert expected != Naive(make(), restless).run(), "an old loss is not a fresh one"
    assert fake.scored == [phases.start]
    assert [record.scored // B for record in records[phases.start - 1 : phases.start + 2]] == [0, 2, 1]
    assert records[phases.stop - 1].scored == 0
    assert sum(record.scored for record in records) == engine.plan.sequences_scored


def test_a_skipped_step_keeps_what_was_scored_early_and_a_rerun_overwrites_it() -> None:
    engine = make()
    fake = Fake(engine)
    while engine.iteration < first_of(engine) + 2:
        fake.iterate()
    at = engine.iteration
    kept = engine.ahead.of(engine.sampler.batch(at))
    fake.batch = engine.draw()
    wrong = Fake(engine, lambda n, t: 77.0)
    wrong.batch = fake.batch
    engine.step(fake.batch, wrong)
    assert engine.ahead.of(fake.batch) is kept, "a step that runs again chooses by the same losses"
    engine.step(fake.batch, fake)
    visits = engine.store.visits.copy()
    engine.finish(False)
    assert (engine.store.visits == visits).all()
    following = engine.sampler.batch(at + 1)
    np.testing.assert_array_equal(
        engine.ahead.of(following), [np.float32(loss_of(n, at)) for n in following.id.tolist()]
    )
    assert engine.ahead.of(engine.sampler.batch(at)) is None
    fake.iterate()
    assert len(fake.scored) == 1


def resumed(engine: EvolvedSampling, **changes: Any) -> EvolvedSampling:
    other = make(**changes)
    other.load_state_dict(engine.state_dict(), dict(engine.sampler.masks))
    other.store.load(engine.store.score.copy(), engine.store.visits.copy())
    return other


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_run_goes_on_as_it_would_have(at: str) -> None:
    """From a state saved between iterations, and from one of an iteration that was given up."""
    engine = make()
    fake = Fake(engine)
    while engine.iteration < 12:
        fake.iterate()
    if at == "after":
        spoiled = Fake(engine, lambda n, t: 77.0)
        spoiled.batch = engine.draw()
        engine.step(spoiled.batch, spoiled)
        engine.store.discard()
    twin = Fake(resumed(engine))
    while not engine.done:
        assert fake.iterate().chosen.tolist() == twin.iterate().chosen.tolist()
    assert twin.scored == []


def test_what_was_scored_early_of_other_samples_or_another_scorer_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    engine = make()
    fake = Fake(engine)
    while engine.iteration < 12:
        fake.iterate()
    without = Fake(resumed(engine, **{"scorer.overlap": "none"}))
    without.iterate()
    assert without.scored == [12]
    state = engine.state_dict()
    assert "ahead" not in without.engine.state_dict()
    plain = {name: value for name, value in state.items() if name != "ahead"}
    state["ahead"]["ids"] += 1
    for each in (state, plain):
        other = make()
        other.load_state_dict(each, dict(engine.sampler.masks))
        other.store.load(engine.store.score.copy(), engine.store.visits.copy())
        own = Fake(other)
        own.iterate()
        assert own.scored == [12], "scored anew"
    assert "iteration 12 is scored anew" in caplog.text


def test_bad_losses_are_left_out_one_step_later() -> None:
    _fake, records = run(make(), lambda n, t: math.nan if n in (3, 61) else loss_of(n, t))
    chosen = {n for record in records if record.evolving for n in record.chosen.tolist()}
    assert chosen
    assert not {3, 61} & chosen


def test_the_guard_ends_scoring_ahead() -> None:
    engine = make(**{"guard.fallback": "uniform", "guard.window": 3})
    fake, records = run(engine, lambda n, t: 1.0 + n * 1e-6)
    start = first_of(engine)
    assert [record.scored // B for record in records[start : start + 5]] == [2, 1, 1, 0, 0]
    assert fake.scored == [start]


def test_masks_are_decided_one_meta_batch_further_ahead() -> None:
    engine = make(**{"order.mask_lag": None})
    assert engine.epochs.read_ahead(0) == 1
    assert engine.epochs.read_ahead(4) == 5
    with pytest.raises(ConfigError, match=r"`order.mask_lag` must be >= 4 .*scored early\), but is 3 instead"):
        make().epochs.read_ahead(3)


@pytest.mark.parametrize("kind", ["history", "every-k", "external"])
def test_scorers_that_do_not_score_every_meta_batch_do_not_merge(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"`scorer.overlap` must be `none` with `scorer: {kind}`"):
        EvolvedSamplingConfig.from_mapping({"scorer": {"kind": kind, "overlap": "merged"}})


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ({"kind": "fresh", "micro_batch_size": 4}, "`scorer.micro_batch_size` must be left out .* but is 4"),
        ({"kind": "prefix", "prefix_share": 0.3}, r"`scorer.prefix_share` must cut sequences of 64 tokens evenly"),
        ({"kind": "prefix", "prefix_share": 0.125}, "scoring micro-batches of 16 sequences do not cut a rank's 24"),
    ],
)
def test_scoring_micro_batches_must_fit_the_training_schedule(scorer: dict[str, Any], message: str) -> None:
    config = EvolvedSamplingConfig.from_mapping({"scorer": {**scorer, "overlap": "merged"}})
    with pytest.raises(ConfigError, match=message):
        check_merged(config, 64, 24, 2, 1)
    check_merged(config.replaced({"scorer.overlap": "none"}), 64, 24, 2, 1)
    check_merged(EvolvedSamplingConfig.from_mapping({"scorer": {"kind": "fresh", "overlap": "merged"}}), 64, 24, 2, 4)
