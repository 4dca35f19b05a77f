"""Evolved Sampling in a run of Megatron-Bridge: `pretrain(config, forward_step, callbacks=[...])`.

Bridge's loop is that of Megatron-LM with a tree of dataclasses in the place of its arguments. So the run is that of
`megatron_lm`, which sees the tree under the names of the arguments. Bridge's callbacks commit and log; what they have
no event for is patched.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError
from es_megatron.frameworks import megatron_lm
from es_megatron.frameworks.arguments import Switches
from es_megatron.frameworks.megatron_lm_data import Sources, make_samples, training_share, weigh_sources
from es_megatron.frameworks.megatron_lm_settings import (
    StartingPoint,
    check_pruner,
    refuse_arguments,
    start_of_folder,
    tracked_iteration,
)
from es_megatron.refusals.megatron_bridge import MEGATRON_BRIDGE
from es_megatron.refusals.megatron_lm import MEGATRON_LM

SECTIONS = ("train", "validation", "dataset", "scheduler", "optimizer", "ddp", "checkpoint", "logger", "dist", "model")
TRAIN_STATE = "latest_train_state.pt"


class BridgeArguments(Namespace):
    """Bridge's configuration under the names of Megatron-LM's arguments; what is set goes where it was read."""

    def __init__(self, config: Any) -> None:
        """Take a `ConfigContainer`."""
        super().__init__()
        self.__dict__["_parts"] = [config, *(getattr(config, name, None) for name in SECTIONS)]
        self.__dict__["_parts"].append(getattr(config.model, "transformer", None))  # of 0.6 and later

    def _holders(self, name: str) -> Iterator[Any]:
        return (part for part in self.__dict__["_parts"] if part is not None and hasattr(part, name))

    def __getattr__(self, name: str) -> Any:
        """Look a setting up in the sections.

        Raises:
            AttributeError: none has it.
        """
        if name == "mixed_precision":  # has been written into the model's settings by now
            return None
        for part in self._holders(name):
            return getattr(part, name)
        raise AttributeError(name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        setattr(next(self._holders(name)), name, value)


class Current:
    """What this process runs: there is one Bridge in it, with a state of its own."""

    switches: Switches | None = None
    arguments: BridgeArguments | None = None
    board: Any = None


def get_args() -> Namespace:
    """Bridge's settings, by Megatron-LM's names."""
    assert Current.arguments is not None
    return Current.arguments


def get_tensorboard_writer() -> Any:
    """Bridge's TensorBoard writer, None where it has none."""
    return Current.board


def prepare(config: EvolvedSamplingConfig, audit: Path | None) -> None:
    """Have the next run evolve."""
    Current.switches = Switches(config, audit)


def start(config: Any) -> None:
    """Plan the run, or restore it, once Bridge's process groups stand; collective.

    Args:
        config: Bridge's `ConfigContainer`; its length and its learning-rate schedule become those of the plan.

    Raises:
        EsError: on every rank, what cannot work.
    """
    if Current.switches is None:
        return
    Current.arguments = BridgeArguments(config)
    megatron_lm.start(BRIDGE)
    config._calculate_scheduler_steps()


def check_settings(args: Namespace, config: EvolvedSamplingConfig) -> None:
    """Refuse what cannot work before anything is built.

    Raises:
        ConfigError: names the setting, why, and the cure.
    """
    refuse_arguments(args, (*MEGATRON_LM, *MEGATRON_BRIDGE), config, str)
    check_pruner(config)
    if args.dataloader_type not in ("single", "cyclic"):
        raise ConfigError(
            f"`dataset.dataloader_type` must be single or cyclic with Evolved Sampling, but is "
            f"{args.dataloader_type!r} instead: the data order is its own. Leave it out."
        )


def read_sources(args: Namespace) -> Sources:
    """Find the training files, their weights, and the part of each that is for training.

    Raises:
        ConfigError: no files, or the same file twice.
    """
    blend, per_split = getattr(args, "blend", None), getattr(args, "blend_per_split", None)
    chosen: Any = blend if blend is not None else (per_split or [None])[0]
    if chosen is None:
        raise ConfigError(
            "`dataset` must be a `GPTDatasetConfig` with a blend of real data with Evolved Sampling, but names no "
            "files. Give `data_path` (or `blend`)."
        )
    share = 1.0 if blend is None else training_share(args.split)
    return Sources(weigh_sources(*chosen), lambda sequences: round(share * sequences))


def find_start(args: Namespace) -> StartingPoint:
    """Find the checkpoint that Bridge is going to load, and the scores in it.

    Raises:
        CheckpointError: its tracker file or the state in it cannot be read.
    """
    if not args.load or args.finetune:
        return StartingPoint(0, None, 0)
    folder, step = Path(args.load), getattr(args, "ckpt_step", None)
    tracker = folder / TRAIN_STATE
    if step is None and tracker.is_file():
        step = int(torch.load(tracker, weights_only=True)["step"])
    step = tracked_iteration(folder) if step is None else int(step)
    return StartingPoint(0, None, 0) if step is None else start_of_folder(folder, step)


def on_train_start(context: Any) -> None:
    """Compare what Bridge has loaded with what was restored."""
    Current.board = context.state.tensorboard_logger
    megatron_lm.check_loaded(int(context.state.train_state.step))


def on_train_step_end(context: Any) -> None:
    """Commit scores after a step, or forget them, and log."""
    run = megatron_lm.active()
    if run is None:
        return
    # Upstream's re-run machinery, when it leaves, returns before there is a norm; the step will be run again.
    clips = float(context.state.cfg.optimizer.clip_grad) > 0
    leaving = context.skipped_iter and context.grad_norm is None and clips
    megatron_lm.finish_step(skipped=context.skipped_iter, leaving=leaving)
    if not leaving:
        megatron_lm.correct_auxiliary_losses()
        megatron_lm.log(run.iteration)


BRIDGE = megatron_lm.Dialect(
    home=__name__,
    check=check_settings,
    read_sources=read_sources,
    make_samples=make_samples,
    find_start=find_start,
    model_config=lambda args: args,
    state_folder=lambda args, iteration: Path(args.save) / f"iter_{iteration:07d}" / "es_state",
    switches=lambda args: Current.switches or Switches(None, None),
)
