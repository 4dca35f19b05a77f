"""What a check says about a config: one line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["OK", "NOTE", "REFUSE"]


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    severity: Severity
    what: str
    """The setting, with its value."""
    why: str
    cure: str = ""
    """What to do about it; empty for OK."""

    def line(self) -> str:
        """The finding as it is printed."""
        return f"{self.severity:<8}{self.what}: {self.why}." + (f" Cure: {self.cure}." if self.cure else "")


def ok(what: str, why: str) -> Finding:
    """Nothing to do."""
    return Finding("OK", what, why)


def note(what: str, why: str, cure: str = "") -> Finding:
    """Worth knowing; it does not keep a run from working."""
    return Finding("NOTE", what, why, cure)


def refuse(what: str, why: str, cure: str) -> Finding:
    """Evolved Sampling would be wrong, or would not start."""
    return Finding("REFUSE", what, why, cure)
