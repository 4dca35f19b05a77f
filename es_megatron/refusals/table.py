"""Rows of what Evolved Sampling cannot be combined with, and why: for run time, `patch --check` and `doctor`.

The tables stand beside this module, one per upstream. Each row states for which runs it holds. Most of what a scoring
pass would get wrong is no matter to a scorer that makes none (`history`, `external`, or the arm `uniform`). So a row
that is about the pass holds only where there is one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError
from es_megatron.scoring import arm_of, scorer_of

Setting = Callable[[str], Any]
"""From a setting's name to its value, None where it is not given; numbers, texts, lists, or upstream's enumerations."""

Extent = Literal["order", "selection", "scoring", "first tokens", "merged"]

EXTENTS: Mapping[Extent, str] = {
    "order": "with Evolved Sampling",
    "selection": "where fewer sequences are trained",
    "scoring": "with a scoring pass (`fresh`, `prefix`, `every-k`)",
    "first tokens": "with `scorer: prefix`",
    "merged": "with `scorer.overlap: merged`",
}
"""Runs that a row holds for: all whose data order is ours, those that select, those that make a scoring pass, those
whose pass reads the first tokens alone, those that make it in the pass that trains."""

WAYS_OUT: Mapping[Extent, str] = {
    "order": "",
    "selection": ", or use `arm: plain`",
    "scoring": ", or use `scorer: history`, which makes no scoring pass",
    "first tokens": ", or use another scorer, which reads all tokens",
    "merged": ", or use `scorer.overlap: none`",
}

OFF = ("", "false", "none", "null", "no", "off", "~", "0")
"""Values, as words, that switch a setting off."""


def words(value: Any) -> list[str]:
    """A value as words in lower case: `[CudaGraphScope.attn, "moe"]` and "attn moe" are ["attn", "moe"]."""
    if value is None:
        return []
    if isinstance(value, enum.Enum):
        return words(value.value) if isinstance(value.value, str) else [value.name.lower()]
    if isinstance(value, str):
        return value.lower().replace(",", " ").split()
    if isinstance(value, Sequence):
        return [word for each in value for word in words(each)]  # pyright: ignore[reportUnknownVariableType]
    return [str(value).lower()]


def is_on(value: Any) -> bool:
    """Whether a value switches its setting on."""
    return any(word not in OFF for word in words(value))


def is_given(value: Any) -> bool:
    """Whether an index or a list of them is there, which may be 0."""
    return any(word not in OFF or word == "0" for word in words(value))


def is_above_one(value: Any) -> bool:
    """Whether a size is more than one; a text that is no number may be."""
    return any(word not in (*OFF, "1") for word in words(value))


@dataclass(frozen=True)
class Refusal:
    """One thing that a run must not have."""

    name: str
    """The setting, as upstream's settings object or argument namespace spells it."""

    why: str
    """What would go wrong."""

    extent: Extent = "order"
    """Runs that it holds for."""

    cure: str = "switch it off"
    """What to do, but for the way out that goes with the extent."""

    must: str = "off"
    """What it must be."""

    default: str | None = None
    """Its value where it is not given, if upstream has one that is not off."""

    applies: Callable[[Setting], bool] | None = None
    """Whether it holds for some settings; None: where the setting is on."""

    def holds(self, setting: Setting) -> bool:
        """Whether a run with these settings has it."""
        return is_on(setting(self.name)) if self.applies is None else self.applies(setting)

    def way_out(self) -> str:
        """The whole cure."""
        return self.cure + WAYS_OUT[self.extent]

    def error(self, setting: Setting, spelled: str) -> ConfigError:
        """What a run that has it is told.

        Args:
            setting: of the run.
            spelled: the name as the user wrote it.
        """
        value = setting(self.name)
        shown = self.default if value is None else (value.value if isinstance(value, enum.Enum) else value)
        cure = self.way_out()
        return ConfigError(
            f"`{spelled}` must be {self.must} {EXTENTS[self.extent]}, but is {shown!r} instead: {self.why}. "
            f"{cure[0].upper()}{cure[1:]}."
        )


def extents_of(config: EvolvedSamplingConfig) -> frozenset[Extent]:
    """Which rows hold for a run: what its arm and scorer make it do."""
    found: set[Extent] = {"order"}
    if arm_of(config).selects:
        found.add("selection")
    if scorer_of(config).makes_passes:
        found.add("scoring")
    if scorer_of(config).shortens:
        found.add("first tokens")
    if scorer_of(config).merges:
        found.add("merged")
    return frozenset(found)


def find(rows: Sequence[Refusal], setting: Setting, config: EvolvedSamplingConfig) -> Iterator[Refusal]:
    """Rows that a run breaks, in the table's order."""
    extents = extents_of(config)
    return (row for row in rows if row.extent in extents and row.holds(setting))


def refuse(
    rows: Sequence[Refusal], setting: Setting, config: EvolvedSamplingConfig, spell: Callable[[str], str] = str
) -> None:
    """Refuse a run that breaks a row.

    Args:
        rows: of the table.
        setting: of the run.
        config: of Evolved Sampling.
        spell: from a setting's name to how the user writes it.

    Raises:
        ConfigError: names the setting, why, and the cure.
    """
    for row in find(rows, setting, config):
        raise row.error(setting, spell(row.name))
