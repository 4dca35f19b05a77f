"""What `attach` gives back: the same verbs on every framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from es_megatron.checkpoint.es_state import SaveReport
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.plan import Plan
from es_megatron.frameworks.data_check import DataCheck
from es_megatron.frameworks.feed import MetaBatchFeed


class Handle:
    """Evolved Sampling attached to a training loop; subclasses know the framework's passes."""

    def __init__(self, engine: EvolvedSampling, feed: MetaBatchFeed | None, loss_source: int) -> None:
        """Join the parts; `attach` is the usual way.

        Args:
            engine: the step and its state.
            feed: samples, None on ranks that read no data.
            loss_source: model-parallel rank that computes losses.
        """
        self.engine, self.feed, self.loss_source = engine, feed, loss_source
        self.data: DataCheck | None = None
        """What is found out about the data files meanwhile; None: nobody looks."""

    @property
    def plan(self) -> Plan:
        """What the run will do: iterations, passes, sequences kept."""
        return self.engine.plan

    @property
    def iteration(self) -> int:
        """Iterations that are finished."""
        return self.engine.iteration

    @property
    def done(self) -> bool:
        """Whether the planned run is over."""
        return self.engine.done

    def save(self, folder: str | Path, **more: Any) -> SaveReport:
        """Write scores, kept masks and position of all ranks into a folder; see `EvolvedSampling.save`.

        Raises:
            DataError: a data file is not what the hash beside it says; found out since the last time.
            CheckpointError: it cannot be written.
        """
        if self.data is not None:
            self.data.agree()
        return self.engine.save(folder, **more)

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Go on where `save` stood, also on another number of ranks; see `EvolvedSampling.load`."""
        return self.engine.load(folder)

    def state_dict(self) -> dict[str, Any]:
        """Position and terms of the run, JSON-able, without scores and masks; see `EvolvedSampling.state_dict`.

        Collective where meta-batches are scored early.
        """
        return self.engine.state_dict()

    def detach(self) -> None:
        """Give back what was replaced in the caller's objects."""
