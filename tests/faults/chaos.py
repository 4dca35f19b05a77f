"""`make chaos MINUTES=60`: faults of all kinds at runs of all kinds, for so long, and a table of what came of them.

It goes on where it stopped, as long as the package is the same: what was tried stands in `state.json` of its folder.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.faults import shim

FOLDER = Path("runs/chaos")
SLICE = 40.0
"""Seconds before another kind of fault has its turn, so that a short campaign tries all of them."""
NOTES = 60
"""Characters of a note in the table's list of what did not hold."""


@dataclass(frozen=True)
class Task:
    """One kind of fault at one kind of run."""

    kind: str
    setup: str
    target: int
    """Attempts that a release wants; its share of the time goes by it."""

    @property
    def key(self) -> str:
        """Its name in the state."""
        return f"{self.kind} | {self.setup}"


TARGETS: dict[str, dict[str, int]] = {
    "crash points, 2 ranks": {"megatron-default": 0, "megatron-background": 0, "deepspeed-paper": 0},
    "crash points, 1 rank": {"megatron-paper": 0, "deepspeed-default": 0},
    "bit flips in checkpoints": {"megatron-default": 1500, "megatron-reference": 250, "deepspeed-default": 1250},
    "bit flips in data": {"megatron-default": 500},
    "other damage to checkpoints": {"megatron-default": 250, "deepspeed-default": 250},
    "errors on rank 0": {"megatron-paper": 0, "deepspeed-paper": 0},
    "errors on rank 1": {"megatron-paper": 0, "deepspeed-paper": 0},
    "full disk": {"megatron-default": 10, "megatron-background": 5, "deepspeed-paper": 10},
    "lost rights": {"megatron-default": 10, "deepspeed-paper": 10},
    "limit on file sizes": {"megatron-default": 4, "deepspeed-paper": 4},
    "two runs in a folder": {"megatron-default": 4, "deepspeed-default": 4},
    "killed in a save": {"megatron-default": 10, "megatron-background": 10, "deepspeed-paper": 10},
    "random signals": {
        "megatron-default": 30,
        "megatron-paper": 40,
        "megatron-reference": 20,
        "megatron-background": 20,
        "deepspeed-default": 30,
        "deepspeed-paper": 10,
    },
}
"""Of each kind; 0 is as many as one save has operations."""
IN_THE_MIDDLE = 40
"""An operation that every rank's save has."""
UNKNOWN = 150
"""Operations of a save that are not counted yet."""


class State:
    """What was tried so far, in a file that is replaced after every attempt."""

    def __init__(self, path: Path, code: str) -> None:
        """Read it; that of another version of the package is put aside."""
        self.path = path
        self.found: dict[str, Any] = {"code": code, "tasks": {}, "sizes": {}, "notes": []}
        self.begins = True
        """Whether this is the beginning of a campaign, to which runs of before mean nothing."""
        if path.exists():
            found = json.loads(path.read_text())
            if found["code"] == code:
                self.found, self.begins = found, False
            else:
                path.rename(path.with_name(f"state-{found['code']}.json"))
                print(
                    f"the package has changed: a new campaign begins, the one before is in state-{found['code']}.json"
                )

    def counts(self, task: Task) -> dict[str, Any]:
        """Of one task."""
        return self.found["tasks"].setdefault(
            task.key, {"tried": 0, "held": 0, "failed": 0, "silent": 0, "seconds": 0.0, "next": 0}
        )

    def target(self, task: Task) -> int:
        """Attempts that it wants."""
        return task.target or int(self.found["sizes"].get(task.key, UNKNOWN))

    def size(self, task: Task, size: int) -> None:
        """Note how many operations there are."""
        self.found["sizes"][task.key] = size

    def write(self) -> None:
        """Put it on the disk."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1))
        partial.replace(self.path)


class Workshop:
    """What the attempts of one setup share."""

    def __init__(self, name: str, folder: Path) -> None:
        """Nothing is started yet."""
        from tests.faults.attempts import Rig
        from tests.faults.setups import Bench

        self.rig = Rig(Bench(name, folder / name))

    @cached_property
    def operations(self) -> tuple[int, int]:
        """Disk operations of one save, by rank."""
        from tests.faults.attempts import operations

        return operations(self.rig, 0), operations(self.rig, 1)

    def attempts(self, task: Task, state: State) -> Generator[Callable[[], Any]]:
        """Attempts of a task, from where it stopped; they end where there is a last one."""
        from tests.faults import attempts, damage

        rig, counts = self.rig, state.counts(task)

        def chance() -> random.Random:
            return random.Random(f"{task.key} {counts['next']}")

        if task.kind.startswith("crash points"):
            ranks = int(task.kind.split()[2])
            total, points = attempts.crash_points(rig, ranks, counts["next"])
            state.size(task, total)
            for point in points:
                yield functools.partial(attempts.crash_point, rig, point, ranks)
            return
        if task.kind.startswith("errors"):
            rank = int(task.kind[-1])
            state.size(task, self.operations[rank])
            while counts["next"] < self.operations[rank]:
                yield lambda: attempts.error_at(rig, rank, counts["next"] + 1)
            return
        simple: dict[str, Callable[[], Any]] = {
            "random signals": lambda: attempts.killed(rig, chance(), lambda: hit(counts)),
            "killed in a save": lambda: attempts.killed_at(rig, chance(), self.operations),
            "full disk": lambda: attempts.refused_onwards(rig, chance(), self.operations, errno.ENOSPC, shim.SPACE),
            "lost rights": lambda: attempts.refused_onwards(rig, chance(), self.operations, errno.EACCES, shim.NAMES),
            "limit on file sizes": lambda: attempts.limited(rig, chance()),
            "two runs in a folder": lambda: attempts.second_start(rig),
            "bit flips in checkpoints": lambda: damage.damaged_checkpoint(rig, chance(), damage.flip),
            "other damage to checkpoints": lambda: damage.damaged_checkpoint(
                rig, chance(), damage.DAMAGES[counts["next"] % len(damage.DAMAGES)]
            ),
            "bit flips in data": lambda: damage.damaged_data(rig, chance()),
        }
        while True:
            yield simple[task.kind]


def hit(counts: dict[str, Any]) -> None:
    """Count one signal of several that a run has got; the last one counts as the attempt."""
    counts["hits"] = counts.get("hits", 0) + 1


def code_digest() -> str:
    """A short hash of the package."""
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(Path("es_megatron").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run_slice(task: Task, state: State, workshop: Workshop, until: float) -> bool:
    """Try one kind of fault for a while; tells whether there is more of it."""
    counts = state.counts(task)
    attempts = workshop.attempts(task, state)
    ends, began = until, 0.0
    while time.monotonic() < ends:
        begun = time.monotonic()
        attempt = next(attempts, None)
        if attempt is None:
            return False
        outcome = attempt()
        began = began or time.monotonic()  # of the slice: once what all attempts stand on is there
        counts["tried"] += 1
        counts["next"] += 1
        counts[outcome.result] += 1
        counts["seconds"] += time.monotonic() - begun
        if outcome.result != "held":
            kept = keep(outcome.kept, state.path.parent / "failures") if outcome.kept else ""
            note = {"task": task.key, "number": counts["next"], "result": outcome.result, "kept": kept}
            state.found["notes"].append({**note, "note": outcome.note})
            print(f"{task.key} {counts['next']}: {outcome.result}: {outcome.note}", flush=True)
        state.write()
        ends = min(until, began + SLICE)
    return True


def keep(directory: Path, folder: Path) -> str:
    """Put the folder of a run aside, with what its ranks said; returns where it is."""
    target = folder / str(time.time_ns())
    target.mkdir(parents=True)
    for path in directory.parent.glob(f"{directory.name}*"):
        path.rename(target / path.name)
    return str(target)


def table(state: State, tasks: list[Task]) -> str:
    """What came of it, by kind and setup."""
    rows = [("fault", "run", "tried", "of", "held", "failed", "silent", "an hour")]
    for task in tasks:
        counts = state.counts(task)
        if counts["tried"]:
            tried = f"{counts['tried']}" + (f" ({counts['hits']} signals)" if "hits" in counts else "")
            rate = f"{3600 * counts['tried'] / counts['seconds']:,.0f}"
            numbers = [str(counts[name]) for name in ("held", "failed", "silent")]
            rows.append((task.kind, task.setup, tried, str(state.target(task)), *numbers, rate))
    sums = [sum(state.counts(task)[name] for task in tasks) for name in ("tried", "held", "failed", "silent")]
    hours = sum(state.counts(task)["seconds"] for task in tasks) / 3600
    rows.append(("all", "", str(sums[0]), "", *map(str, sums[1:]), f"in {hours:.2f} h"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def campaign(arguments: argparse.Namespace, state: State, tasks: list[Task]) -> None:
    """Give each task its turns, the one that is furthest behind first."""
    for name in {each.setup for each in tasks} if state.begins else ():
        shutil.rmtree(arguments.folder / name, ignore_errors=True)
    until = time.monotonic() + 60 * arguments.minutes
    workshops: dict[str, Workshop] = {}
    left = list(tasks)
    while left and time.monotonic() < until:
        task = min(left, key=lambda each: state.counts(each)["tried"] / state.target(each))
        for name in [name for name in workshops if name != task.setup]:
            workshops.pop(name).rig.close()
        workshop = workshops.setdefault(task.setup, Workshop(task.setup, arguments.folder.resolve()))
        try:
            if not run_slice(task, state, workshop, until):
                left.remove(task)
        except RuntimeError as error:  # what attempts stand on does not stand
            print(f"{task.key}: {error}", flush=True)
            state.found["notes"].append({"task": task.key, "result": "not tried", "note": str(error)})
            left.remove(task)
        state.write()
    for workshop in workshops.values():
        workshop.rig.close()


def core(folder: Path) -> int:
    """One attempt or a few of the kinds that matter most, in less than a minute."""
    from tests.faults import attempts, damage

    rig = Workshop("megatron-default", folder.resolve()).rig
    chance, wrong = random.Random(5), 0
    tried: dict[str, tuple[int, Callable[[], Any]]] = {
        "error on rank 1": (1, lambda: attempts.error_at(rig, 1, IN_THE_MIDDLE)),
        "killed in a save": (1, lambda: attempts.killed_at(rig, chance, (IN_THE_MIDDLE, IN_THE_MIDDLE))),
        "bit flips": (40, lambda: damage.damaged_checkpoint(rig, chance, damage.flip, 2)),
    }
    for kind, (times, attempt) in tried.items():
        begun = time.monotonic()
        outcomes = [attempt() for _ in range(times)]
        held = sum(outcome.result == "held" for outcome in outcomes)
        print(f"{kind}: {times} tried, {held} held, in {time.monotonic() - begun:.1f} s", flush=True)
        for outcome in outcomes:
            if outcome.result != "held":
                print(f"{outcome.result}: {outcome.note}", flush=True)
        wrong += times - held
    rig.close()
    return 1 if wrong else 0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to try (60); 0 prints the table alone")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where it works ({FOLDER})")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="kinds and runs whose names have one of these"
    )
    parser.add_argument("--core", action="store_true", help="what `make test` tries, and no more")
    arguments = parser.parse_args()
    if arguments.minutes:
        shim.preload(arguments.folder, "tests.faults.chaos")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.core:
        return core(arguments.folder)
    state = State(arguments.folder / "state.json", code_digest())
    tasks = [Task(kind, setup, target) for kind, each in TARGETS.items() for setup, target in each.items()]
    if arguments.minutes:
        os.environ.pop("LD_PRELOAD", None)  # what is started from here needs it no more; forks have it
        from tests.faults.setups import import_deepspeed

        chosen = [task for task in tasks if not arguments.only or any(word in task.key for word in arguments.only)]
        if not import_deepspeed():
            print("DeepSpeed is not installed: its runs are left out")
            chosen = [task for task in chosen if not task.setup.startswith("deepspeed")]
        campaign(arguments, state, chosen)
    print(table(state, tasks))
    wrong = [note for note in state.found["notes"] if note["result"] in ("failed", "silent", "not tried")]
    for note in wrong:
        print(f"{note['task']}: {note['result']}: {note['note'].splitlines()[0][:NOTES]} {note.get('kept', '')}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
