"""Runs of the real Trainer on DeepSpeed, and what is compared of them; forks share the modules imported here."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from es_megatron.frameworks import deepspeed_common
from es_megatron.trainer.loop import Trainer
from es_megatron.trainer.settings import PretrainSettings
from tests import small_run  # puts the CPU layer in place and imports megatron
from tests.ranks_helper import run_on_ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: install es_megatron[deepspeed]")
deepspeed_common.prepare()
for _module in ("deepspeed_backend", "deepspeed_model"):
    importlib.import_module(f"es_megatron.trainer.{_module}")  # the trainer does so late; forks shall share them


@dataclass
class Trace:
    """What a rank saw of a run, from its first iteration here to its last."""

    chosen: list[list[int]] = field(default_factory=list)
    """Ids that got a backward pass, by iteration."""
    loss: list[float] = field(default_factory=list)
    """Mean loss of the meta-batch, nan where it is not known."""
    trained: list[float] = field(default_factory=list)
    """Mean training loss, on DeepSpeed over all ranks."""
    norm: list[float] = field(default_factory=list)
    """Norm of the gradients, nan where DeepSpeed does not tell."""
    scores: tuple[bytes, bytes] = (b"", b"")
    """This rank's scores and visits at the end."""
    place: tuple[int, int] = (0, 0)
    """Data-parallel and model-parallel rank."""


def train(settings: PretrainSettings, stop_at: int | None = None) -> Trace:
    """Run the trainer on this rank to its end, or save and leave at an iteration as SIGTERM does."""
    trainer = Trainer(settings)
    trace = Trace(place=(trainer.grid.dp_rank, trainer.grid.mp_rank))
    iterate = trainer.backend.iterate

    def watched():
        done = iterate()
        record = trainer.engine.last
        assert record is not None
        trace.chosen.append(record.chosen.tolist())
        trace.loss.append(record.meta_loss)
        trace.trained.append(done.loss_sum / done.loss_count if done.loss_count else math.nan)
        trace.norm.append(done.norm)
        if trainer.engine.iteration == stop_at:
            trainer.alarm.ask_to_stop()
        return done

    trainer.backend.iterate = watched
    trainer.run()
    store = trainer.engine.store
    trace.scores = (store.score.tobytes(), store.visits.tobytes())
    return trace


def run(ranks: int, blend: Path, directory: Path, *overrides: str, stop_at: int | None = None) -> list[Trace]:
    """Run the small GPT with some settings changed; gives what each rank saw."""
    settings = small_run.settings_of(blend, directory, *overrides)
    return run_on_ranks(ranks, train, settings, stop_at, timeout=280)
