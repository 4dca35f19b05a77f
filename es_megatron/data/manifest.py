"""The components of a blend and the stable identity of their samples.

A sample is (component, row of that component's one-epoch packing). Its id is the component's offset plus the row: an
int64 that is equal across epochs, restarts, ranks and world sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.errors import CheckpointError, DataError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Component:
    """A corpus of the blend."""

    name: str
    """Unique name, used in logs, scores and checkpoints."""

    prefix: str
    """Path prefix of its `.bin`/`.idx` pair; not part of its identity, files may move."""

    samples: int
    """Rows of its one-epoch packing at the manifest's sequence length."""

    weight: float
    """Share of draws, in any unit; the blend normalises."""

    fingerprint: str
    """Hash that tells a changed file from the same one, of samples of it."""

    content: str = ""
    """BLAKE2b of the whole `.bin` file, as kept beside it; empty: not known. Compared where both sides know it."""

    def same_content(self, other: Component) -> bool:
        """Whether nothing that is known of the two contents differs."""
        known = {self.content, other.content} - {""}
        return self.fingerprint == other.fingerprint and len(known) < 2

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.samples < 1:
            raise DataError(
                f"Component `{self.name}` must have at least 1 sample, but has {self.samples} instead. "
                "Give it more text or a shorter `seq_length`."
            )
        if not (self.weight >= 0 and np.isfinite(self.weight)):
            raise DataError(
                f"`weight` of component `{self.name}` must be finite and >= 0, but is {self.weight} instead."
            )


@dataclass(frozen=True)
class Manifest:
    """All components of a blend, in order, at one sequence length."""

    components: tuple[Component, ...]
    seq_length: int
    """Tokens per sample."""

    def __post_init__(self) -> None:
        """Check the components as a whole."""
        names = [component.name for component in self.components]
        if not names:
            raise DataError("The blend must have at least 1 component, but has none.")
        if len(set(names)) != len(names):
            raise DataError(
                f"Names of components must be unique, but are {names} instead. Rename one in the blend file."
            )
        if not sum(component.weight for component in self.components) > 0:
            raise DataError("At least one component must have a weight above 0.")

    @cached_property
    def sizes(self) -> Int64:
        """Samples of each component, int64[C]."""
        return np.asarray([component.samples for component in self.components], dtype=np.int64)

    @cached_property
    def offsets(self) -> Int64:
        """First id of each component and the end, int64[C+1]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes)])

    @property
    def total(self) -> int:
        """Samples of the whole blend: the n of s(0) = 1/n."""
        return int(self.offsets[-1])

    def sample_ids(self, component: Int64 | int, rows: Int64) -> Int64:
        """Ids of rows of components, int64 like `rows`."""
        return self.offsets[component] + rows

    def locate(self, ids: Int64) -> tuple[Int64, Int64]:
        """Component index and row of each id, two int64 arrays like `ids`."""
        component = np.searchsorted(self.offsets, ids, side="right").astype(np.int64) - 1
        return component, ids - self.offsets[component]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form that `from_json` reads back."""
        return {
            "seq_length": self.seq_length,
            "components": [dataclasses.asdict(component) for component in self.components],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        try:
            components = tuple(Component(**component) for component in data["components"])
            return cls(components=components, seq_length=int(data["seq_length"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"The saved manifest is not of a known form: {error}.") from error
