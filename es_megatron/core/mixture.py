"""What selection makes of the user's blend: sequences trained of each component, against those it drew."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.mixture import first_of_each, share_out
from es_megatron.config import Mixture

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

LOGGER = logging.getLogger(__name__)

TOLD_DRIFT = 0.1
"""A component's share has moved by this part of itself when the run says so."""
NOISE = 4.0
"""Standard deviations of a draw at random that a drift must exceed to be told."""


class MixtureKeeper:
    """Groups that sequences compete in, and what each component is owed; its state is the caller's to stage.

    State: `owed`, claims that were not served, by component, in units of 1/B sequences (`kept` holds them within two
    sequences; with `free` they are the drift); `claimed`, all claims in those units; `told`, whether it was warned.
    """

    def __init__(self, mixture: Mixture, names: Sequence[str], meta_batch: int) -> None:
        """Keep or watch.

        Args:
            mixture: of the run.
            names: of the components, C of them.
            meta_batch: B.
        """
        self.mixture, self.meta_batch = mixture, meta_batch
        self._names = tuple(names)

    @staticmethod
    def fresh_state() -> dict[str, Any]:
        """Nothing is owed."""
        return {"owed": {}, "claimed": {}, "told": False}

    def groups(self, component: Int64) -> Int64:
        """Group that each sequence competes in, int64[B]: its component's, or everyone's."""
        return component if self.mixture == "kept" else np.zeros_like(component)

    def take(self, order: Int64, component: Int64, rate: int, state: dict[str, Any]) -> Int64:
        """Take the first of an order of preference, as many of each component as `mixture: kept` gives it.

        Args:
            order: int64[N], positions that can be taken, the most preferred first.
            component: int64[B'], of each position of the meta-batch or of a part of it.
            rate: sequences chosen of a whole meta-batch.
            state: what is owed.

        Returns:
            int64[rate * B' / B], rising positions.

        Raises:
            LossError: fewer can be taken.
        """
        drawn_C = np.bincount(component, minlength=len(self._names))
        eligible_C = np.bincount(component[order], minlength=len(self._names))
        shares = share_out(rate, self.meta_batch, drawn_C, eligible_C, self._array(state["owed"]))
        return first_of_each(order, component, shares.given_C)

    def note(self, chosen: Int64, component: Int64, rate: int, state: dict[str, Any]) -> None:
        """Write down in `state` what was trained of a meta-batch, or of a part of it, against what was claimed."""
        claim_C = rate * np.bincount(component, minlength=len(self._names))
        given_C = self.meta_batch * np.bincount(component[chosen], minlength=len(self._names))
        state["owed"] = self._named(self._array(state["owed"]) + claim_C - given_C)
        state["claimed"] = self._named(self._array(state["claimed"]) + claim_C)

    def warn(self, state: dict[str, Any]) -> None:
        """Say once that the run trains another blend than the user's, as soon as a share has moved by a tenth of it."""
        if self.mixture == "kept" or state["told"]:
            return
        owed_C, claimed_C = self._array(state["owed"]), self._array(state["claimed"])
        noise_C = NOISE * np.sqrt(claimed_C * float(self.meta_batch))
        moved = np.flatnonzero((np.abs(owed_C) > TOLD_DRIFT * claimed_C) & (np.abs(owed_C) > noise_C))
        if len(moved) == 0:
            return
        state["told"] = True
        all_claimed = int(claimed_C.sum())
        told = ", ".join(
            f"{self._names[c]} {claimed_C[c] / all_claimed:.1%} -> {(claimed_C[c] - owed_C[c]) / all_claimed:.1%}"
            for c in moved[:8]
        )
        LOGGER.warning(
            "`mixture: free` trains another blend than the one that is drawn (share drawn -> trained): %s. "
            "`selection.mixture: kept` keeps it.",
            told,
        )

    def follow(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a run over another blend, for the components that are still there; what is owed sums to 0."""
        state = {**self.fresh_state(), "told": bool(saved["told"])}
        owed_C, claimed_C = self._array(saved["owed"]), self._array(saved["claimed"])
        left = int(owed_C.sum())
        if left:
            owed_C[np.argmax(np.sign(left) * owed_C)] -= left
        return state | {"owed": self._named(owed_C), "claimed": self._named(claimed_C)}

    def _array(self, by_name: Mapping[str, int]) -> Int64:
        return np.asarray([by_name.get(name, 0) for name in self._names], dtype=np.int64)

    def _named(self, units_C: Int64) -> dict[str, int]:
        return {self._names[c]: int(units_C[c]) for c in np.flatnonzero(units_C)}
