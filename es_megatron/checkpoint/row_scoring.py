"""The loss that a model has of every row of a blend: forward only, over data-parallel ranks, and resumable.

Who makes the passes is the caller's business: this hands out rows, keeps what is known, and seals the result.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.evolution import NO_LOSS
from es_megatron.algorithm.ownership import owned_range
from es_megatron.checkpoint.agreement import agreed, compute_on_first
from es_megatron.checkpoint.es_state import ScoreRange, read_manifest, read_state, save_es_state
from es_megatron.checkpoint.loss_blocks import LossBlocks
from es_megatron.checkpoint.reference_losses import REFERENCE
from es_megatron.checkpoint.transfer import plan_transfer, read_moved, saved_blend
from es_megatron.data.manifest import Manifest
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

LossesOf = Callable[[Int64, int], Float32]
"""Losses float32[N] of ids int64[N], nan where there is none. The second argument is the most that a data-parallel rank
has, for how many every rank makes its pass; collective over the world."""

SECONDS_BETWEEN_LINES = 10.0
ENDS = 1 << 16
"""Bytes at either end of a checkpoint's file that its fingerprint reads."""


def about_losses(model: Path, checkpoint: Path, tokens: int) -> dict[str, Any]:
    """What losses are of, as their state keeps it.

    Args:
        model: the path that the user gave.
        checkpoint: folder of its weights; its files' names, sizes and both ends tell it from others.
        tokens: first tokens of a row that the losses are about.
    """
    told = hashlib.blake2b(digest_size=8)
    for path in sorted(each for each in checkpoint.rglob("*") if each.is_file()):
        told.update(f"{path.relative_to(checkpoint)} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            told.update(file.read(ENDS))
            file.seek(max(0, path.stat().st_size - ENDS))
            told.update(file.read(ENDS))
    return {"model": str(model), "checkpoint": told.hexdigest(), "tokens": tokens}


@dataclass(frozen=True)
class Scored:
    """What a command did."""

    rows: int
    """Rows scored now."""
    known: int
    """Rows whose losses were there before."""
    seconds: float
    """Of the passes alone, on the slowest rank."""
    means: dict[str, float]
    """Mean loss of each component."""


class RowScoring:
    """One output on its way."""

    def __init__(
        self,
        grid: RankGrid,
        manifest: Manifest,
        losses_of: LossesOf,
        output: Path,
        about: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Remember what is to be done.

        Args:
            grid: this rank's place.
            manifest: the blend to score.
            losses_of: makes the passes.
            output: folder to make or to complete.
            about: what the losses are of, of `about_losses`.
            say: is told of the progress, on world rank 0.
        """
        self.grid, self.manifest, self.losses_of = grid, manifest, losses_of
        self.output, self.about = output, about
        self.say = say if grid.world_rank == 0 else lambda _: None
        self.total = manifest.total
        self.known: list[list[int]] = []
        self.blocks = LossBlocks(output, self.total)

    def run(self) -> Scored:
        """Score what is missing, and seal the output; collective."""
        known = compute_on_first(self.grid, f"look at {self.output}", self._known_parts)
        identity = {"about": self.about, "manifest": self.manifest.to_json(), "known": known}
        missing = compute_on_first(self.grid, f"begin {self.output}", lambda: self._begin(identity))
        self.known = known
        rows, seconds = self._score(missing)
        self.grid.barrier()  # blocks are read by other ranks than wrote them
        low, high = owned_range(self.total, self.grid.dp_rank, self.grid.dp_size)
        found: list[Float32] = []
        with agreed(self.grid, f"join the losses of {self.output}"):
            found.append(self._join(low, high))
        loss = found[0]
        finite = np.isfinite(loss)
        scores = ScoreRange(self.total, low, np.where(finite, loss, 0).astype(np.float32), finite.astype(np.uint8))
        state = {REFERENCE: self.about}
        save_es_state(self.output, scores, {}, state, self.manifest.to_json(), self.grid)
        with agreed(self.grid, f"remove {self.blocks.folder}"):
            if self.grid.world_rank == 0:
                self.blocks.remove()
        slowest = max(self.grid.gather_objects(seconds))
        counted = sum(self.grid.gather_objects(rows if self.grid.mp_rank == 0 else 0))
        return Scored(counted, sum(high - low for low, high in known), slowest, self._means(low, loss))

    def _held(self, low: int, high: int) -> Bool:
        """Which ids of a range the output has already, bool[high - low]."""
        held = np.zeros(high - low, np.bool_)
        for first, end in self.known:
            if first < high and end > low:
                held[max(first, low) - low : min(end, high) - low] = True
        return held

    def _known_parts(self) -> list[list[int]]:
        """Ranges of ids whose losses the output has already."""
        if not self.output.exists():
            return []
        document = read_manifest(self.output)
        before = read_state(self.output, document).get(REFERENCE)
        same = before is not None and {**before, "model": ""} == {**self.about, "model": ""}
        if not same:
            raise CheckpointError(
                f"`{self.output}` holds losses of another model, or about other tokens: {before}. Name another folder, "
                "or remove it."
            )
        moves = plan_transfer(saved_blend(self.output), self.manifest).moves
        return [[move.target, move.target + move.rows] for move in moves]

    def _begin(self, identity: dict[str, Any]) -> list[int]:
        self.blocks.begin(identity)
        return self.blocks.missing()

    def _score(self, missing: Sequence[int]) -> tuple[int, float]:
        """Score this data-parallel rank's blocks; rows and seconds."""
        mine = missing[self.grid.dp_rank :: self.grid.dp_size]
        turns = -(-len(missing) // self.grid.dp_size)
        left = sum(int(np.count_nonzero(~self._held(*self.blocks.bounds(block)))) for block in missing)
        self.say(f"{self.output}: {left:,} of {self.total:,} rows to score, in {len(missing)} blocks")
        rows, began, told = 0, time.perf_counter(), time.perf_counter()
        for turn in range(turns):
            low, high = self.blocks.bounds(mine[turn]) if turn < len(mine) else (0, 0)
            ids = low + np.flatnonzero(~self._held(low, high))
            share = int(max(self.grid.gather_objects(len(ids))))
            loss = np.full(high - low, np.nan, np.float32)
            if share:
                found = self.losses_of(ids, share)
                loss[ids - low] = np.where(found == NO_LOSS, np.float32(np.nan), found)
            if turn < len(mine) and self.grid.mp_rank == 0:
                self.blocks.write(mine[turn], loss)
            rows += len(ids)
            if time.perf_counter() - told > SECONDS_BETWEEN_LINES:
                told = time.perf_counter()
                rate = rows * self.grid.dp_size / (told - began)
                seconds = (turns - turn - 1) * (told - began) / (turn + 1)
                self.say(f"{(turn + 1) / turns:.1%}, {rate:,.0f} rows/s, {seconds:,.0f} s left")
        return rows, time.perf_counter() - began

    def _join(self, low: int, high: int) -> Float32:
        """Losses of this rank's range: of the blocks, and those that the output had."""
        loss, held = self.blocks.gather(low, high), self._held(low, high)
        if held.any():
            before, known = np.zeros(high - low, np.float32), np.zeros(high - low, np.uint8)
            read_moved(self.output, plan_transfer(saved_blend(self.output), self.manifest), low, before, known)
            loss[held] = np.where(known > 0, before, np.nan)[held]
        return loss

    def _means(self, low: int, loss: Float32) -> dict[str, float]:
        """Mean loss of each component over all ranks; collective."""
        offsets = np.clip(self.manifest.offsets - low, 0, len(loss)).tolist()
        parts = [loss[first:end] for first, end in itertools.pairwise(offsets)]
        own = [[np.nansum(part, dtype=np.float64), np.count_nonzero(np.isfinite(part))] for part in parts]
        sums, counts = self.grid.sum_over_dp(np.asarray(own, np.float64)).T
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        return {each.name: float(mean[c]) for c, each in enumerate(self.manifest.components)}


def told(output: Path, done: Scored) -> str:
    """One line of what was done."""
    rate = done.rows / done.seconds if done.seconds > 0 else 0.0
    means = ", ".join(f"{name} {mean:.4f}" for name, mean in done.means.items())
    return f"{output}: {done.rows:,} rows scored ({rate:,.0f} rows/s), {done.known:,} were there; mean loss {means}"
