"""What Evolved Sampling makes of Megatron-LM's arguments: what it refuses, where it starts, how long the run is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from es_megatron.algorithm.pruners import PRUNERS
from es_megatron.checkpoint.sealed import parse_json
from es_megatron.config import EvolvedSamplingConfig
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
    iteration = loaded_iteration(args)
    if iteration is None:
        return StartingPoint(0, None, 0)
    folder = Path(args.load) / f"iter_{iteration:07d}" / "es_state"
    if not (folder / "manifest.json").is_file():
        return StartingPoint(iteration, None, iteration)
    state = parse_json((folder / "state.json").read_bytes(), folder / "state.json")
    return StartingPoint(iteration, str(folder), int(state["started_at"]))


def loaded_iteration(args: Namespace) -> int | None:
    """Iteration of the checkpoint in `--load` that Megatron takes, None for a release or where there is none.

    Raises:
        CheckpointError: its tracker file holds something else.
    """
    tracker = Path(args.load) / "latest_checkpointed_iteration.txt"
    told = str(getattr(args, "ckpt_step", None) or "")
    if not told:
        told = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else "release"
    if told == "release":
        return None
    if not told.isdigit():
        raise CheckpointError(f"`{tracker}` must hold an iteration, but holds {told!r} instead. Restore it.")
    return int(told)


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


def refuse_arguments(args: Namespace, rows: Sequence[Refusal], config: EvolvedSamplingConfig) -> None:
    """Refuse arguments that some rows of the table, or those about the model, do not allow.

    Raises:
        ConfigError: names the flag, why, and the cure.
    """
    refuse((*rows, *MODEL), lambda name: getattr(args, name, None), config, lambda name: f"--{name.replace('_', '-')}")


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

    def shorten(self, args: Namespace, iterations: int) -> list[str]:
        """Set Megatron's arguments to another number of iterations; the learning-rate schedule ends with them.

        Returns:
            What was changed, in words.
        """
        share, batch = iterations / self.plain_iterations, args.global_batch_size
        new: dict[str, int | None] = dict(self.given)
        if self.given["train_samples"]:
            new["train_samples"] = iterations * batch
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
    iterations = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    left = iterations - at.started_at
    if left < 1:
        raise ConfigError(
            f"The run must go on beyond iteration {at.started_at}, where Evolved Sampling starts, but has {iterations} "
            "iterations. Raise `--train-iters` (or `--train-samples`), or run with --no-es."
        )
    if at.started_at:
        args.override_opt_param_scheduler = True
    return Length(left * args.global_batch_size, iterations, given)
