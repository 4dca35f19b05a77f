"""What Evolved Sampling makes of Megatron-LM's arguments: what it refuses, where it starts, how long the run is."""

from __future__ import annotations

import copy
import importlib
import shutil
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from es_megatron.algorithm.pruners import PRUNERS
from es_megatron.checkpoint.sealed import parse_json
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.data.ramp import Ramp
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.refusals.megatron_lm import MEGATRON_LM
from es_megatron.refusals.model import MODEL
from es_megatron.refusals.table import Refusal, refuse
from es_megatron.scoring import scorer_of


class StartingPoint(NamedTuple):
    """What a run goes on from."""

    iteration: int
    """Of the checkpoint that Megatron will load, 0 for none."""
    folder: str | None
    """`es_state` of it, None where there is none."""
    started_at: int
    """Iteration at which Evolved Sampling began, or begins now."""


def check_settings(args: Namespace, config: EvolvedSamplingConfig) -> None:
    """Refuse what cannot work before anything is built.

    Raises:
        ConfigError: names the flag, why, and the cure.
    """
    refuse_arguments(args, MEGATRON_LM, config)
    check_pruner(config)
    scorer = scorer_of(config)
    if scorer.merges and scorer.shortens:
        raise ConfigError(
            "`--es-scorer-overlap` must be none with `--es-scorer prefix` on Megatron-LM, whose ranks make room for "
            "batches by one length for a whole pass, but is merged instead. Leave it out, or use `--es-scorer fresh`."
        )
    if args.dataloader_type not in ("single", "cyclic"):
        raise ConfigError(
            f"`--dataloader-type` must be single or cyclic with Evolved Sampling, but is "
            f"{args.dataloader_type!r} instead: the data order is its own. Leave it out."
        )


def check_pruner(config: EvolvedSamplingConfig) -> None:
    """Refuse a pruner that changes the learning rate: upstream's schedule sets it.

    Raises:
        ConfigError: names the flag and the cure.
    """
    pruner = config.pruning.pruner
    if PRUNERS.make(pruner, config.pruning.options).corrects_rate:
        raise ConfigError(
            f"`--es-pruning-pruner` must be one that leaves the learning rate alone, but is {pruner} instead: "
            "Megatron's own schedule sets it. Use another one, or `es-megatron pretrain`."
        )


def find_start(args: Namespace) -> StartingPoint:
    """Find the checkpoint that Megatron is going to load, and the scores in it.

    Raises:
        CheckpointError: its tracker file or the state in it cannot be read.
    """
    if not args.load or args.finetune:
        return StartingPoint(0, None, 0)
    iteration, passing = loaded_iteration(args), PassingCheckpoints.of_load(args)
    newest = None if passing is None else passing.newest()
    if passing is not None and newest is not None and newest >= (iteration or 0):
        iteration, folder = newest, passing.state_folder(newest)
    elif iteration is None:
        return StartingPoint(0, None, 0)
    else:
        return start_of_folder(Path(args.load), iteration)
    return _start_of(folder, iteration)


def start_of_folder(folder: Path, iteration: int) -> StartingPoint:
    """What a run goes on from that loads an iteration of a folder of checkpoints.

    Raises:
        CheckpointError: the state in it cannot be read.
    """
    return _start_of(folder / f"iter_{iteration:07d}" / "es_state", iteration)


def _start_of(folder: Path, iteration: int) -> StartingPoint:
    if not (folder / "manifest.json").is_file():
        return StartingPoint(iteration, None, iteration)
    state = parse_json((folder / "state.json").read_bytes(), folder / "state.json")
    return StartingPoint(iteration, str(folder), int(state["started_at"]))


def loaded_iteration(args: Namespace) -> int | None:
    """Iteration of the checkpoint in `--load` that Megatron takes, None for a release or where there is none.

    Raises:
        CheckpointError: its tracker file holds something else.
    """
    step = getattr(args, "ckpt_step", None)
    return int(step) if step else tracked_iteration(Path(args.load))


def tracked_iteration(folder: Path) -> int | None:
    """Iteration that Megatron's tracker file in a folder names, None for a release or where there is none.

    Raises:
        CheckpointError: it holds something else.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"
    told = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else "release"
    if told == "release":
        return None
    if not told.isdigit():
        raise CheckpointError(f"`{tracker}` must hold an iteration, but holds {told!r} instead. Restore it.")
    return int(told)


@dataclass(frozen=True)
class PassingCheckpoints:
    """Megatron's non-persistent checkpoints of type `global`, of which it keeps the newest.

    Scores stand beside them, not in them: Megatron removes all but the newest `iter_*` before it writes the next, and
    one that has nothing but scores in it yet would count as that.
    """

    folder: Path

    @staticmethod
    def of_load(args: Namespace) -> PassingCheckpoints | None:
        """Those that Megatron looks at when it loads; None where it does not."""
        return PassingCheckpoints._of(args, args.load)

    @staticmethod
    def of_save(args: Namespace) -> PassingCheckpoints | None:
        """Those that it writes; None where it does not."""
        return PassingCheckpoints._of(args, args.save)

    @staticmethod
    def _of(args: Namespace, beside: str | None) -> PassingCheckpoints | None:
        if getattr(args, "non_persistent_ckpt_type", None) != "global" or not beside:
            return None
        return PassingCheckpoints(Path(args.non_persistent_global_ckpt_dir or Path(beside) / "non_persistent"))

    def newest(self) -> int | None:
        """Iteration of the one that is complete, None where there is none."""
        return tracked_iteration(self.folder)

    def state_folder(self, iteration: int) -> Path:
        """Where the scores of one are."""
        return self.folder / f"es_state_{iteration:07d}"

    def make_room(self, iteration: int, *, first: bool) -> Path:
        """Where to write the scores of one; the first rank removes those of checkpoints that Megatron has removed."""
        newest = self.newest() if first else None
        for old in self.folder.glob("es_state_*"):
            if newest is not None and old.name < self.state_folder(newest).name:
                shutil.rmtree(old)
        return self.state_folder(iteration)


def sized_by_call(schedule: Callable[..., Any], args: Namespace) -> Callable[..., Any]:
    """Have ranks that get their batch from a tensor-parallel peer make room for it by the call's sizes.

    Megatron's own helper reads them from the arguments.
    """

    def sized(**call: Any) -> Any:
        before = args.micro_batch_size, args.seq_length
        args.micro_batch_size, args.seq_length = call["micro_batch_size"], call["seq_length"]
        try:
            return schedule(**call)
        finally:
            args.micro_batch_size, args.seq_length = before

    return sized


def flag_of(name: str) -> str:
    """How an argument is spelled on the command line."""
    return f"--{name.replace('_', '-')}"


def refuse_arguments(
    args: Namespace, rows: Sequence[Refusal], config: EvolvedSamplingConfig, spell: Callable[[str], str] = flag_of
) -> None:
    """Refuse arguments that some rows of the table, or those about the model, do not allow.

    Raises:
        ConfigError: names the flag, why, and the cure.
    """
    refuse((*rows, *MODEL), lambda name: getattr(args, name, None), config, spell)


DECAYS = ("lr_decay_iters", "lr_decay_samples", "lr_decay_tokens", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
"""Arguments that say where the learning rate has come down; those in tokens are Megatron-DeepSpeed's."""


@dataclass(frozen=True)
class Length:
    """How long the user wants the run to be, as Megatron's arguments say it."""

    samples: int
    """Draws of the plain run that are left to Evolved Sampling."""
    plain_iterations: int
    """Iterations of the whole plain run."""
    given: dict[str, int | None]
    """The arguments that say it."""
    ramp: Ramp
    """Size of each meta-batch, by Megatron's iterations."""

    def shorten(self, args: Namespace, iterations: int) -> list[str]:
        """Set Megatron's arguments to another number of iterations; the learning-rate schedule ends with them.

        Returns:
            What was changed, in words.
        """
        samples = self.ramp.position(iterations)
        share = samples / self.ramp.position(self.plain_iterations)
        new: dict[str, int | None] = dict(self.given)
        if self.given["train_samples"]:
            new["train_samples"] = samples
        else:
            new["train_iters"] = iterations
        for name in DECAYS:
            value = self.given.get(name)
            if value is not None:
                new[name] = max(1, round(value * share))
        told = [f"{name} {self.given[name]} -> {new[name]}" for name in new if new[name] != self.given[name]]
        for name, value in new.items():
            setattr(args, name, value)
        return [f"changed to the planned {iterations} iterations: {', '.join(told)}"] if told else []

    @contextmanager
    def original(self, args: Namespace) -> Generator[None]:
        """Put the arguments of the plain run back for a while."""
        before = {name: getattr(args, name) for name in self.given}
        for name, value in self.given.items():
            setattr(args, name, value)
        args.train_iters = self.plain_iterations
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(args, name, value)


def plan_length(args: Namespace, at: StartingPoint) -> Length:
    """Read the length of the plain run; Megatron leaves an incomplete last batch out.

    Where a plain checkpoint is adopted, its own learning-rate schedule must give way to the shorter one.

    Raises:
        ConfigError: no length, or a run that is over already.
    """
    names = [name for name in DECAYS if name != "lr_decay_tokens" or hasattr(args, name)]
    given = {name: getattr(args, name, None) for name in ("train_iters", "train_samples", *names)}
    ramp = upstream_ramp(args)
    iterations = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    if ramp is not None:
        iterations, ramp = ramp
    else:
        ramp = Ramp(args.global_batch_size)
    if iterations <= at.started_at:
        raise ConfigError(
            f"The run must go on beyond iteration {at.started_at}, where Evolved Sampling starts, but has {iterations} "
            "iterations. Raise `--train-iters` (or `--train-samples`), or run with --no-es."
        )
    if at.started_at:
        args.override_opt_param_scheduler = True
    return Length(ramp.position(iterations) - ramp.position(at.started_at), iterations, given, ramp)


def upstream_ramp(args: Namespace) -> tuple[int, Ramp] | None:
    """Iterations of the plain run and the size of each, by Megatron's own calculator; None without a ramp-up.

    Raises:
        ConfigError: a run that ends before the full size is reached, or whose sizes do not grow.
    """
    flags = ("rampup_batch_size", "step_batch_size_schedule")
    given = next((name for name in flags if getattr(args, name, None)), None)
    if given is None:
        return None
    plain = copy.copy(args)
    importlib.import_module("megatron.training.training").update_train_iters(plain)
    calculator = importlib.import_module("megatron.core.num_microbatches_calculator")
    sizes, drawn = list[int](), 0
    for _ in range(plain.train_iters):
        calculator.update_num_microbatches(drawn, consistency_check=False)
        sizes.append(int(calculator.get_current_global_batch_size()))
        drawn += sizes[-1]
    calculator.update_num_microbatches(0, consistency_check=False)
    ramp = Ramp.of_sizes(sizes)
    flag = f"--{given.replace('_', '-')}"
    if given == "rampup_batch_size" and ramp.full < args.global_batch_size:
        raise ConfigError(
            f"`{flag}` must end within the run, whose last batch has {ramp.full} of {args.global_batch_size} "
            "sequences. Give it fewer samples, or raise `--train-samples`."
        )
    ramp.check(args.micro_batch_size * args.data_parallel_size, flag)
    return plain.train_iters, ramp
