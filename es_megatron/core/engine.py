"""One training step of Evolved Sampling, written once against what a framework can do.

position -> (component, epoch, row) -> meta-batch -> losses -> scores.evolve -> weights -> choice -> training ->
optimizer step -> scores.commit. All ranks run the same code on the same numbers; collectives are few and small.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.selection import assign, owners, positions_of
from es_megatron.checkpoint.compatibility import check_terms
from es_megatron.checkpoint.es_state import EsStateWriter, SaveReport, ScoreRange, load_es_state
from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.choosing import Choice, Chooser, Known
from es_megatron.core.open_epochs import OpenEpochs
from es_megatron.core.plan import Plan, plan_run
from es_megatron.core.step import Framework, StepRecord, Work
from es_megatron.data.manifest import Manifest
from es_megatron.data.mask import KeptMask
from es_megatron.data.sampler import MetaBatch, Sampler
from es_megatron.errors import CheckpointError, LossError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.copies import check_copies
from es_megatron.scores.store import ScoreStore

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

LOGGER = logging.getLogger(__name__)

NAMED_BAD_ROWS = 8

COPY_CHECK_INTERVAL = 1000
"""Iterations between comparisons of the copies of the scores, which read all of them."""


class EvolvedSampling:
    """The state of Evolved Sampling in a run, and its step."""

    def __init__(
        self,
        config: EvolvedSamplingConfig,
        manifest: Manifest,
        grid: RankGrid,
        *,
        meta_batch: int,
        micro_batch: int,
        train_samples: int,
        micro_batch_multiple: int = 1,
        warm_start: WarmStart = start_with_scores,
    ) -> None:
        """Plan the run and start at its first iteration; collective.

        Args:
            config: settings.
            manifest: the blend.
            grid: this rank's place.
            meta_batch: sequences drawn per iteration, B (Megatron's global batch size).
            micro_batch: sequences in a training micro-batch of one rank.
            train_samples: draws of the plain run.
            micro_batch_multiple: what the micro-batches of a rank must be a multiple of (the pipeline size where stages
                are interleaved).
            warm_start: says where the data order begins, and loads scores to begin with: `initial_scores` at
                iteration 0, or what a checkpoint says.

        Raises:
            ConfigError: sizes that do not divide, a run too long.
            CheckpointError: initial scores that are damaged or of other data.
        """
        self.config, self.manifest, self.grid = config, manifest, grid
        self.meta_batch, self.micro_batch = meta_batch, micro_batch
        quantum = math.lcm(micro_batch * grid.dp_size * micro_batch_multiple, config.selection_parts)
        self.store = ScoreStore(manifest, config, grid)
        origin = warm_start(self.store)
        self.plan: Plan = plan_run(config, manifest, meta_batch, quantum, train_samples, origin)
        self.chooser = Chooser(self.plan, grid, micro_batch)
        self.sampler = Sampler(self.plan.schedule, config.seed)
        self.own: Int64 = positions_of(grid.dp_rank, grid.dp_size, meta_batch, micro_batch)
        """Positions of the meta-batch that this rank loads."""
        self.iteration = origin.iteration
        self.epochs = OpenEpochs(self.plan, self.store, self.sampler)
        self.rate_factor = 1.0
        """What the learning rate of this iteration is multiplied by; 1 but for pruners that correct it."""
        self.last: StepRecord | None = None
        self._owners = owners(grid.dp_size, meta_batch, micro_batch)
        self._seconds: dict[str, float] = {}

    @property
    def needs_norm(self) -> bool:
        """Whether a scoring pass has to tell the bound of gradient norms too."""
        return self.chooser.needs_norm

    @property
    def decided(self) -> dict[tuple[int, int], int]:
        """Iteration whose beginning's scores decided each open kept mask, by (component, epoch)."""
        return self.epochs.decided

    @property
    def done(self) -> bool:
        """Whether the planned run is over."""
        return self.iteration >= self.plan.schedule.iterations

    def draw(self) -> MetaBatch:
        """Decide the kept masks that are due, and draw this iteration's meta-batch."""
        self._seconds = {}
        with self._timed("order"):
            self.epochs.decide(self.iteration)
            batch = self.sampler.batch(self.iteration)
            self.rate_factor = self.epochs.rate(batch)
            return batch

    def step(self, batch: MetaBatch, framework: Framework) -> Any:
        """Score, choose and train; what `batch` changes in the scores is staged until `finish`.

        May be called again for the same iteration (upstream's re-run machinery does): the last call counts.

        Args:
            batch: the meta-batch of `draw`.
            framework: does the passes.

        Returns:
            What the framework's training call returned.

        Raises:
            LossError: too many losses are not finite.
        """
        if self.plan.evolving_iterations == 0 or not self.plan.schedule.phases.evolving(self.iteration):
            return self._step_whole(batch, framework)
        if self.config.scores and self._scores_fresh():
            return self._step_fresh(batch, framework)
        return self._step_known(batch, framework)

    def finish(self, succeeded: bool) -> None:
        """Close the iteration: scores are committed if the optimizer stepped, and forgotten if it skipped."""
        if succeeded:
            self.store.commit(self.iteration)
            self.chooser.commit()
        else:
            self.store.discard()
            self.chooser.discard()
        self.iteration += 1
        self.epochs.forget(self.iteration)
        if self.iteration % COPY_CHECK_INTERVAL == 0:
            self.check_copies()

    def check_copies(self) -> None:
        """Compare the copies of each score range across tensor and pipeline ranks; collective over the world.

        Raises:
            LayoutError: on every rank, if copies differ.
        """
        check_copies(self.grid, self.store.checksum, self.iteration)

    def save(self, folder: str | Path, **more: Any) -> SaveReport:
        """Write the whole state of all ranks into a folder, sealed; collective.

        Args:
            folder: made, or replaced once the new one is complete.
            more: what `load` shall give back besides, JSON-able: the caller's own totals.

        Raises:
            CheckpointError: on every rank, if it failed on any; an older folder is untouched.
        """
        return self.writer(folder, more).save()

    def writer(self, folder: str | Path, more: Mapping[str, Any], *, copied: bool = False) -> EsStateWriter:
        """`save` in steps, for those who write while training goes on: of a copy of the scores then."""
        store = self.store
        score, visits = (store.score.copy(), store.visits.copy()) if copied else (store.score, store.visits)
        masks = {key: mask.packed for key, mask in self.sampler.masks.items()}
        state = {"engine": self.state_dict(), **more}
        scores = ScoreRange(self.manifest.total, store.low, score, visits)
        return EsStateWriter(folder, scores, masks, state, self.manifest.to_json(), self.grid)

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Go on where `save` stood, under any number of ranks; collective.

        Returns:
            What `save` was given besides.

        Raises:
            CheckpointError: missing, damaged, of other data, or of another run.
        """
        saved = load_es_state(folder, self.manifest.total, self.grid, self.manifest.to_json())
        sizes = self.manifest.sizes
        masks = {key: KeptMask(packed, int(sizes[key[0]])) for key, packed in saved.masks.items()}
        self.load_state_dict(saved.state["engine"], masks)
        self.store.load(saved.score, saved.visits)
        return {name: value for name, value in saved.state.items() if name != "engine"}

    def state_dict(self) -> dict[str, Any]:
        """Position and terms of the run, JSON-able; scores and masks are arrays of their own."""
        schedule = self.plan.schedule
        return {
            "iteration": self.iteration,
            "terms": self._terms(),
            "origin": schedule.origin.to_json(),
            "stood_for": schedule.stood_for(self.iteration),
            **self.epochs.to_json(),
            "chooser": self.chooser.state,
        }

    def load_state_dict(self, state: Mapping[str, Any], masks: Mapping[tuple[int, int], KeptMask]) -> None:
        """Go on where `state_dict` stood; collective. Scores are loaded into `store` separately.

        Raises:
            CheckpointError: unknown or missing keys, or terms that decide the data order and differ.
        """
        expected = {"iteration", "terms", "origin", "stood_for", "decided", "rescaled", "chooser"}
        if set(state) != expected:
            raise CheckpointError(
                f"The state must have the keys {sorted(expected)}, but has {sorted(state)} instead. "
                "Load it with the version of es_megatron that wrote it."
            )
        check_terms(
            {**state["terms"], "origin": state["origin"]},
            {**self._terms(), "origin": self.plan.schedule.origin.to_json()},
        )
        self.iteration = int(state["iteration"])
        self.epochs.load(dict(masks), state["decided"], state["rescaled"])
        self.chooser.load(state["chooser"])

    def _terms(self) -> dict[str, Any]:
        """Settings that decide which samples come when and what the saved state means."""
        schedule = self.plan.schedule
        return {
            "meta_batch": self.meta_batch,
            "train_samples": schedule.train_samples,
            "iterations": schedule.iterations,
            **self.config.terms,
        }

    def _scores_fresh(self) -> bool:
        if self.chooser.fell:
            return False
        if self.config.scorer == "every-k":
            return self.iteration % self.config.score_every == 0
        return self.config.scorer in ("fresh", "prefix")

    def _step_whole(self, batch: MetaBatch, framework: Framework) -> Any:
        """Train on everything; scores, where kept, come from the training forward itself."""
        everything = np.arange(self.meta_batch)
        weights = None
        if self.epochs.rescales:
            with self._timed("exchange"):
                weights = self.epochs.weights(batch, *self._known_scores(batch))
        work = Work(self.own, None if weights is None else weights[self.own], self.config.learns)
        result, loss = self._train(framework, work)
        if self.config.learns:
            self._learn(batch, everything, loss)
        self._record(batch, False, 0, everything, loss)
        return result

    def _step_fresh(self, batch: MetaBatch, framework: Framework) -> Any:
        """The paper's step: score the meta-batch, evolve, choose, train on the chosen."""
        with self._timed("score"):
            losses, norm = self._split(framework, framework.score(self.own))
        with self._timed("exchange"):
            found, loss = self.store.exchange(batch.id, losses)
            self._check(batch, loss)
            used = self.store.usable(batch.component, found)
            weight = self.store.evolve(self.iteration, batch.id, found, used, loss)
            choice = self.chooser.choose(self.iteration, Known(loss, weight, norm))
            choice = self._rescaled(choice, batch, found.visits, used)
        result, _ = self._train(framework, self._work(choice, capture=False))
        self._record(batch, True, self.meta_batch, choice.positions, loss)
        return result

    def _step_known(self, batch: MetaBatch, framework: Framework) -> Any:
        """Choose by what is known already (history), or by nothing (uniform), and learn from the training forward."""
        with self._timed("exchange"):
            if not self.config.scores:
                choice = self.chooser.choose_any(self.iteration)
            else:
                visits, used = self._known_scores(batch)
                if self.chooser.fell:
                    choice = self.chooser.choose_any(self.iteration)
                else:
                    known = Known(used, used, informed=bool((visits > 0).any()))
                    choice = self.chooser.choose(self.iteration, known)
                choice = self._rescaled(choice, batch, visits, used)
        result, loss = self._train(framework, self._work(choice, capture=self.config.learns))
        if self.config.learns:
            self._learn(batch, choice.positions, loss)
        self._record(batch, True, 0, choice.positions, loss)
        return result

    def _known_scores(self, batch: MetaBatch) -> tuple[UInt8, Float32]:
        """Visits and scores of a meta-batch, [B] each; scores as they are used, above 0."""
        found, _ = self.store.exchange(batch.id, np.zeros(self.meta_batch, np.float32))
        return found.visits, np.maximum(self.store.usable(batch.component, found), np.finfo(np.float32).tiny)

    def _rescaled(self, choice: Choice, batch: MetaBatch, visits: UInt8, used: Float32) -> Choice:
        """Weigh the chosen also by what they stand for in their pruned epoch."""
        weights = self.epochs.weights(batch, visits, used)
        if weights is None:
            return choice
        own = 1.0 if choice.weights is None else choice.weights
        return Choice(choice.positions, own * weights[choice.positions])

    def _split(self, framework: Framework, own: Float32 | None) -> tuple[Float32, Float32 | None]:
        """Losses of this rank at its positions and 0 elsewhere, and the norms of the whole meta-batch, if any."""
        if not self.needs_norm:
            return self._spread(framework, self.own, own), None
        norm = self._spread(framework, self.own, None if own is None else own[1])
        return self._spread(framework, self.own, None if own is None else own[0]), self.grid.sum_over_dp(norm)

    def _work(self, choice: Choice, *, capture: bool) -> Work:
        positions = assign(choice.positions, self._owners, self.grid.dp_size)[self.grid.dp_rank]
        if choice.weights is None:
            return Work(positions, None, capture)
        return Work(positions, choice.weights[np.searchsorted(choice.positions, positions)], capture)

    def _train(self, framework: Framework, work: Work) -> tuple[Any, Float32]:
        """Train, and share the losses if they were captured: nan where nothing is known."""
        with self._timed("train"):
            trained = framework.train(work)
            if not work.capture:
                return trained.result, np.full(self.meta_batch, np.nan, np.float32)
            spread = self._spread(framework, work.positions, trained.losses)
        with self._timed("exchange"):
            known = np.zeros(self.meta_batch, np.float32)
            known[work.positions] = 1
            known, loss = self.grid.sum_over_dp(np.stack([known, spread]))
            return trained.result, np.where(known > 0, loss, np.float32(np.nan))

    def _learn(self, batch: MetaBatch, positions: Int64, loss: Float32) -> None:
        """Stage the scores of positions whose losses a training forward told."""
        with self._timed("exchange"):
            self._check(batch, loss[positions], positions)
            ids = batch.id[positions]
            found, _ = self.store.exchange(ids, np.zeros(len(ids), np.float32))
            self.store.evolve(self.iteration, ids, found, np.zeros(len(ids), np.float32), loss[positions])

    def _spread(self, framework: Framework, positions: Int64, losses: Float32 | None) -> Float32:
        """Send this data-parallel rank's losses to its pipeline and tensor peers, and put them at their positions."""
        own = np.zeros(len(positions), np.float32) if losses is None else losses
        spread = np.zeros(self.meta_batch, np.float32)
        spread[positions] = self.grid.broadcast_over_mp(own, framework.loss_source)
        return spread

    def _check(self, batch: MetaBatch, loss: Float32, positions: Int64 | None = None) -> None:
        """Log sequences with a non-finite loss, and stop when there are too many."""
        bad = np.flatnonzero(~np.isfinite(loss))
        if len(bad) == 0:
            return
        at = bad if positions is None else positions[bad]
        rows = ", ".join(
            f"{self.manifest.components[batch.component[p]].name}[{batch.row[p]}]" for p in at[:NAMED_BAD_ROWS]
        )
        told = f"{len(bad)} of {len(loss)} sequences of iteration {self.iteration} have a non-finite loss: {rows}"
        if len(bad) > self.config.max_bad_losses * self.meta_batch:
            raise LossError(
                f"{told}. That is more than `max_bad_losses` = {self.config.max_bad_losses} of the meta-batch. Look at "
                "these rows, lower the learning rate, or check the precision; resume from the last checkpoint."
            )
        LOGGER.warning("%s; they are left out", told)

    def _record(self, batch: MetaBatch, evolving: bool, scored: int, positions: Int64, loss: Float32) -> None:
        finite = np.isfinite(loss)
        chosen = loss[positions]
        self.last = StepRecord(
            iteration=self.iteration,
            evolving=evolving,
            scored=scored,
            chosen=batch.id[positions],
            components=batch.component[positions],
            meta_loss=float(loss[finite].mean(dtype=np.float64)) if finite.all() else float("nan"),
            chosen_loss=mean_of_finite(chosen),
            bad=int(np.count_nonzero(~np.isfinite(loss if scored else chosen))) if self.config.learns else 0,
            seconds=dict(self._seconds),
            drawn=batch.component,
            skipped_loss=mean_of_finite(np.delete(loss, positions)),
        )

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin


def mean_of_finite(loss: Float32) -> float:
    """Mean of the losses that are finite, nan where none is."""
    finite = loss[np.isfinite(loss)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else float("nan")
