"""The chooser: policies over the finite, parts, ranks of one mind, and the guard."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest

from es_megatron.algorithm.guard import equivalent_batch, smooth
from es_megatron.core.choosing import Chooser, Known
from es_megatron.core.plan import plan_run
from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import ConfigError, LossError
from es_megatron.rank_grid import RankGrid
from tests.es_config import es_config

B = 16
ONE = np.zeros(B, np.int64)
"""All of one component."""
MANIFEST = Manifest((Component("a", "a", 4000, 1.0, "f"),), 8)


def chooser(**changes) -> Chooser:
    config = es_config(preset="paper", **changes)
    return Chooser(plan_run(config, MANIFEST, B, 2, 4000), RankGrid.alone(), 2)


def known(loss) -> Known:
    loss = np.asarray(loss, np.float32)
    return Known(loss, np.where(np.isfinite(loss), loss, 0).astype(np.float32))


def test_ranking_takes_the_largest_and_never_what_has_no_loss():
    loss = np.arange(1.0, B + 1)
    loss[[15, 12]] = np.nan, np.inf
    assert chooser(policy="big-loss").choose(0, known(loss), ONE).positions.tolist() == [10, 11, 13, 14]
    assert chooser(policy="small-loss").choose(0, known(loss), ONE).positions.tolist() == [0, 1, 2, 3]
    with pytest.raises(LossError, match=r"At least 4 sequences .* but 3 of 16 have"):
        chooser(policy="big-loss").choose(0, known([1, 2, 3] + [np.nan] * 13), ONE)


def test_ties_go_to_the_lower_position():
    assert chooser(policy="big-loss").choose(0, known(np.ones(B)), ONE).positions.tolist() == [0, 1, 2, 3]


def test_groups_are_ranked_by_their_mean():
    loss = np.asarray([1, 9, 4, 4, 6, 6, 0, 0, 8, 8, 0, 0, 0, 0, 0.5, 0.5])
    found = chooser(policy="big-loss", granularity="microbatch").choose(0, known(loss), ONE).positions.tolist()
    assert found == [4, 5, 8, 9]


def test_parts_choose_as_many_smaller_meta_batches_would():
    """What Algorithm 2 of AdaSelection gathers over mini-batches is what parts choose, mini-batch by mini-batch."""
    loss = np.random.default_rng(0).random(B) + 1
    whole = chooser(policy="adaselection", selection_parts=2)
    positions = whole.choose(5, known(loss), ONE).positions.tolist()
    plan = plan_run(es_config(preset="paper", policy="adaselection"), MANIFEST, B // 2, 2, 4000)
    half = Chooser(plan, RankGrid.alone(), 2)
    gathered = half.choose(5, known(loss[: B // 2]), ONE[: B // 2]).positions.tolist()
    half.commit()
    gathered += [B // 2 + p for p in half.choose(5, known(loss[B // 2 :]), ONE[: B // 2]).positions.tolist()]
    half.commit()
    whole.commit()
    assert positions == gathered
    assert whole.state["policy"] == half.state["policy"]


def test_parts_weigh_inclusion_in_each_part():
    found = chooser(selection_parts=2, inclusion_weights=True, policy="uniform").choose(0, known(np.ones(B)), ONE)
    assert (found.positions < B // 2).sum() == 2
    assert found.weights is not None
    assert len(found.weights) == 4
    assert (found.weights > 0).all()


def test_state_is_kept_by_commit_only():
    made = chooser(policy="adaselection")
    before = copy.deepcopy(made.state)
    made.choose(0, known(np.arange(1, B + 1)), ONE)
    made.discard()
    made.commit()
    assert made.state == before
    made.choose(0, known(np.arange(1, B + 1)), ONE)
    made.choose(0, known(np.arange(1, B + 1)), ONE)  # run again: as if once
    made.commit()
    other = chooser(policy="adaselection")
    other.choose(0, known(np.arange(1, B + 1)), ONE)
    other.commit()
    assert made.state == other.state != before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policy": "grad-norm", "scorer": "history"}, "`scorer` must be `fresh` or `prefix` with policy `grad-norm`"),
        ({"policy": "order", "inclusion_weights": True}, "`inclusion_weights` must be off with policy `order`"),
        ({"policy": "order", "weight_floor": 0.5}, "`weight_floor` must be off with policy `order`"),
        (
            {"policy_options": ("leave_out=0.3",), "weight_floor": 0.5},
            "`weight_floor` must be off with policy `es` and options",
        ),
        (
            {"policy_options": ("leave_out=0.3",), "inclusion_weights": True},
            "`inclusion_weights` must be off with policy `es` and options",
        ),
        (
            {"policy_options": ("leave_out=0.3",), "granularity": "microbatch"},
            "`granularity: microbatch` must be off with policy `es` and options",
        ),
    ],
)
def test_what_does_not_go_together(changes: dict[str, object], told: str):
    with pytest.raises(ConfigError, match=told):
        chooser(**changes)


def test_equivalent_batch_by_hand():
    assert equivalent_batch(np.ones(7)) == pytest.approx(1)
    assert equivalent_batch(np.zeros(7)) == 1.0
    # shares 0.75 and 0.25: 2 * (0.5625 + 0.0625) = 1.25
    assert equivalent_batch(np.asarray([3.0, 1.0])) == pytest.approx(1.25**0.5)
    average = 0.0
    for count, value in enumerate([1.0, 2.0, 3.0]):
        average = smooth(average, count, value, 3)
    assert average == pytest.approx(2.0)
    assert smooth(2.0, 3, 5.0, 3) == pytest.approx(3.0)


def test_guard_falls_back_where_weights_are_worth_less_than_their_price(caplog: pytest.LogCaptureFixture):
    made = chooser(guard="uniform", guard_window=3)
    assert made.plan.break_even_gain == pytest.approx(1 + B / (3 * 4))
    assert made.plan.fallback == 8  # 4 + 16 / 3, down to a multiple of what divides 4 and 16
    with caplog.at_level(logging.WARNING):
        for iteration in range(3):
            assert not made.fell
            assert len(made.choose(iteration, known(np.ones(B)), ONE).positions) == 4
            made.commit()
    assert made.fell
    assert "from now on 8 of 16 sequences are trained, at random" in caplog.text
    assert len(made.choose_any(3, ONE).positions) == 8
    assert chooser(guard="plain").plan.fallback == B


def test_guard_stays_where_weights_are_worth_it():
    made = chooser(guard="uniform", guard_window=3)
    loss = np.full(B, 1e-3)
    loss[:3] = 10.0
    assert equivalent_batch(loss) > made.plan.break_even_gain * 0.98
    loss[1:3] = 1e-3
    for iteration in range(6):
        made.choose(iteration, known(loss), ONE)
        made.commit()
    assert not made.fell
    free = chooser(guard="uniform", guard_window=1, scorer="history")
    free.choose(0, known(np.arange(1, B + 1)), ONE)
    free.commit()
    assert not free.fell  # free scores pay as soon as weights differ at all


def test_guard_off_never_falls_and_takes_a_fall_back():
    made = chooser(guard_window=1)
    made.choose(0, known(np.ones(B)), ONE)
    made.commit()
    assert not made.fell
    fallen = chooser(guard="uniform", guard_window=1)
    fallen.choose(0, known(np.ones(B)), ONE)
    fallen.commit()
    assert fallen.fell
    made.load(fallen.state)
    assert not made.fell


def test_guard_does_not_judge_what_was_never_scored():
    made = chooser(guard="uniform", guard_window=1, scorer="history")
    for iteration in range(3):
        made.choose(iteration, known(np.ones(B))._replace(informed=False), ONE)
        made.commit()
    assert not made.fell
    made.choose(3, known(np.ones(B)), ONE)
    made.commit()
    assert made.fell


@pytest.mark.parametrize(("kept", "meta_batch"), [(0.25, 32), (0.5, 32), (0.625, 32), (0.75, 48)])
def test_fallback_is_the_same_in_every_layout(kept: float, meta_batch: int):
    config = es_config(preset="paper", keep_ratio=kept, guard="uniform")
    quanta = [quantum for quantum in (1, 2, 4, 8) if kept * meta_batch % quantum == 0]
    found = [plan_run(config, MANIFEST, meta_batch, quantum, 4000).fallback for quantum in quanta]
    assert len(set(found)) == 1
    assert all(found[0] % quantum == 0 for quantum in quanta)
    assert kept * meta_batch <= found[0] <= min(meta_batch, kept * meta_batch + meta_batch / 3)


def test_the_placebo_may_need_norms():
    made = chooser(policy="grad-norm", arm="shuffled")
    assert made.needs_norm
    loss = np.arange(1, B + 1)
    assert len(made.choose(0, known(loss)._replace(norm=loss.astype(np.float32)), ONE).positions) == 4


@pytest.mark.parametrize("changes", [{"policy_options": ("power=16",)}, {"policy": "big-loss"}, {"policy": "adaboost"}])
def test_guard_judges_the_losses_whatever_a_policy_makes_of_them(changes: dict[str, object]):
    """Losses stand for gradient norms; a power makes the draw sharper, and the same sequences worth no more."""
    loss = np.linspace(1, 4, B)
    made = chooser(guard="uniform", guard_window=1, **changes)
    made.choose(0, known(loss), ONE)
    made.commit()
    assert made.state["guard"]["gain"] == pytest.approx(equivalent_batch(loss), rel=1e-6)
    assert made.fell
