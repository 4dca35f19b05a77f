"""What a stretch of work takes: seconds of the clock and of the processor, and memory above what was held before."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """Filled in when the stretch ends."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of this process: on a busy machine, what the clock would show on an idle one, or a little more."""
    extra_bytes: int = 0
    """Peak of resident memory above that at the beginning."""


@contextmanager
def measured() -> Generator[Cost]:
    """Measure the body of a `with`."""
    cost = Cost()
    with suppress(OSError):  # not everywhere may a process forget its peak
        Path("/proc/self/clear_refs").write_text("5")
    held, clock, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
    yield cost
    cost.seconds, cost.cpu_seconds = time.perf_counter() - clock, time.process_time() - processor
    cost.extra_bytes = resident("VmHWM") - held


def resident(field: str) -> int:
    """Bytes that /proc/self/status tells: VmRSS now, VmHWM at most."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0
