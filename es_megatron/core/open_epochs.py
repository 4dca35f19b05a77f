"""The pruned epochs that are open: whose scores decided their masks, and what the samples they kept stand for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.core.epoch_pruning import EpochPruning, StandIn
from es_megatron.core.plan import Plan
from es_megatron.core.skipped import SkippedRows
from es_megatron.data.mask import KeptMask
from es_megatron.data.sampler import MetaBatch, Sampler
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.scores.store import Lookup, ScoreStore

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
EpochKey = tuple[int, int]

LOGGER = logging.getLogger(__name__)

UNVISITED = "unvisited"
"""Term: what rows without a visit count as in pruning, `mean` or, in states of versions before, `start`."""


class Entry(NamedTuple):
    """How the mask of an epoch came about."""

    iteration: int
    """The scores before this iteration decided it."""
    stand_in: StandIn | None
    """What the weight of kept samples with a low score is, where the pruner rescales."""


class OpenEpochs:
    """Decides kept masks when they are due, and remembers what is needed while their epochs last."""

    def __init__(self, plan: Plan, store: ScoreStore, sampler: Sampler) -> None:
        """Start with none.

        Args:
            plan: of the run.
            store: whose scores decide.
            sampler: gets the masks.
        """
        self.plan, self.sampler = plan, sampler
        self.pruning = EpochPruning(store)
        self.skipped = SkippedRows(plan.config.order.skip, plan.schedule, store.grid)
        sampler.skipped = self.skipped.ids
        self.entries: dict[EpochKey, Entry] = {}
        self.lag = plan.config.order.mask_lag or 1
        """Iterations between the scores that decide a mask and its first draw."""
        self._read_ahead = 0

    def read_ahead(self, batches: int) -> int:
        """Say how many meta-batches the data loader reads ahead; returns how far ahead masks are decided then."""
        # a meta-batch that is scored one step early is drawn one step early
        self._read_ahead = batches + self.plan.scorer.merges
        self.lag = self.plan.config.order.mask_lag or max(1, self._read_ahead)
        if self.lag < self._read_ahead:
            raise ConfigError(
                f"`order.mask_lag` must be >= {self._read_ahead} (loader workers times prefetch"
                f"{', and one meta-batch that is scored early' * self.plan.scorer.merges}), but is {self.lag} instead. "
                "Raise it, or use fewer workers."
            )
        return self.lag

    @property
    def terms(self) -> dict[str, Any]:
        """Which scores decide a mask, what they count as, and how meta-batches grow on the way."""
        counted = "mean" if self.pruning.unvisited_as_mean else "start"
        return {"mask_lag": self.lag, UNVISITED: counted, "ramp": self.plan.schedule.ramp.to_json()}

    def adopt(self, terms: Mapping[str, Any]) -> None:
        """Decide masks as the run of a checkpoint did, where the settings do not say.

        Raises:
            CheckpointError: the data loader reads further ahead than it did.
        """
        self.pruning.unvisited_as_mean = terms.get(UNVISITED, "start") == "mean"
        if self.plan.config.order.mask_lag is not None:
            return
        saved = int(terms["mask_lag"])
        if saved < self._read_ahead:
            raise CheckpointError(
                f"The data loader must read at most {saved} meta-batches ahead, since the checkpoint's run decides "
                f"kept masks so far ahead, but reads {self._read_ahead}. Use fewer workers, or a smaller prefetch."
            )
        self.lag = saved

    @property
    def decided(self) -> dict[EpochKey, int]:
        """Iteration whose beginning's scores decided each mask, by (component, epoch)."""
        return {key: entry.iteration for key, entry in self.entries.items()}

    def decide(self, iteration: int) -> None:
        """Decide the masks that are due, but for those that a checkpoint had; collective."""
        for due in self.plan.schedule.due(iteration, self.lag):
            key = due.component, due.epoch
            if key in self.sampler.masks:
                continue
            stand_in = self.pruning.stand_in(due.component)
            mask = self.sampler.masks[key] = self.pruning.prune(*key)
            self.entries[key] = Entry(iteration, stand_in)
            name = self.plan.schedule.manifest.components[due.component].name
            told = "scores before iteration %d: epoch %d of `%s` keeps %d of %d samples, drawn from iteration %d on"
            LOGGER.info(told, iteration, due.epoch, name, mask.count, mask.samples, due.first_iteration)

    def forget(self, iteration: int) -> None:
        """Drop what ends before this iteration."""
        self.sampler.forget(iteration)
        self.entries = {key: entry for key, entry in self.entries.items() if key in self.sampler.masks}

    @property
    def rescales(self) -> bool:
        """Whether losses of some open epoch have weights."""
        return any(entry.stand_in is not None for entry in self.entries.values())

    def weights(self, batch: MetaBatch, found: Lookup) -> Float64 | None:
        """What the losses of a meta-batch's samples are multiplied by, for those that were left out.

        Scores are those the sample had when its epoch's mask was decided, but for samples that the `mask_lag`
        iterations since then have changed. A sample never visited counted as the mean itself, and so not as low.

        Args:
            batch: the meta-batch.
            found: its scores before this iteration changes them.

        Returns:
            float64[B]; None where all are 1.
        """
        if not self.rescales:
            return None
        weight = np.ones(len(found.used))
        raw = self.plan.config.correction == "paper" and not self.pruning.unvisited_as_mean
        judged = (found.visits > 0) | raw
        for (component, epoch), entry in self.entries.items():
            if entry.stand_in is not None:
                here = judged & (batch.component == component) & (batch.epoch == epoch)
                weight[here & (found.used < entry.stand_in.threshold)] = entry.stand_in.factor
        return weight

    def rate(self, batch: MetaBatch) -> float:
        """What the learning rate of this meta-batch is multiplied by: n / m of the epochs it draws from, on average."""
        if not self.pruning.pruner.corrects_rate:
            return 1.0
        epochs = self.plan.schedule.epochs
        first, after = epochs.first_pruned[batch.component], epochs.after_pruned[batch.component]
        pruned = (batch.epoch >= first) & (batch.epoch < after)
        return float(np.where(pruned, epochs.full[batch.component] / epochs.kept[batch.component], 1.0).mean())

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps: `decided`, `rescaled`, and `skipped` where there are any."""
        rescaled = [[*key, *entry.stand_in] for key, entry in sorted(self.entries.items()) if entry.stand_in]
        return {
            "decided": [[*key, when] for key, when in sorted(self.decided.items())],
            "rescaled": rescaled,
            **self.skipped.to_json(),
        }

    def load(
        self,
        masks: dict[EpochKey, KeptMask],
        decided: Iterable[Sequence[int]],
        rescaled: Iterable[Sequence[float]],
    ) -> None:
        """Go on where a checkpoint stood; collective."""
        self.sampler.masks = masks
        if self.plan.config.order.mask_folder is not None:
            share = self.pruning.masks.share
            self.sampler.masks = {key: share(mask.packed, mask.samples) for key, mask in sorted(masks.items())}
        stand_ins = {(int(c), int(e)): StandIn(threshold, factor) for c, e, threshold, factor in rescaled}
        self.entries = {(int(c), int(e)): Entry(int(when), stand_ins.get((int(c), int(e)))) for c, e, when in decided}
