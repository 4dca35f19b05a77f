"""What a pretraining loop needs of a framework; the two there are stand in modules of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.plan import Layout
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.frameworks.feed import Rows

MARKS = {"megatron": "metadata.json", "deepspeed": "layout.json"}
"""The file by which the model folder of each backend's checkpoints is known."""


def check_backend(directory: Path, backend: str) -> None:
    """Refuse the model of another backend.

    Args:
        directory: a checkpoint's folder of the model.
        backend: of this run.

    Raises:
        CheckpointError: names both.
    """
    found = [name for name, mark in MARKS.items() if (directory / mark).is_file()]
    if found and backend not in found:
        raise CheckpointError(
            f"Checkpoint `{directory.parent}` was saved with `backend: {found[0]}`, but this run has `backend: "
            f"{backend}`. Set it as it was, or begin a new run in another folder; its scores can be carried over by "
            "`evolved_sampling.scores.initial`."
        )


class Iteration(NamedTuple):
    """What one training iteration gave on this rank."""

    loss_sum: float
    """Sum of the training losses of this rank's micro-batches; 0 on ranks without losses."""
    loss_count: int
    """How many they are."""
    succeeded: bool
    """Whether weights were updated, the same on every rank."""
    norm: float
    """Norm of the gradients before clipping; nan where the framework does not tell."""
    rate: float
    """Learning rate of the update."""
    updating: float
    """Seconds of the optimizer step, where it can be told from the passes."""


class Backend(Protocol):
    """A model, its optimizer and schedule in one framework, with Evolved Sampling attached."""

    engine: EvolvedSampling
    loss_source: int
    """Model-parallel rank that computes losses."""
    scheduler: Any
    """Megatron-Core's `OptimizerParamScheduler`."""
    parameters: int
    """Of this rank's part of the model."""

    def begin_with(self, weights: Path) -> None:
        """Give the model the weights of a checkpoint of `backend: megatron`, and nothing else of it; collective."""
        raise ConfigError(
            f"`model.weights` must be left out with this backend, but is `{weights}` instead: weights are read from "
            "Megatron-Core's checkpoints. Use `backend: megatron`."
        )

    def iterate(self) -> Iteration:
        """Draw, score, train, step, and close the iteration; collective."""
        ...

    def evaluate(self, domains: Mapping[str, Rows]) -> dict[str, float]:
        """Mean validation loss of each domain, in nats per token, the same on every rank; collective."""
        ...

    def calibrate(self) -> Layout:
        """Time forward and backward of this model on this layout, leaving no trace; collective."""
        ...

    def save(self, directory: Path) -> None:
        """Write model, optimizer, schedule and random states into a folder of their own; collective."""
        ...

    def load(self, directory: Path) -> None:
        """Take them back, also under another data-parallel size; collective."""
        ...
