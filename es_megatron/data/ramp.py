"""The size of each meta-batch where it grows at the beginning of a run (Megatron-LM's batch-size ramp-up)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from es_megatron.errors import ConfigError


class Stage(NamedTuple):
    """Iterations that draw the same number."""

    iterations: int
    size: int


@dataclass(frozen=True)
class Ramp:
    """Sizes of all meta-batches; those of the stages train on everything, the rest is of the full size."""

    full: int
    """B, of every iteration after the stages."""
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        """Check that sizes grow.

        Raises:
            ConfigError: names the sizes.
        """
        sizes = [*(stage.size for stage in self.stages), self.full]
        if sizes != sorted(sizes) or sizes[0] < 1:
            raise ConfigError(
                f"Batch sizes of a ramp-up must grow from iteration to iteration, but are {', '.join(map(str, sizes))} "
                "instead. Sort its steps, or leave it out."
            )

    @staticmethod
    def of_sizes(sizes: Iterable[int]) -> Ramp:
        """The ramp of a run whose iterations have these sizes, at least one; the last one is the full size."""
        stages = [Stage(len(list(equal)), size) for size, equal in groupby(sizes)]
        return Ramp(stages[-1].size, tuple(stages[:-1]))

    @staticmethod
    def linear(start: int, increment: int, samples: int, full: int) -> Ramp:
        """The sizes of `--rampup-batch-size START INCREMENT SAMPLES`, as Megatron-LM steps them.

        Args:
            start: size of the first meta-batch.
            increment: what it grows by.
            samples: draws over which it grows to the full size, in equal shares for each size.
            full: B.

        Raises:
            ConfigError: sizes that do not lead from one to the other.
        """
        if increment < 1 or not 1 <= start <= full or (full - start) % increment or samples < 0:
            raise ConfigError(
                f"`rampup_batch_size` must lead from its first size to {full} in whole steps, but is {start} "
                f"{increment} {samples} instead. Use an increment that divides {full - start}."
            )
        if start == full:
            return Ramp(full)
        share, sizes, drawn = samples / ((full - start) // increment), list[int](), 0
        while drawn <= samples and (size := start + int(drawn / share) * increment if share else full) < full:
            sizes.append(size)
            drawn += size
        return Ramp.of_sizes([*sizes, full])

    @property
    def iterations(self) -> int:
        """Iterations before the first of the full size."""
        return sum(stage.iterations for stage in self.stages)

    def check(self, quantum: int, setting: str) -> None:
        """Refuse sizes that the ranks cannot share.

        Args:
            quantum: what each must be a multiple of.
            setting: what the user knows the ramp by.

        Raises:
            ConfigError: names the setting and the cure.
        """
        odd = [stage.size for stage in self.stages if stage.size % quantum]
        if odd:
            raise ConfigError(
                f"Every batch size of `{setting}` must be a multiple of {quantum} (micro-batch size times "
                f"data-parallel size, times pipeline size when interleaved), but {', '.join(map(str, odd))} "
                f"{'is' if len(odd) == 1 else 'are'} not. Begin and step by multiples of {quantum}, or use a smaller "
                "micro-batch."
            )

    def size(self, iteration: int) -> int:
        """Sequences that an iteration draws."""
        for stage in self.stages:
            if iteration < stage.iterations:
                return stage.size
            iteration -= stage.iterations
        return self.full

    def position(self, iteration: int) -> int:
        """Draws before an iteration."""
        before = 0
        for stage in self.stages:
            if iteration < stage.iterations:
                return before + iteration * stage.size
            before, iteration = before + stage.iterations * stage.size, iteration - stage.iterations
        return before + iteration * self.full

    def iteration_at(self, position: int) -> int:
        """The iteration that makes the draw at a position; the inverse of `position`."""
        ends = accumulate(stage.iterations * stage.size for stage in self.stages)
        passed, before = 0, 0
        for stage, end in zip(self.stages, ends, strict=True):
            if position < end:
                return passed + (position - before) // stage.size
            passed, before = passed + stage.iterations, end
        return passed + (position - before) // self.full

    def after(self, iteration: int) -> Ramp:
        """What is left of it when a run begins at an iteration."""
        stages: list[Stage] = []
        for stage in self.stages:
            taken = min(iteration, stage.iterations)
            iteration -= taken
            if taken < stage.iterations:
                stages.append(Stage(stage.iterations - taken, stage.size))
        return Ramp(self.full, tuple(stages))

    def told(self) -> str:
        """What it does, in words."""
        sizes = f"B grows from {self.stages[0].size if self.stages else self.full} to {self.full}"
        return f"{sizes} over {self.iterations} iterations, which train on everything"

    def to_json(self) -> list[Any]:
        """JSON-able; empty where every meta-batch has the full size."""
        return [list(stage) for stage in self.stages]
