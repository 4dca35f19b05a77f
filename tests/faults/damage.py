"""Bits that flip, and files that are cut, zeroed, lengthened or gone, in whole checkpoints and in data."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

from tests.faults.attempts import BEFORE, HELD, SILENT, Outcome, Rig
from tests.faults.setups import SAVE

How = Callable[[bytearray, random.Random], bytearray]

ONE = 1
"""Processes that load."""
WITH_DATA = -1
"""In the place of an iteration: the newest one and all rows."""


def flip(content: bytearray, chance: random.Random) -> bytearray:
    """One bit of it."""
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def cut(content: bytearray, chance: random.Random) -> bytearray:
    """Its beginning."""
    return content[: chance.randrange(len(content))]


def zero(content: bytearray, chance: random.Random) -> bytearray:
    """With zeros in a sector, as after a crash of some file systems."""
    start = chance.randrange(len(content)) // 512 * 512
    size = len(content[start : start + 512])
    content[start : start + size] = bytes(size)
    return content


def lengthen(content: bytearray, chance: random.Random) -> bytearray:
    """With bytes at its end."""
    return content + chance.randbytes(chance.randint(1, 600))


def swap(content: bytearray, chance: random.Random) -> bytearray:
    """With its two halves in the other order."""
    half = len(content) // 2
    return content[half:] + content[:half]


DAMAGES: tuple[How, ...] = (cut, zero, lengthen, swap)


def checkpoint_of(rig: Rig, ranks: int = ONE) -> Path:
    """A run's folder with two whole checkpoints, to be damaged and mended again."""
    directory = rig.bench.folder / "damaged"
    if not rig.spoilt:
        rig.spoilt = True  # from now on; what a campaign that was ended has left is damaged still
        rig.copy(rig.bench.undisturbed(ranks), "damaged")
        root = directory / "checkpoints"
        for path in root.glob("iter_*"):
            if int(path.name[5:]) not in (BEFORE, SAVE):
                shutil.rmtree(path)
        (root / "latest").write_text(f"iter_{SAVE:07d}\n")
    return directory


def data_of(rig: Rig) -> Path:
    """A copy of the data, to be damaged and mended again."""
    target = rig.bench.folder / "damaged-data"
    return target if (ONE, WITH_DATA) in rig.digests else rig.copy(rig.bench.data, target.name)


def files_of(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files there that have something in them."""
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def damaged_checkpoint(rig: Rig, chance: random.Random, how: How, ranks: int = ONE) -> Outcome:
    """Damage to the newest checkpoint: found, or without effect."""
    directory = checkpoint_of(rig, ranks)
    files = files_of(directory / "checkpoints", (f"iter_{SAVE:07d}/**/*", "latest"))
    expected = {iteration: rig.digest(iteration, ranks) for iteration in (BEFORE, SAVE)}
    with_damage = _with_damage(files, chance, how)
    try:
        path, what = next(with_damage)
        verdict = rig.judge(ranks).ask(directory)
    finally:
        with_damage.close()
    if verdict.kind == "loaded" and verdict.digest != expected.get(verdict.iteration):
        return Outcome(SILENT, f"{what} {path}: iteration {verdict.iteration} was loaded with another state")
    if verdict.kind in ("loaded", "refused"):
        return Outcome(HELD)
    return Outcome("failed", f"{what} {path}: {verdict.kind}: {verdict.said[-1200:]}")


def damaged_data(rig: Rig, chance: random.Random) -> Outcome:
    """A bit of a data file flips under a run: found as it goes on, or without effect."""
    data, directory = data_of(rig), checkpoint_of(rig)
    if (ONE, WITH_DATA) not in rig.digests:
        rig.digests[ONE, WITH_DATA] = rig.judge(ONE).ask(directory, data=rig.bench.data).digest
    with_damage = _with_damage(files_of(data, ("*.bin", "*.idx", "*.hash.json")), chance, flip)
    try:
        path, what = next(with_damage)
        verdict = rig.judge(ONE).ask(directory, data=data)
    finally:
        with_damage.close()
    if verdict.kind == "loaded" and verdict.digest != rig.digests[ONE, WITH_DATA]:
        return Outcome(SILENT, f"{what} {path}: the run would go on with other tokens")
    if verdict.kind in ("loaded", "refused"):
        return Outcome(HELD)
    return Outcome("failed", f"{what} {path}: {verdict.kind}: {verdict.said[-1200:]}")


def _with_damage(files: list[Path], chance: random.Random, how: How) -> Generator[tuple[Path, str]]:
    """Damage one file, larger ones more often; closed, it mends it."""
    path = chance.choices(files, [file.stat().st_size for file in files])[0]
    whole = path.read_bytes()
    try:
        path.write_bytes(how(bytearray(whole), chance))
        yield path, how.__name__
    finally:
        path.write_bytes(whole)
