"""Shares of components: owed to the unit, whatever is drawn, and warned of where nobody keeps them."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm.mixture import first_of_each, share_out
from es_megatron.core.choosing import Chooser, Known
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.mixture import MixtureKeeper
from es_megatron.core.plan import Layout, describe, plan_run
from es_megatron.errors import CheckpointError, ConfigError, LossError
from es_megatron.rank_grid import RankGrid
from tests.es_config import es_config
from tests.unit.naive import make_manifest
from tests.unit.test_engine import Fake, make, run


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_component_is_trained_as_it_is_drawn_to_within_two_sequences(data: st.DataObject) -> None:
    components = data.draw(st.integers(1, 300), label="components")
    meta_batch = data.draw(st.integers(2, 128), label="meta-batch")
    rate = data.draw(st.integers(1, meta_batch), label="chosen")
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30), label="seed"))
    share = random.dirichlet(np.full(components, data.draw(st.sampled_from([0.1, 1.0, 30.0]), label="evenness")))
    owed = np.zeros(components, np.int64)
    for _ in range(40):
        drawn = random.multinomial(meta_batch, share)
        shares = share_out(rate, meta_batch, drawn, drawn, owed)
        assert shares.given_C.sum() == rate
        assert (shares.given_C >= 0).all()
        assert (shares.given_C <= drawn).all()
        assert (shares.carry_C == owed + rate * drawn - meta_batch * shares.given_C).all()
        owed = shares.carry_C
        assert owed.sum() == 0
        assert np.abs(owed).max() <= 2 * meta_batch


def test_ties_and_what_cannot_be_given() -> None:
    none = np.zeros(3, np.int64)
    two = np.asarray([2, 2, 2])
    assert share_out(2, 6, two, two, none).given_C.tolist() == [1, 1, 0]
    assert share_out(2, 6, two, np.asarray([2, 0, 2]), none).given_C.tolist() == [1, 0, 1]
    assert share_out(2, 6, two, two, np.asarray([-12, 6, 6])).given_C.tolist() == [0, 1, 1]
    too_much = share_out(1, 6, two, two, np.asarray([6, 6, -12]))
    assert too_much.given_C.tolist() == [0, 1, 0], "one is taken from the lower of the two that claim alike"
    whole = share_out(6, 6, two, two, np.asarray([5, -5, 0]))
    assert whole.given_C.tolist() == [2, 2, 2]
    assert whole.carry_C.tolist() == [5, -5, 0]
    with pytest.raises(LossError, match=r"At least 2 sequences .* but 1 of 6"):
        share_out(2, 6, two, np.asarray([1, 0, 0]), none)


def test_the_first_of_each() -> None:
    component = np.asarray([1, 0, 1, 0, 1])
    assert first_of_each(np.asarray([4, 3, 0, 2, 1]), component, np.asarray([1, 2])).tolist() == [0, 3, 4]
    assert first_of_each(np.asarray([4, 0]), component, np.asarray([0, 1])).tolist() == [4]


POLICIES = ("es", "uniform", "loss", "big-loss", "small-loss", "adaboost", "coreset-2", "adaselection")


@pytest.mark.parametrize("scorer", ["fresh", "history", "every-k"])
@pytest.mark.parametrize(
    "more", [*({"policy": name} for name in POLICIES), {"arm": "uniform"}, {"arm": "shuffled"}], ids=str
)
@pytest.mark.parametrize("parts", [1, 2])
def test_whole_runs_keep_the_blend(scorer: str, more: dict[str, Any], parts: int) -> None:
    manifest = make_manifest((160, 40, 11))

    def losses(sample: int, iteration: int) -> float:
        return 5.0 + sample % 3 if sample < 160 else 0.2 + sample % 7 / 10  # a free race would train the first alone

    engine = make(
        manifest, samples=70 * 16, scorer=scorer, selection_parts=parts, selection={"mixture": "kept"}, **more
    )
    _, records = run(engine, losses)
    drawn, trained = np.zeros(3), np.zeros(3)
    for record in records:
        if record.evolving:
            drawn += np.bincount(record.drawn, minlength=3)
            trained += np.bincount(record.components, minlength=3)
    assert np.abs(trained - drawn / 4).max() <= 2
    assert trained.sum() > 150


def test_bad_rows_cost_their_component_no_more_than_they_are() -> None:
    """What a component could not be given while its losses were bad, it gets as soon as it can."""
    engine = make(make_manifest((100, 100)), samples=60 * 16, max_bad_losses=0.6, selection={"mixture": "kept"})
    phases = engine.plan.schedule.phases
    middle = (phases.start + phases.stop) // 2

    def losses(sample: int, iteration: int) -> float:
        return float("nan") if sample < 100 and iteration < middle else 1.0

    _, records = run(engine, losses)
    trained = np.asarray([np.bincount(r.components, minlength=2) for r in records if r.evolving])
    assert (trained[: middle - phases.start, 0] == 0).all()
    assert trained[:, 0].sum() == pytest.approx(trained[:, 1].sum(), abs=4)


def test_a_skipped_step_and_a_rerun_owe_nothing() -> None:
    engine = make(make_manifest((50, 30, 11)), selection={"mixture": "kept"})
    fake = Fake(engine)
    while not engine.plan.selects_at(engine.iteration):
        fake.iterate()
    before = engine.chooser.state
    fake.iterate(succeeded=False)
    assert engine.chooser.state == before
    fake.batch = engine.draw()
    engine.step(fake.batch, fake)
    engine.step(fake.batch, fake)
    engine.finish(True)
    component = fake.batch.component
    claimed = engine.plan.kept * np.bincount(component, minlength=3)
    given = 16 * np.bincount(engine.last.components, minlength=3)
    owed = engine.chooser.state["mixture"]["owed"]
    assert [owed.get(f"c{c}", 0) for c in range(3)] == (claimed - given).tolist()


@pytest.mark.parametrize("parts", [1, 2])
def test_uniform_and_the_fall_back_are_shared_out_alike(parts: int) -> None:
    manifest = make_manifest((400, 400))
    config = es_config(
        preset="paper", selection={"mixture": "kept"}, selection_parts=parts, guard="uniform", guard_window=1
    )
    made = Chooser(plan_run(config, manifest, 16, 2, 4000), RankGrid.alone(), 2)
    component = np.arange(16) // 12
    assert np.bincount(component[made.choose_any(0, component).positions]).tolist() == [3, 1]
    made.choose(0, Known(np.ones(16, np.float32), np.ones(16, np.float32)), component)
    made.commit()
    assert made.fell
    positions = made.choose_any(1, component).positions
    assert len(positions) == made.plan.fallback > 4
    assert np.bincount(component[positions]).tolist() == [len(positions) * 3 // 4, len(positions) // 4]


def test_the_guard_looks_within_components() -> None:
    """Weights that differ between components only are worth nothing where the blend is kept."""
    loss = np.where(np.arange(16) < 8, 9.0, 0.5).astype(np.float32)
    for mixture, gain in (("kept", 1.0), ("free", 1.3)):
        config = es_config(preset="paper", selection={"mixture": mixture}, guard="uniform", guard_window=5)
        made = Chooser(plan_run(config, make_manifest((400, 400)), 16, 2, 4000), RankGrid.alone(), 2)
        made.choose(0, Known(loss, loss), np.arange(16) // 8)
        made.commit()
        assert made.state["guard"]["gain"] == pytest.approx(gain, abs=0.06)


@pytest.mark.parametrize("setting", ["granularity", "inclusion_weights"])
def test_what_crosses_components_is_free_or_refused(setting: str, caplog: pytest.LogCaptureFixture) -> None:
    value = "microbatch" if setting == "granularity" else True
    config = es_config(selection={setting: value})
    assert config.mixture == "free"
    Chooser(plan_run(config, make_manifest((400, 400)), 16, 2, 4000), RankGrid.alone(), 2)
    assert sum("`selection.mixture` is `free`" in line for line in caplog.messages) == 1
    with pytest.raises(ConfigError, match=rf"`selection.mixture` must be `free` with `{setting}.*Leave one"):
        es_config(selection={setting: value, "mixture": "kept"})
    with pytest.raises(ConfigError, match=r"`selection.mixture` must be one of kept, free"):
        es_config(selection={"mixture": "keep"})


def test_a_free_run_says_once_what_it_makes_of_the_blend(caplog: pytest.LogCaptureFixture) -> None:
    def losses(sample: int, iteration: int) -> float:
        return 5.0 if sample < 200 else 0.2

    for mixture, lines in (("free", 1), ("kept", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(make(make_manifest((200, 200)), samples=80 * 16, selection={"mixture": mixture}), losses)
        told = [line for line in caplog.messages if "trains another blend" in line]
        assert len(told) == lines
        assert all("c0 50.0% -> " in line and "c1 50.0% -> " in line for line in told)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        run(make(make_manifest((200, 200)), samples=80 * 16, arm="uniform", selection={"mixture": "free"}), losses)
    assert not any("trains another blend" in line for line in caplog.messages), "a draw at random is no drift"


def test_states_of_before_go_on_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    def settings_of(**selection: Any) -> dict[str, Any]:
        return {"selection": {"keep_ratio": 0.25, "options": {}, **selection}, "scorer": "fresh", "preset": "default"}

    old = make(**settings_of(mixture="free"))
    fake = Fake(old)
    for _ in range(15):
        fake.iterate()
    state = copy.deepcopy(old.state_dict())
    del state["terms"]["selection.mixture"], state["chooser"]["mixture"]  # as versions without a mixture wrote it
    new = make(**settings_of())
    assert new.config.mixture == "kept"
    new.load_state_dict(state, dict(old.sampler.masks))
    new.store.load(old.store.score.copy(), old.store.visits.copy())
    assert sum("did not keep the mixture" in line for line in caplog.messages) == 1
    twin = Fake(new)
    while not old.done:
        assert fake.iterate().chosen.tolist() == twin.iterate().chosen.tolist()
    again = make(**settings_of())
    caplog.clear()
    again.load_state_dict(new.state_dict(), dict(new.sampler.masks))
    assert again.chooser.mixture.mixture == "free", "as the checkpoint says"
    assert not any("did not keep the mixture" in line for line in caplog.messages)
    with pytest.raises(CheckpointError, match=r"`selection.mixture` was 'free' and is 'kept'"):
        make(**settings_of(mixture="kept")).load_state_dict(state, dict(old.sampler.masks))


def test_what_is_owed_follows_names_over_a_changed_blend() -> None:
    before = MixtureKeeper("kept", ["a", "b", "c"], 16)
    state = before.fresh_state()
    before.note(np.arange(4), np.repeat([0, 1, 2], [6, 5, 5]), 4, state)
    assert state["owed"] == {"a": -40, "b": 20, "c": 20}
    after = MixtureKeeper("kept", ["c", "new", "a"], 16).follow(state)
    assert after["owed"] == {"c": 20, "a": -20}, "it sums to 0 without what is gone"
    assert after["claimed"] == {"c": 20, "a": 24}


@pytest.mark.parametrize("scorer", ["fresh", "history", "every-k"])
def test_the_plan_tells_what_is_not_visited_when_pruning_begins(scorer: str) -> None:
    """Expected for a choice at random, so that scores all alike come close."""
    sizes = (4000, 900)
    manifest = make_manifest(sizes)
    config = es_config(scorer=scorer, pruning_ratio=0.3, keep_ratio=0.5, anneal=0.1, policy="uniform", seed=3)
    engine = EvolvedSampling(config, manifest, RankGrid.alone(), meta_batch=32, micro_batch=1, train_samples=20_000)
    told = engine.plan.unvisited()
    found: dict[int, float] = {}
    fake = Fake(engine)
    while len(found) < len(sizes):
        visited = [engine.store.visits[low:high] > 0 for low, high in itertools.pairwise(manifest.offsets)]
        fake.iterate()
        for component, epoch in engine.decided:
            if epoch == engine.plan.schedule.epochs.first_pruned[component]:
                found.setdefault(component, 1 - float(visited[component].mean()))
    assert [found[c] for c in range(len(sizes))] == pytest.approx(told, abs=0.02)
    assert "of the rows when pruning begins" in describe(engine.plan, Layout(8, 8), 16, calibrated=False)


def test_the_plan_says_nothing_of_visits_where_no_scores_decide() -> None:
    for changes in ({"arm": "uniform-prune"}, {"pruning_ratio": 0.0}):
        config = es_config(**{"pruning_ratio": 0.3, "seed": 3, **changes})
        engine = EvolvedSampling(
            config, make_manifest((400, 90)), RankGrid.alone(), meta_batch=32, micro_batch=1, train_samples=4000
        )
        assert np.isnan(engine.plan.unvisited()).all()
