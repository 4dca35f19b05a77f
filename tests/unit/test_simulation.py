"""Times of pipeline schedules, against arithmetic and against times event by event, and the drawing of them."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest

from es_megatron.core.plan import Layout
from es_megatron.core.simulation import (
    Event,
    Order,
    Times,
    best_order,
    duration,
    durations,
    forward_duration,
    in_order,
    needs,
    peak_activations,
    program,
)

SHAPES = [
    (1, 1, 5),
    (2, 1, 1),
    (2, 1, 7),
    (4, 1, 3),
    (4, 1, 9),
    (8, 1, 24),
    (2, 2, 4),
    (4, 2, 8),
    (4, 3, 12),
    (8, 2, 16),
]
DOCUMENT = Path(__file__).parents[2] / "docs" / "merged-scoring.md"
MARK = "<!-- drawing -->\n"


@pytest.mark.parametrize(("stages", "chunks", "count"), SHAPES)
def test_every_stage_runs_every_pass_once_and_backward_after_forward(stages: int, chunks: int, count: int) -> None:
    for stage in range(stages):
        events = program(stage, stages, chunks, count)
        assert len(set(events)) == len(events) == 2 * count * chunks
        for event in events:
            if not event.forward:
                assert events.index(event._replace(forward=True)) < events.index(event)


@pytest.mark.parametrize(("stages", "chunks", "count"), SHAPES)
def test_uniform_micro_batches_take_what_arithmetic_says(stages: int, chunks: int, count: int) -> None:
    ramp = (stages - 1) / chunks
    assert duration(stages, chunks, Order(0, count, 0), Times(2.0, 5.0)) == pytest.approx(7 * (count + ramp))
    assert forward_duration(stages, chunks, count, Times(scoring=3.0)) == pytest.approx(3 * (count + ramp))


def ends(stages: int, chunks: int, trains: list[bool], times: Times) -> dict[tuple[int, Event], float]:
    """When every event is over, by recursion over what comes before it on its stage and what it waits for."""
    programs = [program(stage, stages, chunks, len(trains)) for stage in range(stages)]
    place = {(stage, event): at for stage, events in enumerate(programs) for at, event in enumerate(events)}

    @functools.cache
    def end(stage: int, event: Event) -> float:
        at, source = place[stage, event], needs(stage, event, stages, chunks)
        begin = end(stage, programs[stage][at - 1]) if at else 0.0
        if source is not None:
            begin = max(begin, end(*source) + times.exchange * (source[0] != stage))
        trained = trains[event.micro_batch]
        cost = (times.forward if trained else times.scoring) if event.forward else times.backward * trained
        return begin + cost / chunks

    return {(stage, event): end(stage, event) for stage, events in enumerate(programs) for event in events}


def test_mixed_orders_take_what_recursion_says() -> None:
    random = np.random.default_rng(1)
    for stages, chunks, count in SHAPES[:-3]:
        times = Times(1.3, 2.1, 0.7, 0.2)
        trains = random.random((5, count)) < 0.5
        expected = [max(ends(stages, chunks, row.tolist(), times).values()) for row in trains]
        np.testing.assert_allclose(durations(stages, chunks, trains, times), expected)


def test_the_best_order_is_the_best_of_all_and_fills_about_five_eighths_of_the_stages() -> None:
    for stages, count in ((2, 16), (4, 16), (8, 32)):
        every = [duration(stages, 1, Order(count - x, count // 4, x), Times()) for x in range(count + 1)]
        best = best_order(stages, 1, count // 4, count, Times())
        assert best.after == int(np.argmin(every))
        assert abs(best.after - 5 * stages / 8) <= 0.5
    assert best_order(1, 1, 4, 16, Times()) == Order(16, 4, 0), "without stages the last micro-batch trains"


def test_activations_are_those_of_what_trains() -> None:
    assert peak_activations(4, 1, Order(0, 8, 0)) == 4
    assert peak_activations(4, 1, Order(6, 2, 2)) == 2
    assert peak_activations(4, 2, Order(0, 8, 0)) == pytest.approx((2 * 3 + 4 + 1) / 2)


def test_a_layout_adds_the_exchange_between_stages() -> None:
    alone, joined = Layout(8, 8, pipeline=4), Layout(8, 8, pipeline=4, exchange=0.5)
    assert joined.scoring() == alone.scoring() + 3 * 0.5
    assert joined.whole() > alone.whole() + 6 * 0.5 - 1e-9
    assert Layout(8, 8, exchange=0.5).whole() == Layout(8, 8).whole()


def test_programs_that_wait_for_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    backwards = program(0, 2, 1, 2)[::-1]
    monkeypatch.setattr("es_megatron.core.simulation.program", lambda *_, **__: backwards)
    with pytest.raises(ValueError, match="2 stages of 1 chunks wait for each other over 3 micro-batches"):
        in_order.__wrapped__(2, 1, 3, False)


def drawn(
    trains: list[bool] | None, stages: int, micro_batches: int, shift: int = 0, names: str = ""
) -> list[list[str]]:
    """Rows of a drawing, a character a unit of time: digits train, letters score, `=` is a backward pass."""
    if trains is None:
        rows = [["."] * (stage + shift) + list(names[:micro_batches]) for stage in range(stages)]
        return [row + ["."] * (stages - 1 - stage) for stage, row in enumerate(rows)]
    times = ends(stages, 1, trains, Times())
    rows = [["."] * int(max(times.values())) for _ in range(stages)]
    for (stage, event), end in times.items():
        width = 1 if event.forward else 2 * trains[event.micro_batch]
        for at in range(int(end) - width, int(end)):
            rows[stage][at] = names[event.micro_batch] if event.forward else "="
    return rows


def drawing() -> str:
    """Score-then-train and merged, 4 stages, 8 micro-batches of which 2 are trained."""
    stages, score, train = 4, 8, 2
    first = drawn(None, stages, score, names="abcdefgh")
    naive = [a + b for a, b in zip(first, drawn([True] * train, stages, train, names="12"), strict=True)]
    order = best_order(stages, 1, train, score, Times())
    names = "ABCDEFGH"[: order.before] + "12" + "ABCDEFGH"[order.before :]
    merged = drawn(order.trains, stages, score + train, names=names)
    plain = drawn([True] * score, stages, score, names="12345678")
    lines = []
    for title, rows in (("plain", plain), ("score, then train", naive), ("merged", merged)):
        lines.append(f"{title}: {len(rows[0])}")
        lines += [f"  stage {stage}  {''.join(row)}" for stage, row in enumerate(rows)]
    return "\n".join(["```text", *lines, "```", ""])


def test_the_document_has_the_drawing() -> None:
    """Write it anew with `ES_WRITE_GOLDEN=1 python -m pytest tests/unit/test_simulation.py`."""
    before, _, rest = DOCUMENT.read_text().partition(MARK)
    _, _, after = rest.partition(MARK)
    text = before + MARK + drawing() + MARK + after
    if os.environ.get("ES_WRITE_GOLDEN"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text
