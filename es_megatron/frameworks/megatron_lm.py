"""Evolved Sampling in a run of unmodified Megatron-LM; the patches of its training loop call these functions.

There is one run in a process; functions do nothing while it is off. Iteration k of upstream's count is k - `started_at`
of ours, which is above 0 where scores were started from a plain checkpoint.
"""

from __future__ import annotations

import importlib
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.metrics import RunTotals, saved_share
from es_megatron.core.plan import Layout, describe
from es_megatron.data.manifest import Manifest
from es_megatron.errors import CheckpointError
from es_megatron.frameworks import auxiliary_losses
from es_megatron.frameworks.arguments import Switches, read_switches
from es_megatron.frameworks.audit import Audit
from es_megatron.frameworks.data_check import FIRST_SECONDS, DataCheck, check_components
from es_megatron.frameworks.feed import MetaBatchFeed
from es_megatron.frameworks.first_rank import from_first_rank
from es_megatron.frameworks.megatron_core import MegatronCoreSampling, attach
from es_megatron.frameworks.megatron_lm_data import (
    ComponentRows,
    Sources,
    SplitRows,
    UnreadLoader,
    make_samples,
    open_rows,
    read_sources,
)
from es_megatron.frameworks.megatron_lm_settings import (
    Length,
    PassingCheckpoints,
    StartingPoint,
    check_settings,
    find_start,
    plan_length,
    sized_by_call,
)

LOGGER = logging.getLogger(__name__)
OVERWRITING_LOGGER = "megatron.core.dist_checkpointing.serialization"


@dataclass(frozen=True)
class Dialect:
    """Where the descendants of Megatron-LM differ."""

    home: str
    """Module that has `get_args` and `get_tensorboard_writer`."""
    check: Callable[[Namespace, EvolvedSamplingConfig], None]
    """Refuses arguments that cannot work with these settings."""
    read_sources: Callable[[Namespace], Sources]
    make_samples: Callable[[Manifest, list[SplitRows], Any], ComponentRows]
    """Makes samples of rows and upstream's training dataset."""
    find_start: Callable[[Namespace], StartingPoint]
    model_config: Callable[[Namespace], Any]
    """Settings of the model, to be refused where scoring would be wrong."""
    state_folder: Callable[[Namespace, int], Path]
    """Where `es_state` of an iteration is saved."""
    switches: Callable[[Namespace], Switches] = read_switches


@dataclass
class Run:
    """Evolved Sampling in this process."""

    args: Namespace
    """Megatron's."""
    dialect: Dialect
    sampling: MegatronCoreSampling
    totals: RunTotals
    length: Length
    started_at: int
    """Iteration of Megatron's at which Evolved Sampling began."""
    resumed_at: int
    """Iteration of Megatron's that this process goes on from."""
    data: DataCheck
    audit: Audit | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Wall-clock by part since the last line."""

    @property
    def iteration(self) -> int:
        """Finished iterations, as Megatron counts them."""
        return self.sampling.engine.iteration + self.started_at


_run: Run | None = None


def active() -> Run | None:
    """The run of this process, None while Evolved Sampling is off."""
    return _run


def stop() -> None:
    """Forget the run; for tests."""
    global _run  # noqa: PLW0603 - a process has one Megatron, whose own state is global too
    _run = None


def start(dialect: Dialect) -> None:
    """Plan the run, or restore it, once Megatron's process groups stand; collective.

    Raises:
        EsError: on every rank, what cannot work.
    """
    args: Namespace = importlib.import_module(dialect.home).get_args()
    switches = dialect.switches(args)
    if switches.config is None or getattr(args, "skip_train", False) or _run is not None:
        return
    dialect.check(args, switches.config)
    manifest = read_manifest(dialect, args)
    _begin(args, dialect, switches, manifest, from_first_rank(lambda: dialect.find_start(args)))


def open_data(dialect: Dialect, args: Namespace) -> tuple[Manifest, list[SplitRows]]:
    """The training data that the arguments name."""
    return open_rows(dialect.read_sources(args), args.seq_length, getattr(args, "padded_vocab_size", None))


def read_manifest(dialect: Dialect, args: Namespace) -> Manifest:
    """What the training data is, as rank 0 finds it; collective."""

    def read() -> dict[str, Any]:
        return open_data(dialect, args)[0].to_json()

    return Manifest.from_json(from_first_rank(read))


def _begin(args: Namespace, dialect: Dialect, switches: Switches, manifest: Manifest, at: StartingPoint) -> None:
    global _run  # noqa: PLW0603
    config = switches.config
    assert config is not None
    length = plan_length(args, at)
    sampling = attach(
        config,
        manifest,
        None,
        model_config=dialect.model_config(args),
        global_batch_size=length.ramp.full,
        micro_batch_size=args.micro_batch_size,
        train_samples=length.samples,
        workers=args.num_workers,
        ramp=length.ramp.after(at.started_at),
    )
    engine = sampling.engine
    totals = RunTotals(len(manifest.components), engine.meta_batch)
    vocab_size: int | None = getattr(args, "padded_vocab_size", None)
    data = check_components(manifest, vocab_size, engine.grid, wanted=config.order.check_files)
    run = Run(args, dialect, sampling, totals, length, at.started_at, at.iteration, data)
    if at.folder is not None:
        _restore(run, Path(at.folder))
    changes = length.shorten(args, at.started_at + engine.plan.schedule.iterations)
    if engine.grid.world_rank == 0:
        run.audit = None if switches.audit is None else Audit(switches.audit, run.started_at + 1, run.iteration)
        _print_plan(run, changes)
    data.agree(FIRST_SECONDS)
    _run = run


def _restore(run: Run, folder: Path) -> None:
    run.totals.load_state_dict(run.sampling.engine.load(folder)["totals"])
    if run.iteration != run.resumed_at:
        raise CheckpointError(
            f"`{folder}` must be of iteration {run.resumed_at}, but is of {run.iteration} instead. Use another "
            "checkpoint (`--ckpt-step`)."
        )


def check_loaded(iteration: int) -> None:
    """Compare the iteration that Megatron has loaded with the one whose scores were restored.

    Raises:
        CheckpointError: they differ.
    """
    if _run is not None and iteration != _run.resumed_at:
        raise CheckpointError(
            f"Megatron has loaded iteration {iteration}, but the scores are of iteration {_run.resumed_at}. Name "
            "the iteration with `--ckpt-step`, or load nothing."
        )


@contextmanager
def length_of_plain_run() -> Generator[None]:
    """Let Megatron see the lengths that the user gave, while it computes the sizes of its datasets."""
    if _run is None:
        yield
        return
    with _run.length.original(_run.args):
        yield


def take_training_data(dataset: Any) -> Any:
    """Have upstream's training dataset make our samples; on ranks that have one."""
    if _run is None or dataset is None:
        return dataset
    run, engine = _run, _run.sampling.engine
    if run.sampling.feed is None:
        rows = open_data(run.dialect, run.args)[1]
        run.sampling.feed = MetaBatchFeed(
            run.dialect.make_samples(engine.manifest, rows, dataset),
            engine.sampler,
            engine.own,
            workers=run.args.num_workers,
            mask_lag=engine.epochs.lag,
        )
    return UnreadLoader(len(dataset))


def wrap_schedule(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Put scoring and choosing around the schedule of a training loop."""
    if _run is None:
        return schedule
    return _run.sampling.wrap(sized_by_call(schedule, _run.args))


def finish_step(*, skipped: bool, leaving: bool) -> None:
    """Commit scores after a step, or forget them.

    Args:
        skipped: the optimizer did not step.
        leaving: Megatron gives the iteration up and leaves; it will be run again.
    """
    if _run is None:
        return
    engine = _run.sampling.engine
    if leaving:
        engine.store.discard()
        return
    _run.sampling.finish(not skipped)
    record = engine.last
    assert record is not None
    _run.totals.add(record, {}, succeeded=not skipped)
    for name, value in record.seconds.items():
        _run.seconds[name] = _run.seconds.get(name, 0.0) + value
    if _run.audit is not None:
        _run.audit.write(_run.iteration, record)


def skip_step() -> bool:
    """Pass over an iteration that Megatron skips: the data order moves on, and nothing else. False while it is off."""
    if _run is not None:
        _run.sampling.engine.draw()
        _run.sampling.finish(False)
    return _run is not None


def state_saved(iteration: int, non_persistent: bool) -> AbstractContextManager[Any]:
    """Write `es_state/` into the checkpoint's folder, before Megatron writes its own files inside the `with`.

    Raises:
        CheckpointError: it cannot be written, or Megatron saves at another iteration than ours.
    """
    if _run is None:
        return nullcontext()
    engine, passing = _run.sampling.engine, PassingCheckpoints.of_save(_run.args) if non_persistent else None
    if iteration != _run.iteration:
        raise CheckpointError(
            f"Megatron saves at iteration {iteration}, but Evolved Sampling is at {_run.iteration}: a step was not "
            "told to it. Report this, with the flags of the run."
        )
    _run.data.agree()
    folder = _run.dialect.state_folder(_run.args, iteration)
    if passing is not None:
        folder = passing.make_room(iteration, first=engine.grid.world_rank == 0)
    report = engine.save(folder, totals=_run.totals.state_dict(), started_at=_run.started_at)
    if engine.grid.world_rank == 0:
        _say(f"es: saved scores of iteration {iteration}, {report.bytes} bytes in {report.seconds:.2f} s")
    return _expected_folder()


@contextmanager
def _expected_folder() -> Generator[None]:
    """Drop upstream's warning that the folder of the checkpoint is not empty: we have just written to it."""

    def unless_expected(record: logging.LogRecord) -> bool:
        return "Overwriting old incomplete" not in record.getMessage()

    logger = logging.getLogger(OVERWRITING_LOGGER)
    logger.addFilter(unless_expected)
    try:
        yield
    finally:
        logger.removeFilter(unless_expected)


def correct_auxiliary_losses() -> None:
    """Before Megatron logs an iteration: it will divide sums over k micro-batches by their number in a plain run, m."""
    record = None if _run is None else _run.sampling.engine.last
    if _run is not None and record is not None:
        auxiliary_losses.rescale(len(record.drawn) / len(record.chosen))


def log(iteration: int) -> None:
    """A line after Megatron's own, on the rank that prints that."""
    if _run is None or iteration % _run.args.log_interval:
        return
    engine, totals, record = _run.sampling.engine, _run.totals, _run.sampling.engine.last
    _run.data.agree()
    seconds, _run.seconds = _run.seconds, {}
    if dist.get_rank() != dist.get_world_size() - 1 or record is None:
        return
    saved = saved_share(engine.plan, engine.iteration, totals)
    tokens = 1e-6 * _run.args.seq_length
    scored, trained = totals.sequences_scored * tokens, totals.sequences_trained * tokens
    score, train = (1e3 * seconds.get(part, 0.0) / _run.args.log_interval for part in ("score", "train"))
    losses = {"meta-batch loss": record.meta_loss, "trained loss": record.chosen_loss}  # a free scorer has no first one
    parts = [
        f"es: iteration {iteration:8d}/{_run.args.train_iters:8d}",
        f"es kept: {len(record.chosen)}/{len(record.drawn)}",
        *(f"{name}: {loss:.6E}" for name, loss in losses.items() if math.isfinite(loss)),
        f"saved so far: {saved:.1%}",
        f"tokens forwarded: {scored + trained:.3f} M",
        f"tokens trained: {trained:.3f} M",
        f"es score/train (ms): {score:.1f}/{train:.1f}",
        f"nan sequences: {totals.bad}" + (f" (and {totals.masked} masked)" if totals.masked else ""),
    ]
    names = [component.name for component in engine.manifest.components]
    if shares := totals.told_shares(names):
        parts.append(f"drawn/trained: {shares}")
    _say(" " + " | ".join(parts) + " |")
    _to_board(
        iteration,
        {
            "es/kept": len(record.chosen),
            "es/meta_loss": record.meta_loss,
            "es/chosen_loss": record.chosen_loss,
            "es/saved": saved,
            "es/tokens_forwarded": 1e6 * (scored + trained),
            "es/tokens_trained": 1e6 * trained,
            **{f"es/drawn_share/{name}": share for name, (share, _) in totals.shares(names).items()},
            **{f"es/trained_share/{name}": share for name, (_, share) in totals.shares(names).items()},
        },
    )


def _to_board(iteration: int, scalars: dict[str, float]) -> None:
    """Write scalars with Megatron's TensorBoard writer, where it has one; not-a-number is left out."""
    assert _run is not None
    writer = importlib.import_module(_run.dialect.home).get_tensorboard_writer()
    if writer is None:
        return
    for name, value in scalars.items():
        if value == value:  # noqa: PLR0124
            writer.add_scalar(name, value, iteration)


def _print_plan(run: Run, changes: list[str]) -> None:
    args, engine = run.args, run.sampling.engine
    own = len(engine.own)
    layout = Layout(
        micro_batches=own // args.micro_batch_size,
        scoring_micro_batches=own // (engine.config.scorer.micro_batch_size or args.micro_batch_size),
        pipeline=args.pipeline_model_parallel_size,
        virtual=args.virtual_pipeline_model_parallel_size or 1,
    )
    _say(describe(engine.plan, layout, args.seq_length, calibrated=False))
    for change in (*changes, *engine.epochs.skipped.changes):
        _say(f"es: {change}")
    if run.resumed_at > run.started_at:
        _say(f"es: goes on at iteration {run.resumed_at} with the scores saved there")
    elif run.started_at:
        _say(
            f"es: starts at iteration {run.started_at} of a plain checkpoint; its first iterations train on everything"
        )


def _say(text: str) -> None:
    print(text, flush=True)


def _checkpoint_folder(args: Namespace, iteration: int) -> Path:
    from megatron.training.checkpointing import get_checkpoint_name  # pyright: ignore[reportMissingImports]

    return Path(get_checkpoint_name(args.save, iteration, return_base_dir=True)) / "es_state"


MEGATRON_LM = Dialect(
    home="megatron.training.global_vars",
    check=check_settings,
    read_sources=read_sources,
    make_samples=make_samples,
    find_start=find_start,
    model_config=lambda args: args,
    state_folder=_checkpoint_folder,
)
