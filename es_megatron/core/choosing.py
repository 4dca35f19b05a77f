"""From what is known of a meta-batch to the sequences that get a backward pass: policy, draw or ranking, and guard."""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.evolution import raise_to_floor
from es_megatron.algorithm.guard import equivalent_batch, smooth
from es_megatron.algorithm.margin import Against
from es_megatron.algorithm.policies import DRAWABLE, EXCLUDED, POLICIES, Evidence
from es_megatron.algorithm.randomness import Purpose, uniforms
from es_megatron.algorithm.selection import (
    Race,
    best,
    best_groups,
    inclusion_weights,
    race,
    race_groups,
    race_keys,
)
from es_megatron.core.mixture import MixtureKeeper
from es_megatron.core.plan import Plan
from es_megatron.errors import ConfigError
from es_megatron.rank_grid import RankGrid
from es_megatron.scoring import arm_of, scorer_of

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

LOGGER = logging.getLogger(__name__)


class Known(NamedTuple):
    """What is known of a meta-batch; arrays of length B, in the order of positions."""

    estimate: Float32
    """What each loss is now, as far as is known: the scoring pass's, nan where not finite; else the score as used."""
    weight: Float32
    """Weights of eq. 2.5, 0 where the loss is not finite; without a fresh pass the same scores."""
    norm: Float32 | None = None
    """Bound of gradient norms, where the policy asked for it."""
    informed: bool = True
    """Whether any of it was ever scored; what was not says nothing about what scores are worth."""
    against: Against | None = None
    """Reference losses, where the run has any."""


class Choice(NamedTuple):
    """Chosen positions and what their losses weigh."""

    positions: Int64
    """int64[b], rising."""
    weights: Float64 | None
    """float64[b]; None for 1."""


class Chooser:
    """Chooses b of B sequences, iteration by iteration; what it remembers is staged until `commit`."""

    def __init__(self, plan: Plan, grid: RankGrid, micro_batch: int) -> None:
        """Make the policy of the settings.

        Args:
            plan: of the run.
            grid: the ranks; world rank 0's choice counts, since logarithms differ between processor types.
            micro_batch: sequences of a group, for `granularity: microbatch`.

        Raises:
            ConfigError: no such policy or option, or settings that do not go with it.
        """
        config, selection = plan.config, plan.config.selection
        self.plan, self.grid, self.micro_batch = plan, grid, micro_batch
        self.config, self.arm = config, arm_of(config)
        self.policy = POLICIES.make(selection.policy, config.policy_options)
        if self.needs_norm and scorer_of(config).merges:
            raise ConfigError(
                f"`scorer.overlap` must be `none` with policy `{selection.policy}`, whose bounds of gradient norms "
                "come from a pass of their own, but is `merged` instead. Leave it out, or choose another `policy`."
            )
        if self.needs_norm and not scorer_of(config).bounds_norms:
            raise ConfigError(
                f"`scorer` must be `fresh` or `prefix` with policy `{selection.policy}`, but is `{config.scorer.kind}` "
                "instead: norms are not kept in the scores."
            )
        self._check_reference()
        if not self.policy.draws and (selection.inclusion_weights or selection.weight_floor > 0):
            name = "inclusion_weights" if selection.inclusion_weights else "weight_floor"
            raise ConfigError(
                f"`{name}` must be off with policy `{selection.policy}`, which ranks and does not draw. Switch it off."
            )
        if self.policy.logarithmic and selection.weight_floor > 0:
            raise ConfigError(
                f"`selection.weight_floor` must be 0 with policy `{selection.policy}`, whose weights span many orders "
                "of magnitude, so that a share of their mean is a floor for nearly all. Leave it out."
            )
        opposed = {
            "weight_floor": selection.weight_floor > 0,
            "inclusion_weights": selection.inclusion_weights,
            "granularity: microbatch": selection.granularity == "microbatch",
        }
        if self.policy.excludes and any(opposed.values()):
            name = next(name for name, on in opposed.items() if on)
            raise ConfigError(
                f"`{name}` must be off with policy `{selection.policy}` and options {dict(config.policy_options)}, "
                "which mean some sequences never to be chosen: it counts on all of them. Switch one of the two off."
            )
        crossing = selection.crosses_components
        if self.arm.selects and selection.mixture is None and crossing is not None:
            LOGGER.warning("`selection.mixture` is `free`, since `%s` chooses across components", crossing)
        names = [component.name for component in plan.schedule.manifest.components]
        self.mixture = MixtureKeeper(config.mixture, names, plan.meta_batch)
        self.state: dict[str, Any] = {
            "policy": {},
            "guard": {"iterations": 0, "gain": 0.0, "fell": False},
            "mixture": self.mixture.fresh_state(),
        }
        """JSON-able; of the last finished iteration."""
        self._next = self.state

    @property
    def needs_norm(self) -> bool:
        """Whether scoring passes have to tell the bound of gradient norms."""
        return self.policy.needs_norm and self.arm.scores

    @property
    def fell(self) -> bool:
        """Whether the guard has fallen back."""
        return self.config.guard.fallback != "off" and bool(self.state["guard"]["fell"])

    def choose(self, iteration: int, known: Known, component: Int64) -> Choice:
        """Choose by the policy.

        Args:
            iteration: of the run.
            known: of the meta-batch.
            component: int64[B], of each sequence.
        """
        self._next = copy.deepcopy(self.state)
        drawable = np.flatnonzero(known.weight)
        weight, draws = self._weigh(iteration, known, drawable, self.mixture.groups(component))
        group = self.mixture.groups(component)[drawable]
        if known.informed:
            kept = self.mixture.mixture == "kept"
            self._judge(relative_to_group(known.estimate[drawable], group) if kept else known.estimate[drawable])
        if self.arm.placebo:
            drawn = uniforms(self.config.seed, Purpose.SHUFFLE_BATCH, 0, iteration, 0, len(weight))
            shuffled = drawable[np.lexsort((drawn[drawable], group))]
            weight[drawable[np.argsort(group, kind="stable")]] = weight[shuffled]
        return self._choose_by(iteration, weight, component, self.plan.kept, draws=draws)

    def choose_any(self, iteration: int, component: Int64) -> Choice:
        """Choose at random: the uniform arms, and where the guard has fallen back."""
        self._next = copy.deepcopy(self.state)
        count = self.plan.fallback if self.fell else self.plan.kept
        return self._choose_by(iteration, np.ones(self.plan.meta_batch), component, count, draws=True)

    def commit(self) -> None:
        """Keep what the iteration has changed in the state."""
        before = self.fell
        self.mixture.warn(self._next["mixture"])
        self.state = self._next
        if self.fell and not before:
            LOGGER.warning(
                "guard: the scores are worth %.3f times the chosen sequences, and pay from %.3f on: from now on %d of "
                "%d sequences are trained, at random",
                self.state["guard"]["gain"],
                self.plan.break_even_gain,
                self.plan.fallback,
                self.plan.meta_batch,
            )

    def discard(self) -> None:
        """Forget what the iteration has changed."""
        self._next = self.state

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` stood; one without a mixture is of a version that did not keep any."""
        self.state = self._next = {"mixture": self.mixture.fresh_state(), **state}

    def follow(self, state: dict[str, Any]) -> None:
        """Go on after a run over another blend: policy and guard begin anew, components keep what they are owed."""
        if "mixture" in state:
            self.state = self._next = {**self.state, "mixture": self.mixture.follow(state["mixture"])}

    def _check_reference(self) -> None:
        """Refuse a reference that nobody reads, and a policy without the one it needs."""
        policy, folder = self.config.selection.policy, self.config.reference.folder
        if self.policy.needs_reference and folder is None:
            raise ConfigError(
                f"`reference.folder` must be given with policy `{policy}`, which holds losses against those of a "
                "reference. Make it with `es-megatron reference score`."
            )
        if folder is not None and not self.policy.needs_reference:
            raise ConfigError(
                f"`selection.policy` must be `reducible` with `reference.folder`, which no other reads, but is "
                f"`{policy}` instead. Leave one of the two out."
            )

    def _weigh(self, iteration: int, known: Known, drawable: Int64, group: Int64) -> tuple[Float64, bool]:
        """Weights float64[B] of the policy, and whether they draw; what has no loss weighs 0 or ranks last."""
        draws = self.policy.draws
        weight = np.full(len(known.weight), 0.0 if draws else -np.inf)
        parts = self.config.selection.parts
        for low in range(0, len(weight), len(weight) // parts):
            at = drawable[(drawable >= low) & (drawable < low + len(weight) // parts)]
            if len(at) == 0:
                continue
            norm = None if known.norm is None else known.norm[at].astype(np.float64)
            evidence = Evidence(
                known.estimate[at].astype(np.float64),
                known.weight[at].astype(np.float64),
                norm,
                self.plan.kept // parts,
                iteration,
                None if known.against is None else known.against.at(at),
            )
            weight[at], self._next["policy"] = self.policy.weigh(evidence, self._next["policy"])
            if draws and self.policy.logarithmic:
                weight[at] = exponentials(weight[at], group[at])
        if draws and self.config.selection.weight_floor > 0:
            mean = float(weight.sum()) / max(1, len(drawable))
            weight = raise_to_floor(weight, self.config.selection.weight_floor, mean)
        return weight, draws

    def _choose_by(self, iteration: int, weight: Float64, component: Int64, count: int, *, draws: bool) -> Choice:
        """Draw or rank, part by part."""
        parts = self.config.selection.parts if count == self.plan.kept else 1
        uniform = uniforms(self.config.seed, Purpose.SELECT, 0, iteration, 0, len(weight))
        size, taken = len(weight) // parts, list[Race]()
        for low in range(0, len(weight), size):
            at = slice(low, low + size)
            # Parts share what components are owed, one after the other.
            taken.append(self._choose_part(weight[at], uniform[at], component[at], count, draws=draws))
            self.mixture.note(taken[-1].chosen, component[at], count, self._next["mixture"])
        positions = np.concatenate([part.chosen + number * size for number, part in enumerate(taken)])
        positions = self.grid.broadcast(positions)
        if not self.config.selection.inclusion_weights:
            return Choice(positions, None)
        runner_up = self.grid.broadcast(np.asarray([part.runner_up for part in taken]))
        weights = [
            inclusion_weights(
                weight[number * size : (number + 1) * size], Race(chosen - number * size, float(tau)), count // parts
            )
            for number, (chosen, tau) in enumerate(zip(positions.reshape(parts, -1), runner_up, strict=True))
        ]
        return Choice(positions, np.concatenate(weights))

    def _choose_part(self, weight: Float64, uniform: Float64, component: Int64, rate: int, *, draws: bool) -> Race:
        """Choose `rate` of B sequences, or as many of a part of them as that makes."""
        count = rate * len(weight) // self.plan.meta_batch
        if self.config.selection.granularity == "microbatch":
            if draws:
                return Race(race_groups(weight, uniform, count, self.micro_batch), np.inf)
            return Race(best_groups(weight, count, self.micro_batch), np.inf)
        if self.mixture.mixture == "free":
            return race(weight, uniform, count) if draws else Race(best(weight, count), np.inf)
        keys = race_keys(weight, uniform) if draws else -weight
        order = np.argsort(keys, kind="stable")
        eligible = order[weight[order] > 0] if draws else order[np.isfinite(weight[order])]
        return Race(self.mixture.take(eligible, component, rate, self._next["mixture"]), np.inf)

    def _judge(self, weight: npt.NDArray[np.floating]) -> None:
        """Go on with the guard's average, and fall back where it says so; the same on every rank."""
        if self.config.guard.fallback == "off" or len(weight) == 0:
            return
        guard = self._next["guard"]
        gain = smooth(guard["gain"], guard["iterations"], equivalent_batch(weight), self.config.guard.window)
        gain = float(self.grid.broadcast(np.asarray([gain]))[0])
        guard["gain"], guard["iterations"] = gain, guard["iterations"] + 1
        if guard["iterations"] >= self.config.guard.window and gain <= self.plan.break_even_gain:
            guard["fell"] = True


def relative_to_group(weight: Float32, group: Int64) -> Float64:
    """Weights divided by the mean weight of their group, float64[N]: what they say within it."""
    count = np.bincount(group)
    mean = np.bincount(group, weight) / np.maximum(count, 1)
    return weight / np.maximum(mean, np.finfo(np.float64).tiny)[group]


def exponentials(logarithm: Float64, group: Int64) -> Float64:
    """Weights of which the logarithms are given, up to a factor for each group, float64[N]; -inf is taken last.

    The largest of a group is subtracted first: weights of a few nats apart, raised to a power, leave float64 otherwise.
    """
    largest = np.full(int(group.max()) + 1, -np.inf)
    np.maximum.at(largest, group, logarithm)
    with np.errstate(invalid="ignore"):
        weight = np.exp(logarithm - largest[group])
    return np.where(np.isneginf(logarithm), EXCLUDED, np.clip(weight, *DRAWABLE))
