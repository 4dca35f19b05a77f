"""Weights & Biases through its own client, with the same scalars as TensorBoard."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from es_megatron.errors import ConfigError
from es_megatron.trainer.settings import PretrainSettings, RunSettings, plain

LOGGER = logging.getLogger(__name__)

WANDB_ID = "wandb_id"
"""File of a run's folder with the id under which the service has it, so that a run that resumes goes on there."""


def check_clients(run: RunSettings) -> None:
    """See that what the settings ask for is installed; on every rank, so that all of them end.

    Raises:
        ConfigError: a client is missing.
    """
    if not run.wandb:
        return
    found = find_spec("wandb")
    if found is None or found.origin is None:  # the latter of a folder `wandb`, as its runs leave one
        raise ConfigError("`run.wandb` must be off without Weights & Biases. Install it: pip install wandb.")


class WandbBoard:
    """A run of Weights & Biases. No run ends for it: what it cannot take is told once."""

    def __init__(self, settings: PretrainSettings) -> None:
        """Begin a run, or go on with the one of this folder.

        Raises:
            ConfigError: the client cannot begin; says why.
        """
        directory = settings.run.directory
        try:
            wandb: Any = import_module("wandb")
            self._run: Any = wandb.init(dir=str(directory), id=id_of(directory), resume="allow", config=plain(settings))
            self._run.define_metric("iteration")
            self._run.define_metric("*", step_metric="iteration")  # a resume runs iterations again
        except Exception as error:  # the client's errors have no base class of their own
            why = f"{type(error).__name__}: {error}".rstrip(".")
            raise ConfigError(
                f"`run.wandb` must be off where Weights & Biases cannot begin: {why}. Log in (`wandb login`), or set "
                "WANDB_MODE=offline."
            ) from error

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write the scalars of an iteration."""
        if self._run is None:
            return
        try:
            self._run.log({"iteration": iteration, **scalars})
        except Exception as error:  # noqa: BLE001 - as above; a run is worth more than its curves
            LOGGER.warning("Weights & Biases takes no more (%s): the run goes on without it", error)
            self._run = None

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # noqa: BLE001 - as above
                LOGGER.warning("Weights & Biases could not be closed (%s)", error)


def id_of(directory: Path) -> str:
    """The id of a folder's run, made at its first start."""
    path = directory / WANDB_ID
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        found = uuid.uuid4().hex[:12]
        path.write_text(f"{found}\n", encoding="utf-8")
        return found
