"""One training step of Evolved Sampling, written once against what a framework can do.

Position -> sample -> losses -> scores.evolve -> weights -> choice -> training -> scores.commit, on all ranks alike.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.evolution import NO_LOSS
from es_megatron.algorithm.selection import assign, owners, positions_of
from es_megatron.checkpoint.compatibility import check_terms
from es_megatron.checkpoint.es_state import EsStateWriter, SaveReport, ScoreRange, load_es_state
from es_megatron.checkpoint.reference_losses import REFERENCE, bind_reference
from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.ahead import ScoringAhead
from es_megatron.core.bad_losses import check_losses, is_bad, mean_of_all, mean_of_finite
from es_megatron.core.choosing import Choice, Chooser, Known
from es_megatron.core.open_epochs import UNVISITED, OpenEpochs
from es_megatron.core.plan import Plan, plan_run
from es_megatron.core.step import Framework, StepRecord, Work
from es_megatron.data.manifest import Manifest
from es_megatron.data.mask import KeptMask
from es_megatron.data.ramp import Ramp
from es_megatron.data.sampler import MetaBatch, Sampler
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.copies import check_copies
from es_megatron.scores.store import Lookup, ScoreStore
from es_megatron.scoring import arm_of, scorer_of

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

LOGGER = logging.getLogger(__name__)

MIXTURE = "selection.mixture"
"""The setting's name among the terms of a run."""

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
        meta_batch: int | Ramp,
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
            meta_batch: sequences drawn per iteration, B, or how they grow to B; smaller ones are trained whole.
            micro_batch: sequences in a training micro-batch of one rank.
            train_samples: draws of the plain run.
            micro_batch_multiple: what the micro-batches of a rank must be a multiple of (the pipeline size where stages
                are interleaved).
            warm_start: says where the data order begins, and loads scores to begin with: `scores.initial` at
                iteration 0, or what a checkpoint says.

        Raises:
            ConfigError: sizes that do not divide, a run too long.
            CheckpointError: initial scores that are damaged or of other data.
        """
        self.config, self.manifest, self.grid = config, manifest, grid
        self.arm, self.scorer = arm_of(config), scorer_of(config)
        ramp = meta_batch if isinstance(meta_batch, Ramp) else Ramp(meta_batch)
        self.meta_batch, self.micro_batch = ramp.full, micro_batch
        quantum = math.lcm(micro_batch * grid.dp_size * micro_batch_multiple, config.selection.parts)
        self.store = ScoreStore(manifest, config, grid)
        if self.arm.scores:
            bind_reference(self.store, self.scorer.tokens(manifest.seq_length))
        origin = warm_start(self.store)
        self.plan: Plan = plan_run(config, manifest, ramp.full, quantum, train_samples, origin, ramp)
        self.chooser = Chooser(self.plan, grid, micro_batch)
        ceiling = self.chooser.policy.ceiling
        if self.store.reference is not None and ceiling is not None:
            self.store.reference.find_ceilings(ceiling, grid)
        self.sampler = Sampler(self.plan.schedule, config.seed)
        self.own: Int64 = positions_of(grid.dp_rank, grid.dp_size, ramp.full, micro_batch)
        """Positions of the meta-batch that this rank loads; of a smaller one those that it has."""
        self.iteration = origin.iteration
        self.epochs = OpenEpochs(self.plan, self.store, self.sampler)
        self.ahead = ScoringAhead(self.plan, self.sampler, self.own)
        self.rate_factor = 1.0
        """What the learning rate of this iteration is multiplied by; 1 but for pruners that correct it."""
        self.last: StepRecord | None = None
        self._owners = owners(grid.dp_size, ramp.full, micro_batch)
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
        selecting = self.plan.selects_at(self.iteration)
        scoring = selecting and self.scorer.scores_at(self.iteration) and not self.chooser.fell
        early = self.ahead.of(batch) if scoring else None
        own, norm = self._score(framework) if scoring and early is None else (early, None)
        found, loss = self._look_up(batch, own)
        weight = self._evolve(batch, batch.positions, found, loss) if scoring else None
        choice = self._choose(batch, found, loss, weight, norm) if selecting else Choice(batch.positions, None)
        learning = self.scorer.learns and not scoring
        choice = self._rescaled(choice, batch, found)
        following = None if self.chooser.fell else self.ahead.due(self.iteration)
        result, trained = self._train(framework, choice, len(batch.id), capture=learning, ahead=following)
        if learning:
            self._evolve(batch, choice.positions, found, trained)
        passes = int(scoring and early is None) + int(following is not None)
        self._record(batch, choice.positions, loss if scoring else trained, passes, selecting=selecting, known=scoring)
        return result

    def finish(self, succeeded: bool) -> None:
        """Close the iteration: scores are committed if the optimizer stepped, and forgotten if it skipped."""
        if succeeded:
            self.store.commit(self.iteration)
            self.chooser.commit()
        else:
            self.store.discard()
            self.chooser.discard()
        self.ahead.advance()
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
        masks = {key: KeptMask(packed, int(self.manifest.sizes[key[0]])) for key, packed in saved.masks.items()}
        self.load_state_dict(saved.state["engine"], masks)
        self.store.load(saved.score, saved.visits)
        return {name: value for name, value in saved.state.items() if name != "engine"}

    def state_dict(self) -> dict[str, Any]:
        """Position and terms of the run, JSON-able; scores and masks are arrays of their own.

        Collective where meta-batches are scored early.
        """
        return {
            "iteration": self.iteration,
            "terms": {**self._terms(), "reference.folder": self.config.reference.folder},
            "origin": self.plan.schedule.origin.to_json(),
            "stood_for": self.plan.schedule.stood_for(self.iteration),
            **self.epochs.to_json(),
            "chooser": self.chooser.state,
            **self.ahead.to_json(self.grid),
        }

    def load_state_dict(self, state: Mapping[str, Any], masks: Mapping[tuple[int, int], KeptMask]) -> None:
        """Go on where `state_dict` stood; collective. Scores are loaded into `store` separately.

        Raises:
            CheckpointError: unknown or missing keys, or terms that decide the data order and differ.
        """
        expected = {"iteration", "terms", "origin", "stood_for", "decided", "rescaled", "chooser"}
        if set(state) - {"ahead", "skipped"} != expected:
            raise CheckpointError(
                f"The state must have the keys {sorted(expected)}, but has {sorted(state)} instead. "
                "Load it with the version of es_megatron that wrote it."
            )
        self._adopt_mixture(state["terms"])
        self.epochs.adopt(state["terms"])
        self.epochs.skipped.follow(state)
        check_terms(
            {MIXTURE: "free", UNVISITED: "start", "ramp": [], **state["terms"], "origin": state["origin"]},
            {**self._terms(), "origin": self.plan.schedule.origin.to_json()},
        )
        self.iteration = int(state["iteration"])
        self.epochs.load(dict(masks), state["decided"], state["rescaled"])
        self.chooser.load(state["chooser"])
        self.ahead.load(state.get("ahead"))

    def follow(self, state: Mapping[str, Any]) -> None:
        """Take over from a run over another blend what is about its components: the mixture, and what they are owed."""
        self._adopt_mixture(state["terms"])
        self.epochs.skipped.follow(state)
        self.chooser.follow(state["chooser"])

    def _adopt_mixture(self, terms: Mapping[str, Any]) -> None:
        """Go on as the checkpoint was made where the settings do not say; `free` where it does not say either."""
        if self.config.selection.mixture is not None:
            return
        saved = terms.get(MIXTURE, "free")
        if MIXTURE not in terms and self.arm.selects and self.chooser.mixture.mixture != saved:
            LOGGER.warning(
                "the checkpoint is of a version that did not keep the mixture: it goes on with `selection.mixture: "
                "free`. A new run keeps the mixture."
            )
        self.chooser.mixture.mixture = saved
        self.plan = dataclasses.replace(self.plan, config=self.config.replaced({MIXTURE: saved}))

    def _terms(self) -> dict[str, Any]:
        """Settings that decide which samples come when and what the saved state means."""
        return {
            "meta_batch": self.meta_batch,
            "train_samples": self.plan.schedule.train_samples,
            "iterations": self.plan.schedule.iterations,
            **self.config.terms,
            **self.epochs.terms,
            MIXTURE: self.chooser.mixture.mixture,
            REFERENCE: None if self.store.reference is None else self.store.reference.fingerprint,
        }

    def _score(self, framework: Framework) -> tuple[Float32, Float32 | None]:
        """A scoring pass: losses of this rank at its positions, 0 elsewhere, and norms of all where they are needed."""
        with self._timed("score"):
            own = framework.score(self.own)
            if not self.needs_norm:
                return self._spread(framework, self.own, own), None
            norm = self._spread(framework, self.own, None if own is None else own[1])
            return self._spread(framework, self.own, None if own is None else own[0]), self.grid.sum_over_dp(norm)

    def _look_up(self, batch: MetaBatch, own: Float32 | None) -> tuple[Lookup | None, Float32]:
        """Scores of the meta-batch before this iteration, and all losses of its scoring pass, nan without one."""
        unknown = np.full(len(batch.id), np.nan, np.float32)
        if not self.arm.scores:
            return None, unknown
        with self._timed("exchange"):
            return (self.store.lookup(batch.id), unknown) if own is None else self.store.exchange(batch.id, own)

    def _evolve(self, batch: MetaBatch, positions: Int64, found: Lookup | None, loss: Float32) -> Float32:
        """Stage the scores of positions whose losses are known, float32[B], and return their weights."""
        assert found is not None  # arms without scores neither score nor learn
        with self._timed("exchange"):
            limit = self.config.selection.max_bad_losses
            check_losses(self.manifest, batch, loss[positions], positions, self.iteration, limit)
            return self.store.evolve(self.iteration, batch.id[positions], found.at(positions), loss[positions])

    def _choose(
        self, batch: MetaBatch, found: Lookup | None, loss: Float32, weight: Float32 | None, norm: Float32 | None
    ) -> Choice:
        """Choose by fresh weights, by the scores as they are used, or by nothing."""
        with self._timed("exchange"):
            if found is None or self.chooser.fell:
                return self.chooser.choose_any(self.iteration, batch.component)
            if weight is not None:
                return self.chooser.choose(
                    self.iteration, Known(loss, weight, norm, against=found.against), batch.component
                )
            used = np.maximum(found.used, np.finfo(np.float32).tiny)  # 0 would mean that it has no loss
            informed = bool((found.visits > 0).any())
            return self.chooser.choose(
                self.iteration, Known(used, used, None, informed, found.against), batch.component
            )

    def _rescaled(self, choice: Choice, batch: MetaBatch, found: Lookup | None) -> Choice:
        """Weigh the chosen also by what they represent in their pruned epoch."""
        weights = None if found is None else self.epochs.weights(batch, found)
        if weights is None:
            return choice
        own = 1.0 if choice.weights is None else choice.weights
        return Choice(choice.positions, own * weights[choice.positions])

    def _train(
        self, framework: Framework, choice: Choice, drawn: int, *, capture: bool, ahead: MetaBatch | None
    ) -> tuple[Any, Float32]:
        """Train on the chosen of so many, and share the losses if they are captured: nan where nothing is known."""
        positions = assign(choice.positions, self._owners[:drawn], self.grid.dp_size)[self.grid.dp_rank]
        own = None if choice.weights is None else choice.weights[np.searchsorted(choice.positions, positions)]
        with self._timed("train"):
            trained = framework.train(Work(positions, own, capture, ahead))
            if ahead is not None:
                self.ahead.stage(ahead, self._spread(framework, self.own, trained.ahead))
            if not capture:
                return trained.result, np.full(drawn, np.nan, np.float32)
            spread = self._spread(framework, positions, trained.losses)[:drawn]
        with self._timed("exchange"):
            known = np.zeros(drawn, np.float32)
            known[positions] = 1
            known, loss = self.grid.sum_over_dp(np.stack([known, spread]))
            return trained.result, np.where(known > 0, loss, np.float32(np.nan))

    def _spread(self, framework: Framework, positions: Int64, losses: Float32 | None) -> Float32:
        """Send this data-parallel rank's losses to its pipeline and tensor peers, and put them at their positions."""
        own = np.zeros(len(positions), np.float32) if losses is None else losses
        spread = np.zeros(self.meta_batch, np.float32)
        spread[positions] = self.grid.broadcast_over_mp(own, framework.loss_source)
        return spread

    def _record(
        self, batch: MetaBatch, positions: Int64, loss: Float32, passes: int, *, selecting: bool, known: bool
    ) -> None:
        """Note the step; `known` says whether losses are of the whole meta-batch."""
        self.last = StepRecord(
            iteration=self.iteration,
            evolving=selecting,
            scored=self.meta_batch * passes,
            chosen=batch.id[positions],
            components=batch.component[positions],
            meta_loss=mean_of_all(loss),
            chosen_loss=mean_of_finite(loss[positions]),
            losses=loss[positions],
            bad=int(np.count_nonzero(is_bad(loss if known else loss[positions]))) if self.scorer.learns else 0,
            masked=int(np.count_nonzero(loss == NO_LOSS)),
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
