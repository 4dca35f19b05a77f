"""Signals that ask a run to save and end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
"""From a launcher or scheduler, Ctrl-C, a terminal that closes, a limit on processor time."""

GRACE = 2.0
"""Seconds in which further SIGINTs count as the first: a terminal sends one to all, launchers hand it on once more."""


@contextmanager
def stopping(ask: Callable[[], None]) -> Generator[None]:
    """Call `ask` at a signal to end, unless the launcher has it ignored (`nohup`); a second SIGINT ends at once."""
    interrupted: list[float] = []

    def heed(number: int, _: object) -> None:
        if number == signal.SIGINT:
            interrupted.append(time.monotonic())
            if interrupted[-1] - interrupted[0] > GRACE:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            elif len(interrupted) == 1 and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nes-megatron: saving after this iteration, then ending; Ctrl-C again ends at once\n")
        ask()

    heeded = [each for each in STOP_SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
    before = [(each, signal.signal(each, heed)) for each in heeded]
    try:
        yield
    finally:
        for each, handler in before:
            signal.signal(each, handler)
