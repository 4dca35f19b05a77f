"""Commands run one after the other; signals reach all that they started."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SECONDS_TO_END = 60.0
"""How long a run that was asked to end is waited for; torchrun and DeepSpeed give its ranks 30 of them."""


@dataclass(frozen=True)
class Step:
    """One command and the variables it needs besides those there are."""

    what: str
    command: tuple[str, ...]
    environment: Mapping[str, str]

    def line(self) -> str:
        """As one types it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join(["env", *variables, shlex.join(self.command)] if variables else [shlex.join(self.command)])


def run_steps(steps: Sequence[Step]) -> int:
    """Run steps one after the other; ends with the first that fails, or at a signal.

    Ctrl-C, SIGTERM and the end of the terminal reach every process of the step as SIGTERM, upon which a run saves and
    ends. Once is enough: a second signal would keep torchrun from ending its ranks. Whoever gives one after a minute
    has them killed. A step has a session of its own for that: DeepSpeed's runner passes
    nothing on without pdsh, and Python kills what it waits for a quarter of a second after the terminal's Ctrl-C.

    Returns:
        0, or the exit code of the step that failed; 128 and the number of a signal that ended it.
    """
    for step in steps:
        code, received = run_step(step)
        if received:
            print(f"{step.what} was stopped by {signal.Signals(received[0]).name}", file=sys.stderr)
            return code or 128 + received[0]
        if code != 0:
            print(f"{step.what} failed with exit code {code}", file=sys.stderr)
            return code
    return 0


def run_step(step: Step) -> tuple[int, list[int]]:
    """Run one step to its end; gives its exit code, and the signals that came meanwhile."""
    received: list[int] = []
    asked = 0.0
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        del frame
        received.append(number)
        asked = asked or time.monotonic()
        late = time.monotonic() > asked + SECONDS_TO_END
        if process is not None and (late or len(received) == 1):
            signal_group(process.pid, signal.SIGKILL if late else signal.SIGTERM)

    heard = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        process = subprocess.Popen(step.command, env={**os.environ, **step.environment}, start_new_session=True)
        if received:  # before there was anything to pass it on to
            signal_group(process.pid, signal.SIGTERM)
        code = process.wait()
        deadline = time.monotonic() + SECONDS_TO_END
        while received and signal_group(process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.1)  # ranks that save, after the command that started them has gone
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), received


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; gives whether there still is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False
