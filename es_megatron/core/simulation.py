"""Times of a pipeline's schedules, event by event: 1F1B and interleaved, with micro-batches that train and that score.

Every stage runs its own program in order; a pass waits for its input from the stage before, a backward pass for its
gradient from the stage after. Whoever sends goes on at once. Orders of programs are those of Megatron-Core's
`forward_backward_pipelining_with(out)_interleaving`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

MOST_ORDERS = 64
"""Orders that are tried for the best one."""


class Event(NamedTuple):
    """One pass of a micro-batch through one model chunk of a stage."""

    forward: bool
    micro_batch: int
    chunk: int


class Step(NamedTuple):
    """An event with its places among all events of a schedule."""

    stage: int
    event: Event
    waits_for: int
    """Place of the event whose output it needs, -1 for none."""
    sent: bool
    """Whether that comes from another stage."""


@dataclass(frozen=True)
class Times:
    """What the passes of one micro-batch through one stage (all its chunks) cost, in any one unit."""

    forward: float = 1.0
    backward: float = 2.0
    scoring: float = 1.0
    """A forward pass that keeps nothing."""
    exchange: float = 0.0
    """Sending activations or gradients of a micro-batch from one stage to the next."""


@dataclass(frozen=True)
class Order:
    """Which micro-batches of one call train: `before` score, `train` train, `after` score."""

    before: int
    train: int
    after: int

    @property
    def told(self) -> str:
        """For people."""
        early = f"{self.before} micro-batches of the next meta-batch before the {self.train} that are trained"
        return f"{early}, {self.after} after them, in one pass"

    @property
    def trains(self) -> list[bool]:
        """Of each micro-batch in turn, whether it trains."""
        return [False] * self.before + [True] * self.train + [False] * self.after


def program(stage: int, stages: int, chunks: int, micro_batches: int, *, forward_only: bool = False) -> list[Event]:
    """What a stage runs, in its order.

    Args:
        stage: from 0.
        stages: of the pipeline (p).
        chunks: model chunks of a stage (v); above 1 the schedule is interleaved.
        micro_batches: of the call; a multiple of `stages` where interleaved.
        forward_only: without backward passes.
    """
    total = micro_batches * chunks
    group = stages * chunks

    def place(number: int) -> tuple[int, int]:
        """Micro-batch and chunk of a stage's so-and-so-many-th forward pass."""
        if chunks == 1:
            return number, 0
        return number // group * stages + number % stages, number % group // stages

    def forward(number: int) -> Event:
        return Event(True, *place(number))

    def backward(number: int) -> Event:
        micro_batch, chunk = place(number)
        return Event(False, micro_batch, chunks - 1 - chunk)

    if forward_only:
        return [forward(number) for number in range(total)]
    ahead = stages - stage - 1
    warm_up = min(total, ahead if chunks == 1 else 2 * ahead + (chunks - 1) * stages)
    events = [forward(number) for number in range(warm_up)]
    for number in range(total - warm_up):
        events += [forward(warm_up + number), backward(number)]
    return events + [backward(number) for number in range(total - warm_up, total)]


@lru_cache(maxsize=4)
def in_order(stages: int, chunks: int, micro_batches: int, forward_only: bool) -> tuple[Step, ...]:
    """All events of a schedule, every one after those that it waits for.

    Raises:
        ValueError: the programs wait for each other for ever.
    """
    programs = [program(s, stages, chunks, micro_batches, forward_only=forward_only) for s in range(stages)]
    places: dict[tuple[int, Event], int] = {}
    found: list[Step] = []
    at = [0] * stages
    while any(at[stage] < len(programs[stage]) for stage in range(stages)):
        before = len(found)
        for stage in range(stages):
            while at[stage] < len(programs[stage]):
                event = programs[stage][at[stage]]
                source = needs(stage, event, stages, chunks)
                if source is not None and source not in places:
                    break
                places[stage, event] = len(found)
                found.append(
                    Step(
                        stage,
                        event,
                        -1 if source is None else places[source],
                        source is not None and source[0] != stage,
                    )
                )
                at[stage] += 1
        if len(found) == before:
            raise ValueError(
                f"{stages} stages of {chunks} chunks wait for each other over {micro_batches} micro-batches"
            )
    return tuple(found)


def needs(stage: int, event: Event, stages: int, chunks: int) -> tuple[int, Event] | None:
    """Stage and event whose output an event needs; None where it is the first of its micro-batch."""
    if event.forward:
        if stage > 0:
            return stage - 1, event
        return None if event.chunk == 0 else (stages - 1, event._replace(chunk=event.chunk - 1))
    if stage < stages - 1:
        return stage + 1, event
    if event.chunk < chunks - 1:
        return 0, event._replace(chunk=event.chunk + 1)
    return stage, event._replace(forward=True)


def durations(
    stages: int, chunks: int, trains: Bool | Sequence[Sequence[bool]], times: Times, *, forward_only: bool = False
) -> Float64:
    """How long a call of the schedule takes, for several orders of its micro-batches at once.

    Args:
        stages: of the pipeline.
        chunks: model chunks of a stage.
        trains: bool[X, n], for each of X orders whether each of its n micro-batches trains.
        times: of passes.
        forward_only: without backward passes; all micro-batches score.

    Returns:
        float64[X], until the last stage is done.
    """
    trains_XN = np.asarray(trains, dtype=bool)
    # in chunks' worth of time, divided at the end: whole numbers stay whole
    forward_NX = np.where(trains_XN, times.forward, times.scoring).T
    backward_NX = np.where(trains_XN, times.backward, 0.0).T
    clock = np.zeros((stages, trains_XN.shape[0]))
    ends: list[Float64] = []
    for stage, event, waits_for, sent in in_order(stages, chunks, trains_XN.shape[1], forward_only):
        begin = clock[stage]
        if waits_for >= 0:
            begin = np.maximum(begin, ends[waits_for] + (times.exchange * chunks if sent else 0.0))
        end = begin + (forward_NX if event.forward else backward_NX)[event.micro_batch]
        clock[stage] = end
        ends.append(end)
    return clock.max(axis=0) / chunks


@lru_cache(maxsize=256)
def duration(stages: int, chunks: int, order: Order, times: Times) -> float:
    """How long one call takes in which some micro-batches train and others score."""
    return float(durations(stages, chunks, [order.trains], times)[0])


@lru_cache(maxsize=256)
def forward_duration(stages: int, chunks: int, micro_batches: int, times: Times) -> float:
    """How long a forward-only call takes."""
    return float(durations(stages, chunks, [[False] * micro_batches], times, forward_only=True)[0])


@lru_cache(maxsize=256)
def best_order(stages: int, chunks: int, train: int, score: int, times: Times) -> Order:
    """The order a scores, the trained ones, x scores that takes least; the smallest x of those.

    Scores at the end fill the stages while the last gradients come back, so more than a few for each stage cannot help.
    """
    most = min(score, 2 * stages * chunks) if stages > 1 else 0
    tried = sorted(set(np.linspace(0, most, min(most + 1, MOST_ORDERS)).astype(int).tolist()))
    orders = [Order(score - after, train, after) for after in tried]
    if len(orders) == 1:
        return orders[0]
    return orders[int(np.argmin(np.round(durations(stages, chunks, [order.trains for order in orders], times), 9)))]


def peak_activations(stages: int, chunks: int, order: Order) -> float:
    """Activations of whole micro-batches that the fullest stage holds at once; those that score leave none."""
    return max(max(_held(stage, stages, chunks, order)) for stage in range(stages)) / chunks


def _held(stage: int, stages: int, chunks: int, order: Order) -> Iterator[int]:
    trains, held = order.trains, 0
    for event in program(stage, stages, chunks, len(trains)):
        held += (1 if event.forward else -1) if trains[event.micro_batch] else 0
        yield held
