"""Run the body of a test on several gloo ranks, each a forked process.

    @on_ranks(4)
    def test_sum() -> None:
        ones = torch.ones(3)
        torch.distributed.all_reduce(ones)
        assert ones.tolist() == [4.0, 4.0, 4.0]

Ranks are forked, so modules the test file imports at its top are shared and cost nothing again; import megatron-core
and deepspeed there rather than in the body. Ranks meet through a file, so no port is taken and tests may run side by
side. The parent must not start threads or a process group of its own before.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ParamSpec

import _pytest.outcomes
import pytest
import torch
import torch.distributed as dist

P = ParamSpec("P")

GRACE_SECONDS = 2.0  # how long the other ranks may go on once one has failed: they often fail too, and tell more
STACK_SECONDS = 0.3  # how long a hung rank has to write where it hangs
STACK_LINES = 24
ORPHAN_SECONDS = 15.0  # how long after the time-out a rank ends by itself, should the parent be gone


class RankFailure(AssertionError):
    """One or more ranks raised, died or hung; the message says which, and with what traceback."""


@dataclass(frozen=True)
class Outcome:
    """How the body of one rank ended.

    Attributes:
        kind: "ok", "skip", "xfail", "error", "died" or "hung".
        text: the reason of a skip, or the traceback, or where it hung.
        value: what the body returned, for "ok".
    """

    kind: str
    text: str = ""
    value: Any = None


def on_ranks(n: int, timeout: float = 60.0) -> Callable[[Callable[P, Any]], Callable[P, None]]:
    """Decorate a test to run its body on `n` gloo ranks; fixtures pass through to every rank.

    Args:
        n: number of ranks, at least 1.
        timeout: seconds the whole test may take; after it every rank is ended and the test fails.
    """

    def decorate(test: Callable[P, Any]) -> Callable[P, None]:
        @functools.wraps(test)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
            run_on_ranks(n, functools.partial(test, *args, **kwargs), timeout=timeout)  # fixtures may be called `n`

        # pytest-timeout must not cut in first: the ranks' own time-out says which rank hung, and where.
        return pytest.mark.timeout(timeout + ORPHAN_SECONDS)(wrapper)

    return decorate


def run_on_ranks(n: int, fn: Callable[..., Any], /, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run `fn(*args)` on `n` gloo ranks and give what each returned, by rank.

    Args:
        n: number of ranks, at least 1.
        fn: any callable, also a closure; its return value must be picklable.
        args: passed to `fn`; they reach the ranks by fork, so they need not be picklable.
        timeout: seconds the whole call may take.

    Raises:
        RankFailure: a rank raised, died or hung.
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, but is {n} instead.")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        outcomes = _collect(n, functools.partial(fn, *args), Path(folder), timeout)
    return _judge(outcomes)


def _collect(n: int, body: Callable[[], Any], folder: Path, timeout: float) -> dict[int, Outcome]:
    """Fork the ranks, wait for all of them within the time allowed, and leave none behind; earliest outcome first."""
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()  # else every child writes the parent's pending text once more
    sys.stderr.flush()
    processes: list[BaseProcess] = []
    pipes: dict[Connection, int] = {}
    try:
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(rank, n, body, folder, timeout, theirs))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking beside threads
                process.start()
            _lead_group(_pid(process))
            theirs.close()  # so that a rank that dies is seen as the end of its pipe
            processes.append(process)
            pipes[ours] = rank
        outcomes = _receive(pipes, processes, time.monotonic() + timeout)
        for rank in sorted(set(range(n)) - set(outcomes)):
            outcomes[rank] = Outcome("hung", _stack(processes[rank], folder / f"stack{rank}"))
        _release(pipes, processes, outcomes)
        return outcomes
    finally:
        _end(processes)
        for pipe in pipes:
            pipe.close()


def _release(pipes: dict[Connection, int], processes: list[BaseProcess], outcomes: dict[int, Outcome]) -> None:
    """Let the ranks that have told their outcome go, now that nobody needs their end of a connection."""
    told = {pipe: rank for pipe, rank in pipes.items() if outcomes[rank].kind != "hung"}
    for pipe in told:
        with contextlib.suppress(OSError):
            pipe.send_bytes(b"go")
    deadline = time.monotonic() + GRACE_SECONDS
    leaving = {processes[rank].sentinel for rank in told.values()}
    while leaving and time.monotonic() < deadline:
        leaving -= set(wait(leaving, deadline - time.monotonic()))


def _receive(pipes: dict[Connection, int], processes: list[BaseProcess], deadline: float) -> dict[int, Outcome]:
    """Read outcomes until every rank has told one or the deadline, moved up by a first failure, has passed."""
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(pipes):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        for ready in wait([pipe for pipe, rank in pipes.items() if rank not in outcomes], left):
            assert isinstance(ready, Connection)
            rank = pipes[ready]
            outcomes[rank] = _read(ready, processes[rank])
            if outcomes[rank].kind != "ok":
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return outcomes


def _read(pipe: Connection, process: BaseProcess) -> Outcome:
    try:
        return pickle.loads(pipe.recv_bytes())  # written by our own child
    except (EOFError, OSError):
        return Outcome("died", f"the process ended with exit code {_exit_code(process)} and without a word")


def _exit_code(process: BaseProcess) -> int | None:
    """Ask how a process ended, negative for a signal, without reaping it: until then nobody else gets its id."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:  # its pipes close a moment before it has ended
        ended = os.waitid(os.P_PID, _pid(process), os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        time.sleep(0.01)
    return None


def _pid(process: BaseProcess) -> int:
    assert process.pid is not None  # it was started; 0 would mean ourselves
    return process.pid


def _lead_group(pid: int) -> None:
    """Put a rank at the head of a process group, so that what it starts can be ended with it."""
    with contextlib.suppress(OSError):  # parent and child both do it; the later one may find it done, or the child gone
        os.setpgid(pid, pid)


def _child(rank: int, n: int, body: Callable[[], Any], folder: Path, timeout: float, pipe: Connection) -> None:
    """Be one rank: join the group, run the body, tell the outcome, and leave when told to."""
    _lead_group(os.getpid())
    stack = (folder / f"stack{rank}").open("w")
    faulthandler.dump_traceback_later(timeout + ORPHAN_SECONDS, exit=True, file=stack)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n))
    torch.set_num_threads(1)
    outcome = _outcome(rank, n, body, folder, timeout)
    with contextlib.suppress(OSError, EOFError):  # the parent may be gone
        pipe.send_bytes(_pickled(outcome))
        if outcome.kind != "error":  # one that failed leaves at once, so that those that wait for it learn it
            pipe.recv_bytes()
            if dist.is_initialized():  # a body may have torn it down itself
                dist.destroy_process_group()


def _outcome(rank: int, n: int, body: Callable[[], Any], folder: Path, timeout: float) -> Outcome:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=n,
            timeout=timedelta(seconds=timeout),
        )
        dist.barrier()  # nobody may fail or skip, and be gone, while others still connect
        return Outcome("ok", value=body())
    except pytest.skip.Exception as reason:
        return Outcome("skip", str(reason))
    except _pytest.outcomes.XFailed as reason:
        return Outcome("xfail", str(reason))
    except BaseException:  # noqa: BLE001 - also SystemExit and pytest.fail, whose base is BaseException
        return Outcome("error", traceback.format_exc())


def _pickled(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as error:  # noqa: BLE001 - pickle raises many kinds
        kind = type(outcome.value).__name__
        return pickle.dumps(Outcome("error", f"the return value of type {kind} cannot be pickled: {error!r}"))


def _stack(process: BaseProcess, path: Path) -> str:
    """Ask a hung rank where it is."""
    os.kill(_pid(process), signal.SIGUSR1)
    time.sleep(STACK_SECONDS)
    lines = path.read_text().splitlines() if path.exists() else []
    return "\n".join(["no answer in time; it was at", *lines[:STACK_LINES]])


def _end(processes: list[BaseProcess]) -> None:
    """End every rank and all it started; none is reaped before, so no id can be another process's by now."""
    for process in processes:
        with contextlib.suppress(OSError):
            os.killpg(_pid(process), signal.SIGKILL)
    for process in processes:
        process.join()
        process.close()


def _judge(outcomes: dict[int, Outcome]) -> list[Any]:
    """Give the values, or raise what the ranks raised; a failure beats a skip, and a skip on some ranks is one."""
    kinds = {outcome.kind for outcome in outcomes.values()}
    if kinds == {"ok"}:
        return [outcomes[rank].value for rank in sorted(outcomes)]
    if kinds == {"skip"}:
        pytest.skip(outcomes[0].text)
    if kinds == {"xfail"}:
        pytest.xfail(outcomes[0].text)
    parts = [
        f"--- rank {rank} of {len(outcomes)}: {outcome.kind} ---\n{outcome.text}"
        for rank, outcome in outcomes.items()
        if outcome.kind != "ok"
    ]
    raise RankFailure("\n".join(["", *parts]))
