"""What is left to learn of a sequence: its loss l against the loss h that a reference model has of it.

Rules of `selection.options: {rule: ...}` of policy `reducible`. All of them take l, h and what is known of the whole
component; each gives a margin x, and sequences with a larger one are preferred. Shapes: N sequences, C components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import override

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

ENOUGH = 32
"""Visited rows of a component from which on a line is fitted through them; before, its slope is 1."""
STEEPEST = 4.0
"""A fitted slope is held within [0, this]: a higher loss of the reference never means more to learn."""


class Moments(NamedTuple):
    """Running means over the visited rows of each component that have a reference loss, float64[C]."""

    count_C: Float64
    loss_C: Float64
    """Mean of l; of all components where nothing of one was visited."""
    reference_C: Float64
    """Mean of h; of all rows with one where nothing was visited."""
    slope_C: Float64
    """Of the least-squares line of l on h."""


class Margins(NamedTuple):
    """What a rule says."""

    margin_N: Float64
    """In nats, finite."""
    left_out_N: npt.NDArray[np.bool_]
    """Never to be chosen while there are others."""


class Rule(ABC):
    """A rule; instances never change."""

    excludes = False
    """Whether it leaves sequences out."""

    @abstractmethod
    def margins(self, loss_N: Float64, reference_N: Float64, moments: Moments, ceiling_N: Float64) -> Margins:
        """Judge sequences.

        Args:
            loss_N: l, finite.
            reference_N: h, finite.
            moments: of each sequence's component: every field float64[N].
            ceiling_N: the h above which `band` leaves out, of each sequence's component.
        """


def nothing(like_N: Float64) -> npt.NDArray[np.bool_]:
    """No sequence is left out, bool[N]."""
    return np.zeros(len(like_N), np.bool_)


class Excess(Rule):
    """x = l - h: the reducible loss (Mindermann et al. 2022), the excess loss of Rho-1 (Lin et al. 2024).

    It misleads once the run has outgrown the reference: clean text then falls below its h, and damage does not.
    """

    @override
    def margins(self, loss_N: Float64, reference_N: Float64, moments: Moments, ceiling_N: Float64) -> Margins:
        return Margins(loss_N - reference_N, nothing(loss_N))


class Residual(Rule):
    """x = l - (the least-squares line of l on h, over the visited rows of the component): a better run cancels out."""

    @override
    def margins(self, loss_N: Float64, reference_N: Float64, moments: Moments, ceiling_N: Float64) -> Margins:
        fitted_N = moments.loss_C + moments.slope_C * (reference_N - moments.reference_C)
        return Margins(loss_N - fitted_N, nothing(loss_N))


class Band(Rule):
    """Leave out the highest h of a component (damage), and what is far below the fitted line (known by heart).

    The rest is drawn evenly: the rule says what not to train, not what to prefer.
    """

    excludes = True

    def __init__(self, known: float) -> None:
        """Take how far below the line a loss counts as known by heart, in nats."""
        self._known = known

    @override
    def margins(self, loss_N: Float64, reference_N: Float64, moments: Moments, ceiling_N: Float64) -> Margins:
        fitted_N = moments.loss_C + moments.slope_C * (reference_N - moments.reference_C)
        left_out_N = (reference_N > ceiling_N) | (loss_N < fitted_N - self._known)
        return Margins(np.zeros(len(loss_N)), left_out_N)


class Static(Rule):
    """x = -h: a filter by the reference alone, which learns nothing of the run; the control of the others."""

    @override
    def margins(self, loss_N: Float64, reference_N: Float64, moments: Moments, ceiling_N: Float64) -> Margins:
        return Margins(-reference_N, nothing(loss_N))


RULES = ("excess", "residual", "band", "static")


def make_rule(name: str, known: float) -> Rule:
    """A rule by its name.

    Args:
        name: one of `RULES`.
        known: option of `band`.
    """
    made = {"excess": Excess(), "residual": Residual(), "band": Band(known), "static": Static()}
    return made[name]


class Against(NamedTuple):
    """What sequences are held against."""

    reference_N: npt.NDArray[np.floating]
    """h; nan where there is none."""
    component_N: Int64
    moments: Moments
    """Of every component."""
    ceiling_C: Float64
    """The h above which `band` leaves out; inf for other rules."""
    missing_C: npt.NDArray[np.bool_]
    """Components without any h, whose sequences are judged by their own losses alone."""

    def at(self, positions: Int64) -> Against:
        """The same of some of the sequences."""
        return self._replace(reference_N=self.reference_N[positions], component_N=self.component_N[positions])


def judge(rule: Rule, loss_N: Float64, against: Against) -> Margins:
    """Margins of sequences: one without an h has the margin of its component's means, and is never left out.

    Args:
        rule: the rule.
        loss_N: l, finite.
        against: what else is known of them.
    """
    own = Moments(*(field[against.component_N] for field in against.moments))
    lacking_N = ~np.isfinite(against.reference_N)
    reference_N = np.where(lacking_N, own.reference_C, against.reference_N).astype(np.float64)
    ceiling_N = against.ceiling_C[against.component_N]
    found = rule.margins(np.where(lacking_N, own.loss_C, loss_N), reference_N, own, ceiling_N)
    alone_N = against.missing_C[against.component_N]
    log_loss_N = np.log(np.maximum(loss_N, np.finfo(np.float32).tiny))
    return Margins(np.where(alone_N, log_loss_N, found.margin_N), found.left_out_N & ~lacking_N)
