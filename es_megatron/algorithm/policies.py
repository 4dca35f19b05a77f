"""Batch-level policies: what a meta-batch's losses make of its sequences, behind one registry.

A policy gives a weight to each sequence. Those that *draw* enter a race with it, in which b win at random; those that
*rank* take the b largest. State, where a policy has any, is a mapping of lists that a checkpoint carries.
Shapes: B sequences of a meta-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from es_megatron.algorithm.margin import RULES, Against, Excess, judge, make_rule
from es_megatron.algorithm.registry import Registry
from es_megatron.errors import ConfigError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
State = dict[str, list[float]]

DRAWABLE = 1e-260, 1e260
"""Weights are held within this, so that sums of them are neither 0 nor infinite."""

EXCLUDED = 1e-306
"""Weight of what is never to be chosen: not 0, which would mean that it has no loss; the race takes it last."""


class Evidence(NamedTuple):
    """What is known of a meta-batch when it is chosen from; every loss in it is finite."""

    estimate_B: Float64
    """Mean token loss at the current parameters as far as is known, in nats: fresh, or the stored score as used."""
    weight_B: Float64
    """The weight of Evolved Sampling (eq. 2.5); without a fresh pass the stored score."""
    norm_B: Float64 | None
    """Bound of the gradient's norm, for policies that need it."""
    chosen: int
    """How many are going to be chosen (b)."""
    iteration: int
    against: Against | None = None
    """Reference losses, for policies that need them."""


class Weighed(NamedTuple):
    """What a policy says."""

    weight_B: Float64
    """Above 0 and finite for those that draw, their logarithms for `logarithmic` ones; any finite number for those
    that rank."""
    state: State


class Policy(ABC):
    """A batch-level policy; instances are made of options, and never change."""

    draws = True
    """Whether weights enter a race, or the largest win."""
    needs_norm = False
    """Whether the scoring pass has to tell the bound of gradient norms."""
    needs_reference = False
    """Whether it needs the losses of a reference (`reference.folder`)."""
    logarithmic = False
    """Whether its weights are logarithms, -inf for what is never to be chosen."""
    ceiling: float | None = None
    """Share of a component with the highest reference losses whose lower bound it asks for."""

    @property
    def excludes(self) -> bool:
        """Whether it means some sequences never to be chosen: a weight floor or whole micro-batches would."""
        return False

    @abstractmethod
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        """Weigh the sequences of a meta-batch; empty state at the first call."""

    def margin(self, loss_N: Float64, against: Against) -> Float64:
        """What is left to learn, float64[N], -inf for nothing: the excess, where a policy does not say otherwise.

        Pruners ask it of policies that need a reference.
        """
        return judge(Excess(), loss_N, against).margin_N


POLICIES: Registry[Policy] = Registry(Policy, "policy", "es_megatron.policies")


@POLICIES.register("es")
@dataclass(frozen=True)
class EvolvedSamplingPolicy(Policy):
    """Evolved Sampling (arXiv 2509.23461): draw by w; with `power` 1 and `leave_out` 0 as published."""

    power: float = 1.0
    """Weights are raised to this: above 1 sharper, between 0 and 1 flatter, below 0 the low ones are preferred."""
    leave_out: float = 0.0
    """Share of the meta-batch, that with the highest weights, that is never chosen: damage, mostly. In [0, 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.leave_out < 1:
            raise ConfigError(f"Option `leave_out` of policy `es` must be in [0, 1), but is {self.leave_out} instead.")

    @property
    @override
    def excludes(self) -> bool:
        return self.leave_out > 0

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        with np.errstate(over="ignore", divide="ignore"):
            weight_B = np.clip(np.maximum(evidence.weight_B, np.finfo(np.float32).tiny) ** self.power, *DRAWABLE)
        out = min(int(self.leave_out * len(weight_B)), len(weight_B) - evidence.chosen)
        if out > 0:
            weight_B[np.argsort(evidence.weight_B, kind="stable")[-out:]] = EXCLUDED
        return Weighed(weight_B, state)


@POLICIES.register("uniform")
@dataclass(frozen=True)
class UniformPolicy(Policy):
    """Draw uniformly: for runs where only the pruner looks at scores."""

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        return Weighed(np.ones(len(evidence.estimate_B)), state)


@POLICIES.register("loss")
@dataclass(frozen=True)
class LossPolicy(Policy):
    """Draw proportionally to the loss (Katharopoulos & Fleuret 2017): Evolved Sampling with beta1 = 0."""

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        return Weighed(np.maximum(evidence.estimate_B, np.finfo(np.float32).tiny), state)


@POLICIES.register("order")
@POLICIES.register("big-loss")
@dataclass(frozen=True)
class BigLossPolicy(Policy):
    """The b largest losses: Ordered SGD (Kawaguchi & Lu 2020), and Big Loss as AdaSelection has it."""

    draws = False

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        return Weighed(evidence.estimate_B, state)


@POLICIES.register("small-loss")
@dataclass(frozen=True)
class SmallLossPolicy(Policy):
    """The b smallest losses (Shah et al. 2020, as AdaSelection has it)."""

    draws = False

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        return Weighed(-evidence.estimate_B, state)


@POLICIES.register("grad-norm")
@dataclass(frozen=True)
class GradientNormPolicy(Policy):
    """The b largest bounds of the gradient's norm (Katharopoulos & Fleuret 2018; AdaSelection takes the largest).

    The bound is the norm of the mean token loss's gradient at the logits, softmax minus target: no backward pass.
    """

    draws = False
    needs_norm = True

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        assert evidence.norm_B is not None  # the engine asks for it
        return Weighed(evidence.norm_B, state)


@POLICIES.register("adaboost")
@dataclass(frozen=True)
class AdaBoostPolicy(Policy):
    """Draw by AdaBoost's weights, log((1 + l) / (1 - l)) / 2 (AdaSelection eq. 1), with losses scaled below 1.

    The b largest of them would be the b largest losses, since the weight rises with the loss.
    """

    largest: float = 0.99
    """What the largest loss of the meta-batch is scaled to, in (0, 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 < self.largest < 1:
            raise ConfigError(
                f"Option `largest` of policy `adaboost` must be in (0, 1), but is {self.largest} instead."
            )

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        return Weighed(
            np.maximum(np.arctanh(scaled(evidence.estimate_B, self.largest)), np.finfo(np.float32).tiny), state
        )


@POLICIES.register("coreset-1")
@dataclass(frozen=True)
class ExtremesPolicy(Policy):
    """Half of the choice from the largest losses, half from the smallest (AdaSelection, Coresets Approximation 1)."""

    draws = False

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        return Weighed(extremes(evidence.estimate_B), state)


@POLICIES.register("coreset-2")
@dataclass(frozen=True)
class MeanPolicy(Policy):
    """The b losses closest to the meta-batch's mean (AdaSelection, Coresets Approximation 2)."""

    draws = False

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        return Weighed(-np.abs(evidence.estimate_B - evidence.estimate_B.mean()), state)


LARGEST_STEP = 30.0
"""The exponent of eq. 3 is held within this: a first loss far above the score it started from must not end methods."""

MIXABLE = ("big-loss", "small-loss", "uniform", "adaboost", "coreset-1", "coreset-2")


@POLICIES.register("adaselection")
@dataclass(frozen=True)
class AdaSelectionPolicy(Policy):
    """AdaSelection (Zhang et al. 2024): methods weighted by how their losses fall, times a curriculum reward (eq. 3-5).

    A method's importance of a sample is the softmax of what it ranks by; its loss is the mean over the b samples that
    it would choose. `selection.parts` above 1 fills the batch over that many parts of the meta-batch, as Algorithm 2
    fills it over mini-batches.
    """

    methods: tuple[str, ...] = ("big-loss", "small-loss", "uniform")
    """Of `MIXABLE`."""
    beta: float = 0.5
    """How fast methods gain or lose weight, in [-1, 1] (eq. 3)."""
    curriculum: float = -0.5
    """Exponent of the iteration in the reward (gamma of eq. 4); below 0 easy samples are preferred at first only."""

    draws = False

    def __post_init__(self) -> None:
        """Check the options."""
        unknown = [name for name in self.methods if name not in MIXABLE]
        if unknown or not self.methods:
            raise ConfigError(
                f"Option `methods` of policy `adaselection` must be some of {', '.join(MIXABLE)}, "
                f"but is {', '.join(self.methods) or 'empty'} instead."
            )
        if not -1 <= self.beta <= 1:
            raise ConfigError(f"Option `beta` of policy `adaselection` must be in [-1, 1], but is {self.beta} instead.")

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        loss_B = evidence.estimate_B
        ranks_MB = np.stack([self._ranking(name, loss_B) for name in self.methods])
        alpha_MB = softmax(ranks_MB)
        top_Mb = np.argsort(-ranks_MB, axis=1, kind="stable")[:, : evidence.chosen]
        uniform_M = np.asarray([name == "uniform" for name in self.methods])
        loss_M = np.where(uniform_M, loss_B.mean(), loss_B[top_Mb].mean(axis=1))
        weight_M = np.asarray(state.get("weight", [1.0 / len(self.methods)] * len(self.methods)))
        if "loss" in state:
            before_M = np.asarray(state["loss"])
            step_M = np.clip(self.beta * (before_M - loss_M) / np.maximum(before_M, 1e-12), -LARGEST_STEP, LARGEST_STEP)
            weight_M = np.maximum(weight_M * np.exp(step_M - step_M.max()), 1e-12)
            weight_M = weight_M / weight_M.sum()
        time = float(evidence.iteration + 1) ** self.curriculum
        reward_B = np.exp(-time * loss_B / np.maximum((loss_B**2).sum(), 1e-12))
        return Weighed(reward_B * (weight_M @ alpha_MB), {"weight": weight_M.tolist(), "loss": loss_M.tolist()})

    def _ranking(self, name: str, loss_B: Float64) -> Float64:
        match name:
            case "big-loss":
                return loss_B
            case "small-loss":
                return -loss_B
            case "adaboost":
                return np.arctanh(scaled(loss_B, 0.99))
            case "coreset-1":
                return extremes(loss_B)
            case "coreset-2":
                return -np.abs(loss_B - loss_B.mean())
            case _:
                return np.zeros_like(loss_B)


def scaled(loss_B: Float64, largest: float) -> Float64:
    """Losses scaled so that the largest of them is `largest`, float64[B]."""
    return loss_B * (largest / max(float(loss_B.max()), 1e-12))


def extremes(loss_B: Float64) -> Float64:
    """Distance of each loss's rank from the middle rank, float64[B]: large at both ends."""
    rank_B = np.empty(len(loss_B))
    rank_B[np.argsort(loss_B, kind="stable")] = np.arange(len(loss_B))
    return np.abs(rank_B - (len(loss_B) - 1) / 2)


def softmax(values_MB: npt.NDArray[Any]) -> Float64:
    """Softmax over the last axis."""
    shifted_MB = np.exp(values_MB - values_MB.max(axis=-1, keepdims=True))
    return shifted_MB / shifted_MB.sum(axis=-1, keepdims=True)


@POLICIES.register("reducible")
@dataclass(frozen=True)
class ReduciblePolicy(Policy):
    """Draw by what is left to learn: weight exp(k x), x the margin of a loss over a reference's (`margin.py`)."""

    rule: str = "excess"
    """What the margin is: `excess`, `residual`, `band` or `static`."""
    k: float = 8.0
    """Sharpness of the draw per nat, > 0; `band` draws evenly."""
    highest: float = 0.2
    """Share of a component with the highest reference losses that `band` leaves out, in [0, 1)."""
    known: float = 1.0
    """How far below the fitted line a loss is known by heart for `band`, in nats, > 0."""
    ranks: bool = False
    """Whether the b largest margins are taken, in place of a draw."""

    needs_reference = True
    logarithmic = True

    def __post_init__(self) -> None:
        """Check the options."""
        if self.rule not in RULES:
            raise ConfigError(
                f"Option `rule` of policy `reducible` must be one of {', '.join(RULES)}, but is {self.rule} instead."
            )
        for name, value, allowed in (
            ("k", self.k, self.k > 0),
            ("highest", self.highest, 0 <= self.highest < 1),
            ("known", self.known, self.known > 0),
        ):
            if not allowed:
                limits = "in [0, 1)" if name == "highest" else "above 0"
                raise ConfigError(f"Option `{name}` of policy `reducible` must be {limits}, but is {value} instead.")

    @property
    def draws(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Unless it ranks."""
        return not self.ranks

    @property
    def ceiling(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """For `band` alone."""
        return self.highest if self.excludes else None

    @property
    @override
    def excludes(self) -> bool:
        return make_rule(self.rule, self.known).excludes

    @override
    def weigh(self, evidence: Evidence, state: State) -> Weighed:
        assert evidence.against is not None  # the engine sees to it
        return Weighed(self.k * self.margin(evidence.estimate_B, evidence.against), state)

    @override
    def margin(self, loss_N: Float64, against: Against) -> Float64:
        found = judge(make_rule(self.rule, self.known), loss_N, against)
        return np.where(found.left_out_N, -np.inf, found.margin_N)
