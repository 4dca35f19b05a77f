"""What a check finds: one line each, printed alike by `doctor`, `preflight` and `patch --check`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["OK", "NOTE", "REFUSE", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    severity: Severity
    """`REFUSE` is for settings that Evolved Sampling does not go with, `FAIL` for all else that a run would end on."""

    what: str
    """What was looked at: a setting with its value, a package, a folder."""

    told: str
    """What was found, or why it is refused; without a full stop."""

    cure: str = ""
    """What to do about it, without a full stop; empty where there is nothing to do."""

    @property
    def blocks(self) -> bool:
        """Whether a run must not start before this is cured."""
        return self.severity in ("REFUSE", "FAIL")

    def line(self) -> str:
        """The finding as it is printed."""
        return f"{self.severity:<8}{self.what}: {self.told}." + (f" Cure: {self.cure}." if self.cure else "")


def ok(what: str, told: str) -> Finding:
    """Nothing to do."""
    return Finding("OK", what, told)


def note(what: str, told: str, cure: str = "") -> Finding:
    """Worth knowing; it does not keep a run from working."""
    return Finding("NOTE", what, told, cure)


def refuse(what: str, told: str, cure: str) -> Finding:
    """Evolved Sampling would be wrong, or would not start."""
    return Finding("REFUSE", what, told, cure)


def fail(what: str, told: str, cure: str) -> Finding:
    """The run would not start, or would end on it."""
    return Finding("FAIL", what, told, cure)


def blocking(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that must be cured before a run starts."""
    return [finding for finding in findings if finding.blocks]


def split_error(error: Exception, cure: str) -> tuple[str, str]:
    """Take the message of an error apart.

    Args:
        error: its message ends with the cure: the last sentence, or what comes after the last colon.
        cure: stands in where the message names none.

    Returns:
        What is wrong, and the cure.
    """
    text = str(error).rstrip(".")
    told, stop, own = text.rpartition(". ")
    if not stop:
        told, _, own = text.rpartition(": ")
        if not own[:1].islower():  # no cure, but `FILE: what is wrong with it`
            return text, cure
    own = own.removeprefix("Cure: ")
    return told, own[:1].lower() + own[1:]


def report(findings: Iterable[Finding], tail: Iterable[str], heading: str = "") -> str:
    """A whole report: the heading if there is one, a line for each finding, and what follows from them."""
    return "\n".join([*([heading] if heading else []), *(finding.line() for finding in findings), *tail])
