"""The reference pretraining loop, over a backend: when to evaluate, save, log and end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np

from es_megatron.checkpoint.agreement import agreed
from es_megatron.core.metrics import LogEntry, RunTotals
from es_megatron.core.plan import FORWARD_COST, TRAIN_COST, Layout, describe, nominal, predict
from es_megatron.errors import ConfigError, DataError, LossError
from es_megatron.frameworks.data_check import FIRST_SECONDS, check_behind
from es_megatron.frameworks.megatron_data import LoadedBlend, load_blend
from es_megatron.rank_grid import RankGrid
from es_megatron.scoring.arms import prunes
from es_megatron.trainer.alarm import Alarm
from es_megatron.trainer.backend import Backend, Iteration
from es_megatron.trainer.backends import build_backend, start, stop
from es_megatron.trainer.changes import with_skipped
from es_megatron.trainer.checkpoints import RunCheckpoints
from es_megatron.trainer.finished import finished_summary, told
from es_megatron.trainer.journal import Journal
from es_megatron.trainer.run_lock import RunLock
from es_megatron.trainer.settings import PretrainSettings
from es_megatron.trainer.signals import stopping
from es_megatron.trainer.weights import find_weights


class Trainer:
    """One run, from settings to summary."""

    def __init__(self, settings: PretrainSettings, alarm: Alarm | None = None) -> None:
        """Build everything, refuse what cannot work, and restore the newest checkpoint; collective.

        Args:
            settings: of the run.
            alarm: of `ending_together`; without it a rank that fails leaves the others waiting, and rank 0 alone heeds
                signals.

        Raises:
            EsError: on every rank, naming the thing and the cure.
        """
        self.settings, self.alarm, self._shared_alarm = settings, alarm or Alarm(), alarm is not None
        self._lock = RunLock(settings.run.directory)
        try:
            self._build(settings)
        except BaseException:
            self._lock.release()
            raise

    def _build(self, settings: PretrainSettings) -> None:
        start(settings)
        if self._shared_alarm:
            self.alarm.connect()
        world = RankGrid.data_parallel()
        settings = self.settings = with_skipped(settings, world)
        with agreed(world, f"start in `{settings.run.directory}`", kind=ConfigError):
            if world.world_rank == 0:
                self._lock.take()
        with agreed(world, "open the data", kind=DataError):
            blend = load_blend(settings.data.blend, settings.model.seq_length)
        self.blend: LoadedBlend = blend
        self.data = check_behind(blend, world, wanted=settings.evolved_sampling.order.check_files)
        training = settings.training
        samples = training.draws(blend.manifest.total)
        self.checkpoints = RunCheckpoints(settings, blend, world, self.alarm.tell)
        self.backend: Backend = build_backend(settings, blend, samples, self.checkpoints.warm_start)
        self.engine = self.backend.engine
        self.grid = self.engine.grid
        self.totals = RunTotals(len(blend.manifest.components), training.global_batch_size)
        self.component_names = [component.name for component in blend.manifest.components]
        self.layout: Layout = self.backend.calibrate()
        evaluations = self.checkpoints.restore(self.backend, self.totals)
        self.evaluations: list[dict[str, Any]] = evaluations or []
        self._resumed = evaluations is not None
        if not self._resumed:
            with agreed(world, "find the weights to begin with", kind=ConfigError):
                weights = find_weights(settings)
            if weights is not None:
                self.backend.begin_with(weights)
        self._saved_at = self.engine.iteration if self._resumed else -1
        self._over_skipped = 0

    def run(self) -> dict[str, Any]:
        """Train to the planned end, or to a signal to stop; returns the summary that `summary.json` holds.

        A run that is finished already is left as it is. The folder of the run is free for another one afterwards.
        """
        try:
            before = self._finished_before()
            return self._run() if before is None else before
        finally:
            self._lock.release()

    def _run(self) -> dict[str, Any]:
        iterations = self.engine.plan.schedule.iterations
        plan = describe(self.engine.plan, self.layout, self.settings.model.seq_length, calibrated=True)
        speaks, start = self.grid.world_rank == 0, self.engine.iteration
        with (
            Journal(self.settings, speaks, self.engine.plan, self.layout, start) as journal,
            stopping(self.alarm.ask_to_stop),
        ):
            journal.say(plan)
            if self.checkpoints.changes:
                journal.say(f"changed since iteration {start}: {', '.join(self.checkpoints.changes)}")
            for change in self.engine.epochs.skipped.changes:
                journal.say(f"{change} from iteration {start} on")
            self.data.agree(FIRST_SECONDS)
            self._train(journal, iterations)
            self.data.close()
            finished = self.engine.done
            wanted = self.settings.run.save_interval is not None or not finished
            if self._saved_at != self.engine.iteration and wanted:
                self._save(journal)
            self._save_on(journal, wait=True)
            if finished and not (self.evaluations and self.evaluations[-1]["iteration"] == self.engine.iteration):
                self._evaluate(journal)
            summary = self._summary(finished)
            journal.summarize(summary)
            return summary

    def size_and_time(self) -> str:
        """The model's size, the tokens it will be trained on, and the time that takes as measured; collective."""
        plan, grid = self.engine.plan, self.grid
        copies = grid.gather_objects((grid.dp_rank, self.backend.parameters))
        parameters = sum(count for dp_rank, count in copies if dp_rank == 0)
        tokens = plan.sequences_trained * self.settings.model.seq_length
        seconds = plan.schedule.iterations * self.layout.whole()
        return (
            f"{parameters / 1e6:.2f} M parameters, {tokens / 1e6:.2f} M tokens, about {seconds:,.0f} s on this machine"
        )

    def _train(self, journal: Journal, iterations: int) -> None:
        training, run = self.settings.training, self.settings.run
        sums = LogSums()
        while self.engine.iteration < iterations and not self._agreed_stop():
            began = time.perf_counter()
            iteration = self.backend.iterate()
            elapsed = time.perf_counter() - began
            record = self.engine.last
            assert record is not None  # the iteration has just set it
            self.totals.add(record, {"optimizer": iteration.updating, "step": elapsed}, succeeded=iteration.succeeded)
            sums.add(iteration, elapsed, record)
            journal.advance(record, iteration, elapsed)
            self._count_skipped(iteration)
            self._save_on(journal)
            done = self.engine.iteration
            if done % training.log_interval == 0 or done == iterations:
                self._log(journal, sums, iteration.rate)
                sums = LogSums()
            if training.eval_interval and done % training.eval_interval == 0 and done < iterations:
                self._evaluate(journal)
            if run.save_interval and done % run.save_interval == 0 and done < iterations:
                self._save(journal)

    def _agreed_stop(self) -> bool:
        """Whether any rank was asked to end, as world rank 0 has heard; raises if another rank has failed."""
        self.alarm.check()
        return bool(self.grid.broadcast(np.asarray([self.alarm.stop_asked], dtype=np.int64))[0])

    def _finished_before(self) -> dict[str, Any] | None:
        """The summary of this run if it was finished before, on every rank; collective."""
        if self._resumed and not self.engine.done:
            return None
        speaks = self.grid.world_rank == 0
        found = finished_summary(self.settings, resumed=self._resumed) if speaks else None
        if found is not None:
            print(told(self.settings, found), flush=True)
        return self.grid.gather_objects(found)[0]

    def _count_skipped(self, iteration: Iteration) -> None:
        """Stop a run that does not get on, on every rank, leaving the checkpoints that there are.

        Raises:
            LossError: more steps were skipped than `max_skipped` allows.
        """
        self._over_skipped = max(0, self._over_skipped + (-1 if iteration.succeeded else 1))
        allowed, at = self.settings.training.max_skipped, self.engine.iteration
        if allowed and self._over_skipped >= allowed:
            saved = f"iteration {self._saved_at} is saved" if self._saved_at >= 0 else "nothing is saved"
            raise LossError(
                f"{self._over_skipped} more optimizer steps than were taken have been skipped up to iteration {at}: "
                f"the norm of the gradients is not finite, last {iteration.norm} with a learning rate of "
                f"{iteration.rate:g}. Stopped without saving ({saved}). Look at the losses of what was chosen "
                "(`run.audit=true`), lower `training.lr`, or raise `training.max_skipped`."
            )

    def _log(self, journal: Journal, sums: LogSums, rate: float) -> None:
        """Mean loss since the last line, and whether the data are still trusted; collective."""
        self.data.agree()
        own = self.grid.broadcast_over_mp(np.asarray(sums.loss), self.backend.loss_source)
        loss_sum, count = self.grid.sum_over_dp(own)
        steps = max(sums.steps, 1)
        score, train = sums.seconds.get("score", 0.0), sums.seconds.get("train", 0.0)
        entry = LogEntry(
            iteration=self.engine.iteration,
            iterations=self.engine.plan.schedule.iterations,
            consumed=self.engine.iteration * self.engine.meta_batch,
            milliseconds=1e3 * sums.elapsed / steps,
            learning_rate=rate,
            meta_batch=self.engine.meta_batch,
            lm_loss=float(loss_sum / count) if count else math.nan,
            kept=sums.kept,
            score_ms=1e3 * score / steps,
            train_ms=1e3 * train / steps,
            other_ms=1e3 * (sums.elapsed - score - train) / steps,
            grad_norm=sums.norm,
            skipped=self.totals.skipped,
            bad=self.totals.bad,
            shares=self.totals.told_shares(self.component_names),
        )
        shares = self.totals.shares(self.component_names)
        journal.log(entry, self.engine.last, shares)

    def _evaluate(self, journal: Journal) -> None:
        if not self.settings.training.eval_samples or not self.blend.validation:
            return
        losses = self.backend.evaluate(self.blend.validation)
        if losses:
            losses["mean"] = sum(losses.values()) / len(losses)
            self.evaluations.append({"iteration": self.engine.iteration, **losses})
            journal.evaluated(self.engine.iteration, losses)

    def _save(self, journal: Journal) -> None:
        """Save this iteration, unless its scores met other text, or the run is where it began.

        Frameworks cannot load an optimizer without a step.
        """
        self.data.agree()
        journal.saving()
        if self.totals.skipped >= self.engine.iteration:
            journal.say("nothing to save yet: no optimizer step was taken")
            return
        hold = (
            self._over_skipped > 0 and self.settings.training.max_skipped > 0
        )  # the last good one may be an older one
        told = self.checkpoints.save(self.backend, self.totals, self.evaluations, hold=hold)
        self._saved_at = self.engine.iteration
        if told:
            journal.say(told)

    def _save_on(self, journal: Journal, *, wait: bool = False) -> None:
        """Go on with a save in the background, if there is one."""
        told = self.checkpoints.advance(wait=wait)
        if told:
            journal.say(told)

    def _summary(self, finished: bool) -> dict[str, Any]:
        plan, seq_length = self.engine.plan, self.settings.model.seq_length
        whole, calibrated, price = nominal(self.layout), predict(plan, self.layout), plan.scoring_price
        names = self.component_names
        return {
            "finished": finished,
            "arm": plan.config.arm,
            "scorer": plan.config.scorer.kind if plan.arm.scores else None,
            "policy": plan.config.selection.policy if plan.arm.scores else None,
            "pruner": plan.config.pruning.pruner if prunes(plan.config) else None,
            "scored_share": plan.scored_share,
            "scoring_price": price,
            "layout": dataclasses.asdict(self.layout),
            "sequences_scored": self.totals.sequences_scored,
            "sequences_trained": self.totals.sequences_trained,
            "iterations": self.engine.iteration,
            "planned_iterations": plan.schedule.iterations,
            "plain_iterations": plan.plain_iterations,
            "meta_batch": plan.meta_batch,
            "kept": plan.kept,
            "passes": dict(zip(names, plan.schedule.passes(self.engine.iteration).tolist(), strict=True)),
            "tokens_scored": round(plan.scored_share * self.totals.sequences_scored * seq_length),
            "tokens_trained": self.totals.sequences_trained * seq_length,
            "chosen": dict(zip(names, self.totals.chosen.tolist(), strict=True)),
            "drawn": dict(zip(names, self.totals.drawn.tolist(), strict=True)),
            "cost": FORWARD_COST * price * self.totals.sequences_scored + TRAIN_COST * self.totals.sequences_trained,
            "plain_cost": plan.plain_cost,
            "seconds": self.totals.seconds,
            "nominal_saving": predict(plan, whole).saving,
            "calibrated_saving": calibrated.saving,
            "non_finite_losses": self.totals.bad,
            "masked_sequences": self.totals.masked,
            "skipped_iterations": self.totals.skipped,
            "validation": self.evaluations[-1] if self.evaluations else None,
            "evaluations": self.evaluations,
            "world_size": self.grid.world_size,
        }


class LogSums:
    """Sums since the last log line."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.loss = [0.0, 0.0]
        self.norm = math.nan
        self.elapsed = 0.0
        self.steps = 0
        self.kept = 0
        self.seconds: dict[str, float] = {}

    def add(self, iteration: Iteration, elapsed: float, record: Any) -> None:
        """Count one iteration."""
        self.loss[0] += iteration.loss_sum
        self.loss[1] += iteration.loss_count
        self.norm = iteration.norm if iteration.succeeded else self.norm
        self.elapsed += elapsed
        self.steps += 1
        self.kept = len(record.chosen)
        for name, value in record.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


@contextmanager
def ending_together() -> Generator[Alarm]:
    """Have all ranks end if one of them fails in the body of a `with`, and leave the process groups after it.

    Yields:
        What the body's `Trainer` is given.

    Raises:
        PeerError: another rank has failed; one that is stuck by then ends its process instead.
    """
    alarm = Alarm()
    try:
        with alarm:
            yield alarm
    finally:
        stop()
        alarm.close()


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Run one pretraining job on this rank, from process groups to summary.

    Raises:
        EsError: what cannot work, on every rank, before the first iteration where possible.
    """
    with ending_together() as alarm:
        return Trainer(settings, alarm).run()
