"""Numbers with units that a person reads."""

from __future__ import annotations

import math

LARGE = ("", " k", " M", " G", " T", " P", " E")


def amount(count: float) -> str:
    """A number with three digits and a power of a thousand: 33.4 T; whole below a thousand."""
    power = 0
    while abs(count) >= 999.5 and power < len(LARGE) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f}" if power == 0 else f"{_three(count)}{LARGE[power]}"


def duration(seconds: float) -> str:
    """A time with three digits in the unit that suits it: 126 ms, 3.4 min, 12.5 days."""
    if math.isnan(seconds):
        return "unknown"
    size, unit = time_unit(seconds)
    return f"{_three(seconds / size)} {unit}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Seconds of the unit that suits a time, and its name."""
    for below, size, unit in (
        (1e-3, 1e-6, "µs"),
        (1.0, 1e-3, "ms"),
        (120.0, 1.0, "s"),
        (7200.0, 60.0, "min"),
        (48 * 3600.0, 3600.0, "h"),
    ):
        if seconds < below:
            return size, unit
    return 86400.0, "days"


def share(value: float) -> str:
    """A share in per cent with one digit."""
    return "unknown" if math.isnan(value) else f"{value:.1%}"


def _three(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
