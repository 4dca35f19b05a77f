"""Batch-level policies against their formulas, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from es_megatron.algorithm import registry
from es_megatron.algorithm.policies import POLICIES, Evidence, Policy, Weighed
from es_megatron.errors import ConfigError

LOSS = np.asarray([2.0, 4.0, 1.0, 3.0])


def weigh(
    name: str, options=MappingProxyType({}), *, loss=LOSS, weight=None, norm=None, chosen=2, iteration=0, state=None
) -> Weighed:
    weight = loss if weight is None else weight
    evidence = Evidence(np.asarray(loss), np.asarray(weight), norm, chosen, iteration)
    return POLICIES.make(name, options).weigh(evidence, state or {})


def top(name: str, count: int = 2, **more) -> set[int]:
    assert not POLICIES.make(name).draws
    return set(np.argsort(-weigh(name, chosen=count, **more).weight_B, kind="stable")[:count].tolist())


def test_es_draws_by_its_weights_and_loss_by_losses():
    weight = np.asarray([0.5, 0.25, 1.0, 2.0])
    assert weigh("es", weight=weight).weight_B.tolist() == weight.tolist()
    assert weigh("loss", weight=weight).weight_B.tolist() == LOSS.tolist()
    assert weigh("uniform").weight_B.tolist() == [1, 1, 1, 1]
    assert POLICIES.make("es").draws
    assert POLICIES.make("loss").draws
    assert POLICIES.make("uniform").draws


def test_es_sharper_flatter_and_without_the_highest():
    np.testing.assert_allclose(weigh("es", {"power": 2}).weight_B, [4, 16, 1, 9])
    np.testing.assert_allclose(weigh("es", {"power": -1}).weight_B, [1 / 2, 1 / 4, 1, 1 / 3])
    out = weigh("es", {"leave_out": 0.5}).weight_B
    assert out[[0, 2]].tolist() == [2, 1]
    assert 0 < out[1] < 1e-300
    assert 0 < out[3] < 1e-300
    # as many as are to be chosen stay
    assert (weigh("es", {"leave_out": 0.9}, chosen=3).weight_B > 1e-300).sum() == 3


def test_largest_smallest_extremes_and_middle():
    assert top("order") == top("big-loss") == {1, 3}
    assert top("small-loss") == {2, 0}
    assert top("coreset-1") == {1, 2}  # the largest and the smallest
    assert top("coreset-1", loss=np.asarray([6.0, 5, 4, 3, 2, 1]), count=4) == {0, 1, 4, 5}
    assert top("coreset-2", loss=np.asarray([0.0, 10.0, 4.0, 5.0])) == {2, 3}  # mean 4.75


def test_gradient_norm_takes_the_norms():
    assert top("grad-norm", norm=np.asarray([0.3, 0.1, 0.2, 0.05])) == {0, 2}
    assert POLICIES.make("grad-norm").needs_norm


def test_adaboost_weights():
    found = weigh("adaboost", {"largest": 0.8}).weight_B  # losses scaled by 0.2: 0.4, 0.8, 0.2, 0.6
    expected = [0.5 * math.log((1 + x) / (1 - x)) for x in (0.4, 0.8, 0.2, 0.6)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_adaselection_by_hand():
    options = {"methods": ["big-loss", "small-loss"], "beta": 0.5, "curriculum": -0.5}
    first = weigh("adaselection", options)
    big = np.exp(LOSS) / np.exp(LOSS).sum()
    small = np.exp(-LOSS) / np.exp(-LOSS).sum()
    reward = np.exp(-LOSS / 30.0)  # t = 1; 4 + 16 + 1 + 9 = 30
    np.testing.assert_allclose(first.weight_B, reward * (0.5 * big + 0.5 * small), rtol=1e-12)
    assert first.state == {"weight": [0.5, 0.5], "loss": [3.5, 1.5]}  # means of {4, 3} and of {1, 2}
    loss = np.asarray([2.0, 2.0, 1.0, 3.0])
    second = weigh("adaselection", options, loss=loss, iteration=3, state=first.state)
    raw = np.asarray([0.5 * math.exp(0.5 * (3.5 - 2.5) / 3.5), 0.5 * math.exp(0.5 * (1.5 - 1.5) / 1.5)])
    weight = raw / raw.sum()
    np.testing.assert_allclose(second.state["weight"], weight, rtol=1e-12)
    big, small = (np.exp(sign * loss) / np.exp(sign * loss).sum() for sign in (1, -1))
    reward = np.exp(-(4**-0.5) * loss / 18.0)
    np.testing.assert_allclose(second.weight_B, reward * (weight[0] * big + weight[1] * small), rtol=1e-12)


@pytest.mark.parametrize("power", [-40, -9, 9, 40])
def test_weights_of_any_power_can_be_drawn_by(power: float):
    weight = np.asarray([0.0, 1e-9, 1.0, 50.0])
    found = weigh("es", {"power": power}, weight=weight).weight_B
    assert (found > 0).all()
    assert np.isfinite((found.sum() ** 1, 1 / found.min())).all()
    assert np.argmax(found) == (3 if power > 0 else 0)


def test_adaselection_outlives_a_first_loss_far_above_the_score_it_began_with():
    state = weigh("adaselection", loss=np.full(4, 1e-5)).state
    for iteration in range(1, 4):
        found = weigh("adaselection", iteration=iteration, state=state)
        state = found.state
        assert np.isfinite(found.weight_B).all()
        assert min(state["weight"]) > 0
        assert sum(state["weight"]) == pytest.approx(1)


def test_adaselection_with_every_method_stays_finite():
    options = {"methods": ["big-loss", "small-loss", "uniform", "adaboost", "coreset-1", "coreset-2"]}
    state = {}
    for iteration in range(200):
        found = weigh("adaselection", options, loss=LOSS * 0.97**iteration, iteration=iteration, state=state)
        state = found.state
        assert np.isfinite(found.weight_B).all()
        assert sum(state["weight"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("adaselction", {}, "There is no policy `adaselction`. Did you mean `adaselection`?"),
        ("es", {"powr": 2}, "There is no option `powr` of policy `es`. Did you mean `power`?"),
        ("loss", {"a": 1}, "There is no option `a` of policy `loss`. It has none."),
        ("es", {"power": "high"}, "must be of type float, but is 'high'"),
        ("es", {"leave_out": 1}, r"`leave_out` of policy `es` must be in \[0, 1\)"),
        ("adaboost", {"largest": 1}, r"`largest` of policy `adaboost` must be in \(0, 1\)"),
        ("adaselection", {"methods": "big-loss+es"}, "`methods` of policy `adaselection` must be some of"),
        ("adaselection", {"beta": 2}, r"`beta` of policy `adaselection` must be in \[-1, 1\]"),
    ],
)
def test_what_cannot_be_made(name: str, options: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        POLICIES.make(name, options)


@dataclass(frozen=True)
class NewestFirst(Policy):
    """A policy of another package."""

    offset: int = 1
    draws = False

    def weigh(self, evidence: Evidence, state: dict[str, list[float]]) -> Weighed:
        return Weighed(np.arange(len(evidence.estimate_B)) + float(self.offset), state)


def test_other_packages_bring_policies_by_entry_point(monkeypatch: pytest.MonkeyPatch):
    point = EntryPoint("newest-first", f"{__name__}:NewestFirst", "es_megatron.policies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "es_megatron.policies" else [])
    assert "newest-first" in POLICIES.names()
    policy = POLICIES.make("newest-first", {"offset": 3})
    assert policy.weigh(Evidence(LOSS, LOSS, None, 2, 0), {}).weight_B.tolist() == [3, 4, 5, 6]


class Unfinished(Policy):
    """A policy that weighs nothing."""


@pytest.mark.parametrize("name", ["LOSS", "Unfinished"])
def test_an_entry_point_that_is_no_policy_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch):
    point = EntryPoint("oldest", f"{__name__}:{name}", "es_megatron.policies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(
        ConfigError, match=rf"`oldest = .*:{name}` of `es_megatron.policies` must be a class that inherits"
    ):
        POLICIES.make("oldest")
