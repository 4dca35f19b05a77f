"""Kinds of faults: what each does to a run, and what it must leave."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from es_megatron.trainer import alarm, loop
from es_megatron.trainer.checkpoints import RunCheckpoints
from tests.faults import shim
from tests.faults.job import Job
from tests.faults.judge import Judge, Verdict
from tests.faults.setups import (
    FAILED,
    FINISHED,
    LIMIT,
    RANKS,
    RUN,
    SAVE,
    STOPPED,
    Bench,
    differences,
    last_iteration,
    words_of,
)
from tests.faults.shim import Action, Fault

GRACE = 4.0
"""Seconds that a stuck rank is given in these runs; 20 in others."""
BEFORE = SAVE - 2
HELD, LOST, SILENT = "held", "failed", "silent"
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS)
ENDS = (
    *[signal.SIGKILL] * 4,
    *(signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGXCPU, signal.SIGSEGV, signal.SIGABRT),
)
SOFT = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGXCPU)


@dataclass(frozen=True)
class Outcome:
    """What one attempt came to."""

    result: str
    """`held`, `failed` or `silent`: went on with something else and said nothing."""
    note: str = ""
    kept: Path | None = None
    """Folder to look at, if it did not hold."""


def judged(problem: str | None, kept: Path | None = None) -> Outcome:
    """Held without a problem."""
    return Outcome(HELD) if problem is None else Outcome(LOST, problem[-1500:], kept)


@dataclass
class Rig:
    """One setup with its undisturbed run and the ranks that load its checkpoints."""

    bench: Bench
    digests: dict[tuple[int, int], str] = field(default_factory=dict[tuple[int, int], str])
    """What a good checkpoint gives, by ranks and iteration."""
    judges: dict[int, Judge] = field(default_factory=dict[int, Judge])
    spoilt: bool = False
    """Whether the folder is there that damage is tried on."""

    def judge(self, ranks: int = RANKS) -> Judge:
        """The ranks that load."""
        return self.judges.setdefault(ranks, Judge(self.bench, ranks))

    def digest(self, iteration: int, ranks: int = RANKS) -> str:
        """What loading the undisturbed run's checkpoint of an iteration gives."""
        if (ranks, iteration) not in self.digests:
            copied = self.copy(self.bench.undisturbed(ranks), "expected")
            (copied / "checkpoints" / "latest").write_text(f"iter_{iteration:07d}\n")
            verdict = self.judge(ranks).ask(copied)
            if (verdict.kind, verdict.iteration) != ("loaded", iteration):
                raise RuntimeError(f"the undisturbed checkpoint of iteration {iteration} cannot be loaded: {verdict}")
            self.digests[ranks, iteration] = verdict.digest
        return self.digests[ranks, iteration]

    def copy(self, directory: Path, name: str) -> Path:
        """A copy of a run's folder."""
        target = self.bench.folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(directory, target)
        return target

    def fresh(self, name: str) -> Path:
        """A folder for a run that is not there yet."""
        target = self.bench.folder / name
        shutil.rmtree(target, ignore_errors=True)
        return target

    def close(self) -> None:
        """End the ranks that load."""
        for judge in self.judges.values():
            judge.end()
        self.judges.clear()

    def loads(self, verdict: Verdict, iterations: tuple[int, ...], ranks: int = RANKS) -> Outcome:
        """Judge a load after a fault: one of these iterations, whole."""
        if verdict.kind != "loaded":
            return Outcome(LOST, f"{verdict.kind}: {verdict.said[-1200:]}")
        if verdict.iteration not in iterations:
            return Outcome(LOST, f"iteration {verdict.iteration} was loaded, not one of {iterations}")
        if verdict.digest != self.digest(verdict.iteration, ranks):
            return Outcome(SILENT, f"iteration {verdict.iteration} was loaded with another state, and nothing was said")
        return Outcome(HELD)


def armed_in_save(fault: Fault | None, at: tuple[int, ...] = (0, 1), iteration: int = SAVE) -> Callable[[int], None]:
    """Preparation of ranks: a fault in the save of an iteration, on these ranks, and a shorter grace."""
    if fault is not None:
        fault.lay()

    def prepare(rank: int) -> None:
        shorten_grace()
        if fault is None or rank not in at:
            return
        save, advance = RunCheckpoints.save, RunCheckpoints.advance

        def under_way(self: RunCheckpoints) -> bool:
            """Whether that save goes on in the background."""
            return self._pending is not None and self._pending.iteration == iteration

        def armed_save(self: RunCheckpoints, backend: Any, *more: Any, **named: Any) -> Any:
            if backend.engine.iteration == iteration:
                advance(self, wait=True)  # the save before, in the background: a fault in it would leave nothing
            shim.arm(backend.engine.iteration == iteration)
            try:
                return save(self, backend, *more, **named)
            finally:
                shim.arm(under_way(self))

        def armed_advance(self: RunCheckpoints, *, wait: bool = False) -> Any:
            if not under_way(self):
                return advance(self, wait=wait)
            try:
                return advance(self, wait=wait)
            finally:
                shim.arm(under_way(self))

        RunCheckpoints.save, RunCheckpoints.advance = armed_save, armed_advance

    return prepare


HUNG, MET = "hung", "all ranks have met"
"""How a job is called that does not end, and what a rank says once it knows the others."""


def shorten_grace() -> None:
    """Leave a stuck rank sooner, so that an attempt takes seconds."""
    alarm.Alarm.__init__.__defaults__ = (GRACE, os._exit)
    alarm.ending_soon.__wrapped__.__defaults__ = (GRACE, os._exit)
    assert loop.Alarm is alarm.Alarm


def ended(job: Job, allowed: tuple[int, ...], seconds: float = LIMIT) -> str | None:
    """What is wrong with how a job ended: a rank that did not, a code, words, a process that is left."""
    codes = job.codes(seconds)
    left = job.left_behind()
    said = [job.said(rank) for rank in range(len(codes))]
    if None in codes:
        return f"{HUNG}: exit codes {codes} after {seconds:.0f} s\n{said[0][-600:]}\n{said[-1][-600:]}"
    if any(code not in allowed for code in codes):
        return f"exit codes {codes}\n{said[0][-600:]}\n{said[-1][-600:]}"
    if left:
        return f"processes were left: {left}"
    return next((words for text in said if (words := words_of(text)) is not None), None)


def reached(fault: Fault) -> str | None:
    """What is wrong where the operation of a fault never came."""
    return f"operation {fault.at} did not come, of {shim.count()}" if shim.count() < fault.at else None


def crash_points(rig: Rig, ranks: int, tried: int) -> tuple[int, list[Path]]:
    """States of the folder at every operation of one save, and within writes: those that a kill of the job leaves.

    Returns:
        How many there are, and those that are left to try.
    """
    directory, photographs = rig.bench.folder / f"photographed-{ranks}", rig.bench.folder / f"photographs-{ranks}"
    total = rig.bench.folder / f"photographs-{ranks}.count"
    if not total.exists():
        for folder in (directory, photographs):
            shutil.rmtree(folder, ignore_errors=True)
        photographs.mkdir()
        fault = Fault(directory, Action.PHOTOGRAPH, photographs=photographs)
        problem = ended(rig.bench.start(directory, ranks, armed_in_save(fault)), (FINISHED,), RUN)
        if problem is not None:
            raise RuntimeError(f"the run whose save is photographed ended in an unforeseen way: {problem}")
        states = sorted(photographs.iterdir())
        for state in states[:tried]:
            shutil.rmtree(state)
        total.write_text(str(len(states)))
    return int(total.read_text()), sorted(photographs.iterdir())


def crash_point(rig: Rig, state: Path, ranks: int) -> Outcome:
    """A job that dies at one operation: the next start finds the save before or the new one, and can save again."""
    directory = rig.copy(state, "crashed")
    found = rig.loads(rig.judge(ranks).ask(directory, save=True), (BEFORE, SAVE), ranks)
    if found.result != HELD:
        return Outcome(found.result, f"{state.name}: {found.note}")
    again = rig.loads(rig.judge(ranks).ask(directory), (BEFORE, SAVE), ranks)
    left = [path.name for path in (directory / "checkpoints").iterdir() if path.suffix]
    if again.result != HELD or left:
        return Outcome(again.result if again.result != HELD else LOST, f"{state.name}: {again.note} {left}")
    shutil.rmtree(state)  # the space is wanted
    return again


def operations(rig: Rig, rank: int) -> int:
    """Disk operations of one save on a rank of two."""
    directory = rig.fresh("counted")
    job = rig.bench.start(directory, prepare=armed_in_save(Fault(directory), (rank,)))
    problem = ended(job, (FINISHED,), RUN)
    if problem is not None or shim.count() == 0:
        raise RuntimeError(f"the run whose operations are counted ended in an unforeseen way: {problem}")
    return shim.count()


def failing_save(rig: Rig, fault: Fault, at: tuple[int, ...]) -> Outcome:
    """A save that fails: all ranks end, typed; or, where the failure does no harm, the run goes on to its end."""
    directory = fault.folder
    job = rig.bench.start(directory, prepare=armed_in_save(fault, at))
    begun = time.monotonic()
    while job.alive() and last_iteration(job.said(0)) < SAVE and time.monotonic() < begun + RUN:
        time.sleep(0.1)
    codes = job.codes(LIMIT)
    problem = ended(job, (FINISHED, FAILED), 1.0) or reached(fault)
    if problem is None and len(set(codes)) > 1:
        problem = f"exit codes {codes}: {job.said(0)[-500:]}"
    if problem is None and codes[0] == FAILED:
        silent = [rank for rank in range(RANKS) if "error: " not in job.said(rank)]
        problem = f"rank {silent} ended without an error:\n{job.said(silent[0])[-500:]}" if silent else None
    if problem is not None:
        return judged(problem, directory)
    if codes[0] == FINISHED:
        unlike = differences(directory, rig.bench.undisturbed())
        return Outcome(SILENT, unlike, directory) if unlike else Outcome(HELD)
    return rig.loads(rig.judge().ask(directory, save=True), (BEFORE, SAVE))


def error_at(rig: Rig, rank: int, operation: int) -> Outcome:
    """One operation of one rank fails."""
    error = ERRORS[operation % len(ERRORS)]
    return failing_save(rig, Fault(rig.fresh("failing"), Action.FAIL, operation, error), (rank,))


def refused_onwards(rig: Rig, chance: random.Random, counts: tuple[int, int], error: int, kinds: int) -> Outcome:
    """From an operation on nothing is taken any more, on one rank or on both: a full disk, lost rights."""
    at = chance.choice([(0,), (1,), (0, 1)])
    operation = chance.randint(1, max(1, sum(counts[rank] for rank in at) * 2 // 3))
    fault = Fault(rig.fresh("refused"), Action.FAIL, operation, error, kinds, onwards=True)
    return failing_save(rig, fault, at)


def limited(rig: Rig, chance: random.Random) -> Outcome:
    """A limit on the size of files, met in a save."""
    directory, limit = rig.fresh("limited"), chance.choice([1000, 5000, 20_000, 60_000])
    arm = armed_in_save(Fault(directory))

    def prepare(rank: int) -> None:
        arm(rank)
        begin = RunCheckpoints.save

        def lowered(self: RunCheckpoints, backend: Any, *more: Any, **named: Any) -> Any:
            if backend.engine.iteration == SAVE:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return begin(self, backend, *more, **named)

        RunCheckpoints.save = lowered

    job = rig.bench.start(directory, prepare=prepare)
    problem = ended(job, (FAILED,), RUN)
    return judged(problem, directory) if problem else rig.loads(rig.judge().ask(directory, save=True), (BEFORE, SAVE))


def killed(rig: Rig, chance: random.Random, count: Callable[[], None]) -> Outcome:
    """A run that is hit again and again, on changing ranks, goes on each time, and ends as the undisturbed one."""
    directory, exact = rig.fresh("killed"), True
    for number in range(chance.randint(2, 4)):
        ranks = chance.choice([1, RANKS]) if rig.bench.setup.resizable else RANKS
        exact = exact and ranks == RANKS
        problem = hit(rig.bench.start(directory, ranks, grace, said=str(number)), ranks, chance)
        if problem is not None:
            return judged(problem, directory)
        count()
    problem = ended(rig.bench.start(directory, RANKS, grace, said="-last"), (FINISHED,), RUN)
    if problem is not None:
        return judged(problem, directory)
    unlike = differences(directory, rig.bench.undisturbed(), exact=exact)
    return Outcome(SILENT, unlike, directory) if unlike else Outcome(HELD)


def killed_at(rig: Rig, chance: random.Random, counts: tuple[int, int]) -> Outcome:
    """A rank dies between two writes of a save, or within one; the run goes on and ends as the undisturbed one."""
    directory, rank = rig.fresh("torn"), chance.randrange(RANKS)
    action, operation = chance.choice([Action.KILL, Action.TEAR]), chance.randint(1, counts[rank])
    fault = Fault(directory, action, operation)
    job = rig.bench.start(directory, prepare=armed_in_save(fault, (rank,)))
    begun = time.monotonic()
    while job.alive() and time.monotonic() < begun + RUN:
        time.sleep(0.05)
    problem = ended(job, (FAILED, -signal.SIGKILL)) or reached(fault)
    problem = problem or ended(rig.bench.start(directory, prepare=grace, said="-last"), (FINISHED,), RUN)
    if problem is not None:
        return judged(f"rank {rank} at operation {operation}: {problem}", directory)
    unlike = differences(directory, rig.bench.undisturbed())
    return Outcome(SILENT, unlike, directory) if unlike else Outcome(HELD)


def grace(rank: int) -> None:
    """The preparation that shortens the grace, and has a rank say when all ranks have met."""
    shorten_grace()
    meet = dist.init_process_group

    def told(*arguments: Any, **options: Any) -> None:
        meet(*arguments, **options)
        print(MET, flush=True)

    dist.init_process_group = told


def hit(job: Job, ranks: int, chance: random.Random) -> str | None:
    """Send one signal to one rank, or to all, at a random time; what is wrong with how the job ended."""
    number, target = chance.choice(ENDS), chance.choice([*range(ranks), None])
    begun, wanted = time.monotonic(), chance.choice([-1, -1, *range(9)])
    if wanted < 0:
        time.sleep(chance.uniform(0.0, 8.0))
    while job.alive() and last_iteration(job.said(0)) < wanted and time.monotonic() < begun + RUN:
        time.sleep(0.01)
    time.sleep(chance.choice([0.0, chance.uniform(0, 0.05), chance.uniform(0, 0.5)]))
    targets = [target] if target is not None else list(range(ranks))
    for rank in targets:
        if job.processes[rank].is_alive():
            job.kill(rank, number)
    allowed = (FINISHED, FAILED, STOPPED, -number, 128 + number)
    problem = ended(job, allowed)
    if problem is not None and problem.startswith(HUNG) and not any(MET in job.said(rank) for rank in range(ranks)):
        return None  # a rank died before the others knew it: they wait at the meeting until their launcher ends them
    return None if problem is None else f"{signal.Signals(number).name} to {targets} at {wanted}: {problem}"


def second_start(rig: Rig) -> Outcome:
    """A second run in a folder is refused, and the first ends as if nothing had been."""
    directory = rig.fresh("shared")
    first = rig.bench.start(directory, prepare=grace)
    begun = time.monotonic()
    while first.alive() and not (directory / "metrics.jsonl").exists() and time.monotonic() < begun + RUN:
        time.sleep(0.02)
    first.kill(0, signal.SIGSTOP)
    try:
        second = rig.bench.start(directory, 1, grace, more=["training.seed=5"], said="-second")
        problem = ended(second, (FAILED,), RUN)
        if problem is None and "must be the folder of one run at a time" not in second.said(0):
            problem = f"the second start said: {second.said(0)[-500:]}"
    finally:
        first.kill(0, signal.SIGCONT)
    problem = problem or ended(first, (FINISHED,), RUN)
    if problem is not None:
        return judged(problem, directory)
    unlike = differences(directory, rig.bench.undisturbed())
    return Outcome(SILENT, unlike, directory) if unlike else Outcome(HELD)
