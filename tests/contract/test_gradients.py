"""Invariants 4 and 6: updates equal plain training on what was chosen, bit for bit; scores move with the optimizer.

The oracle is a second loop in the same process with the same initial weights and random states. It calls upstream's
schedule, unwrapped, on the micro-batches that the first loop was seen to train on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from es_megatron.trainer.model import initialize
from es_megatron.trainer.model_state import random_state, restore_random_state
from tests.ranks_helper import on_ranks, run_on_ranks
from tests.small_loop import RAGGED, UNMASKED, Loop, RandomRows, Step, build_experts
from tests.small_run import META_BATCH, settings_of

from megatron.core import parallel_state  # isort: skip - after the CPU layer
from megatron.core.transformer.moe.moe_utils import (  # isort: skip
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)

ITERATIONS = 6
DROPOUT = "model.dropout=0.1"
OVERLAPS = (
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "parallel.bucket_size=5000",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "pp2": (2, ("parallel.pipeline=2",)),
    "vpp2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "tp2": (2, ("parallel.tensor=2",)),
    "dp2-overlaps": (2, OVERLAPS),
    "cp2": (2, ("parallel.context=2",)),
    "cp2-pp2": (4, ("parallel.context=2", "parallel.pipeline=2")),
    "pp2-dp2-overlaps": (4, ("parallel.pipeline=2", *OVERLAPS)),
}


def settings_for(*overrides: str) -> Any:
    """Settings of a loop without files: its rows are in memory."""
    return settings_of(Path("unused"), Path("unused"), *overrides)


def compare(settings: Any, rows: RandomRows, per_token: bool) -> tuple[list[tuple[list[int], list[int]]], list[bool]]:
    """Evolve, then train plainly on what was chosen.

    Returns:
        For each iteration the ids of the record and the ids this rank saw, and whether the gradients were equal.
    """
    initialize(settings)
    before = random_state()
    evolving = Loop(settings, rows, per_token=per_token)
    steps = [evolving.evolve() for _ in range(ITERATIONS)]
    restore_random_state(before)
    plain = Loop(settings, None, per_token=per_token)
    equal: list[bool] = []
    for taken in steps:
        found = plain.train_on(batches_of_stage(taken))
        assert len(found.seen) == len(taken.seen)
        equal.append(torch.equal(found.gradients, taken.gradients))
        assert taken.gradients.abs().sum() > 0
    for ours, theirs in zip(evolving.chunks, plain.chunks, strict=True):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)
    return [(taken.chosen, [rows.find(*row) for row in rows_of(taken)]) for taken in steps], equal


def batches_of_stage(taken: Step) -> list[dict[str, torch.Tensor]]:
    """What the schedule is given: middle stages, which saw nothing, need only the count."""
    assert taken.seen, "with two stages both read data"
    return taken.seen


def rows_of(taken: Step) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of every row that got a backward pass on this rank."""
    pairs = [(batch["tokens"], batch["labels"]) for batch in taken.seen]
    return [(tokens[n], labels[n]) for tokens, labels in pairs for n in range(len(tokens))]


def check(ranks: int, overrides: tuple[str, ...], rows: RandomRows, *, per_token: bool = False) -> None:
    told = run_on_ranks(ranks, compare, settings_for(DROPOUT, *overrides), rows, per_token, timeout=120)
    assert all(all(equal) for _, equal in told)
    model_size = ranks // max(1, len({str(ids) for ids, _ in told}))
    for iteration in range(ITERATIONS):
        seen = sorted({n for ids, _ in told for n in ids[iteration][1]})
        assert {tuple(ids[iteration][0]) for ids, _ in told} == {tuple(told[0][0][iteration][0])}
        assert seen == sorted(set(told[0][0][iteration][0]))
        counts = {len(ids[iteration][1]) for ids, _ in told}
        assert counts == {len(told[0][0][iteration][0]) * model_size // ranks}, "the same count on every rank"
    assert [len(ids[0]) for ids in told[0][0]].count(4) >= 3, "some iterations choose"


@pytest.mark.parametrize("masks", [UNMASKED, RAGGED])
@pytest.mark.parametrize("name", ["one", "dp2", "pp2"])
def test_gradients_are_those_of_the_chosen_sequences(name: str, masks: str) -> None:
    ranks, overrides = LAYOUTS[name]
    check(ranks, overrides, RandomRows(masks))


@pytest.mark.parametrize("name", ["vpp2", "tp2", "cp2", "cp2-pp2", "dp2-overlaps", "pp2-dp2-overlaps"])
def test_gradients_are_those_of_the_chosen_sequences_on_more_layouts(name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    check(ranks, overrides, RandomRows(RAGGED))


def gradients(settings: Any, rows: RandomRows, per_token: bool) -> list[list[float]]:
    """Gradients of a parameter that every stage has: that of the first norm of this rank's first chunk."""
    initialize(settings)
    loop = Loop(settings, rows, per_token=per_token, gathering=True)
    name = next(name for name, _ in loop.chunks[0].named_parameters() if "layernorm" in name)
    found: list[list[float]] = []
    for _ in range(ITERATIONS):
        loop.evolve(spoil=lambda loop: found.append(loop.gradient(name)))
    return found


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", ["cp2", "cp2-pp2"])
def test_ranks_that_share_sequences_have_the_gradients_of_one_rank(name: str, per_token: bool) -> None:
    ranks, overrides = LAYOUTS[name]
    (alone,) = run_on_ranks(1, gradients, settings_for(), RandomRows(RAGGED), per_token, timeout=120)
    told = run_on_ranks(ranks, gradients, settings_for(*overrides), RandomRows(RAGGED), per_token, timeout=120)
    assert np.abs(alone).max() > 1e-3
    assert len(told) == ranks
    for found in told[: ranks if name == "cp2" else 1]:  # of the first stage
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["one", "dp2", "pp2", "vpp2", "cp2"])
def test_gradients_normalised_by_tokens_are_those_of_the_chosen_sequences(name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    check(ranks, overrides, RandomRows(RAGGED), per_token=True)


@pytest.mark.parametrize(
    "changes",
    [
        ("scorer=history",),
        ("scorer=every-k", "scorer.every=2"),
        ("selection.granularity=microbatch",),
        ("arm=uniform",),
        ("arm=shuffled",),
        ("scorer.micro_batch_size=8",),
    ],
    ids="-".join,
)
def test_gradients_are_exact_for_every_arm_and_scorer(changes: tuple[str, ...]) -> None:
    overrides = tuple(f"evolved_sampling.{change}" for change in changes)
    check(2, (*overrides, "training.micro_batch_size=2"), RandomRows(RAGGED))


def weigh(ranks: int) -> tuple[list[dict[int, float]], list[bool]]:
    """Weights of the rows of this rank by iteration and id, and whether gradients are those of a plain loop."""
    from es_megatron.frameworks import megatron_core

    settings, rows = settings_for("evolved_sampling.selection.inclusion_weights=true"), RandomRows(RAGGED)
    initialize(settings)
    before = random_state()
    given: list[list[float] | None] = []
    train = megatron_core.ScheduleCall.train

    def noting_train(self: Any, work: Any) -> Any:
        given.append(None if work.weights is None else work.weights.tolist())
        return train(self, work)

    megatron_core.ScheduleCall.train = noting_train
    evolving = Loop(settings, rows)
    steps = [evolving.evolve() for _ in range(4)]
    restore_random_state(before)
    plain = Loop(settings, None)
    equal, found = [], []
    for taken, weights in zip(steps, given, strict=True):
        equal.append(torch.equal(plain.train_on(taken.seen, weights).gradients, taken.gradients))
        found.append(dict(zip([rows.find(*row) for row in rows_of(taken)], weights or [], strict=weights is not None)))
    assert given[0] is None
    assert [len(row) for row in found[2:]] == [4 // ranks] * 2
    return found, equal


def test_inclusion_weights_multiply_the_losses_of_their_sequences() -> None:
    """And each is that of its sequence, whichever rank trains on it."""
    (alone, exact), *_ = run_on_ranks(1, weigh, 1)
    pair = run_on_ranks(2, weigh, 2)
    assert all(exact)
    assert all(all(equal) for _, equal in pair)
    for expected, mine, other in zip(alone[2:], pair[0][0][2:], pair[1][0][2:], strict=True):
        assert {**mine, **other} == pytest.approx(expected, rel=1e-4)
        assert len(set(expected.values())) == 4


def moe_counters(loop: Loop) -> list[torch.Tensor]:
    """Every buffer of the model, expert biases and token counts among them, and the tracker of auxiliary losses."""
    buffers = [buffer.clone() for chunk in loop.chunks for buffer in torch.nn.Module.buffers(chunk)]
    tracker = get_moe_layer_wise_logging_tracker()
    return buffers + [tracker[name]["values"].clone() for name in sorted(tracker)]


@on_ranks(1)
def test_experts_count_only_what_is_trained_on() -> None:
    settings = settings_for(DROPOUT)
    initialize(settings)
    build_experts()
    before = random_state()
    evolving = Loop(settings, RandomRows())
    steps, counted = [], []
    for _ in range(4):
        steps.append(evolving.evolve())
        counted.append(moe_counters(evolving))
    clear_aux_losses_tracker()
    restore_random_state(before)
    plain = Loop(settings, None)
    for taken, counters in zip(steps, counted, strict=True):
        assert torch.equal(plain.train_on(taken.seen).gradients, taken.gradients)
        expected = moe_counters(plain)
        assert len(expected) == len(counters) >= 10
        assert all(torch.equal(mine, other) for mine, other in zip(counters, expected, strict=True))
    names = [name for chunk in plain.chunks for name, _ in chunk.module.named_buffers()]
    for index in (names.index(name) for name in names if "expert_bias" in name):
        assert any(counters[index].abs().sum() > 0 for counters in counted)
    assert sum("expert_bias" in name for name in names) == 4


def test_weights_are_gathered_once_an_iteration() -> None:
    """The scoring pass has had its layers gather them; the interleaved schedule must not do it again."""

    def run() -> list[int]:
        settings = settings_for(*LAYOUTS["vpp2"][1])
        initialize(settings)
        loop = Loop(settings, RandomRows())
        calls: list[Any] = []
        loop.chunks[0].config.param_sync_func = [calls.append, calls.append]
        counts = []
        for _ in range(4):
            before = len(calls)
            loop.evolve()
            counts.append(len(calls) - before)
        return counts

    for counts in run_on_ranks(2, run):
        assert counts[0] > 0, "an iteration without scoring"
        assert counts[-1] == 0, "one with"


# --- invariant 6: scores and the optimizer step ---


def scores_of(loop: Loop) -> tuple[bytes, bytes]:
    assert loop.sampling is not None
    store = loop.sampling.engine.store
    return store.score.tobytes(), store.visits.tobytes()


@pytest.mark.parametrize("scorer", ["fresh", "history"])
def test_a_rerun_iteration_counts_once(scorer: str) -> None:
    """Upstream's re-run machinery calls the schedule twice for one iteration."""

    def run(runs: int) -> tuple[list[list[int]], tuple[bytes, bytes], list[float]]:
        settings = settings_for(f"evolved_sampling.scorer={scorer}")
        initialize(settings)
        loop = Loop(settings, RandomRows(RAGGED))
        steps = [loop.evolve(runs=runs) for _ in range(ITERATIONS)]
        return [taken.chosen for taken in steps], scores_of(loop), [float(taken.gradients.sum()) for taken in steps]

    assert run_on_ranks(2, run, 2) == run_on_ranks(2, run, 1)


def poison(loop: Loop) -> None:
    for chunk in loop.chunks:
        for buffer in chunk.buffers:
            buffer.grad_data.fill_(math.nan)


@pytest.mark.parametrize(("ranks", "overrides"), [(2, ()), (2, ("parallel.pipeline=2",))], ids=["dp2", "pp2"])
@pytest.mark.parametrize("scorer", ["fresh", "history"])
def test_a_skipped_iteration_leaves_no_score(ranks: int, overrides: tuple[str, ...], scorer: str) -> None:
    def run() -> bool:
        settings = settings_for(f"evolved_sampling.scorer={scorer}", *overrides)
        initialize(settings)
        loop = Loop(settings, RandomRows())
        for _ in range(4):
            loop.evolve()
        before = scores_of(loop)
        skipped = loop.evolve(spoil=poison)
        assert scores_of(loop) == before
        assert loop.sampling is not None
        assert loop.sampling.engine.iteration == 5
        following = loop.evolve()
        assert following.chosen != skipped.chosen
        assert math.isfinite(float(following.gradients.sum()))
        return scores_of(loop) != before or loop.sampling.engine.grid.dp_size > 1

    assert all(run_on_ranks(ranks, run))


@on_ranks(2)
def test_scores_are_those_of_the_recurrence() -> None:
    """The stored scores of a real run, recomputed in plain Python from the losses of its scoring passes."""
    from es_megatron.frameworks import megatron_core

    settings = settings_for()
    initialize(settings)
    loop = Loop(settings, RandomRows(RAGGED))
    assert loop.sampling is not None
    engine = loop.sampling.engine
    told: dict[int, float] = {}
    sequence_sums = megatron_core.sequence_sums
    draw = engine.draw
    batches: list[Any] = []
    engine.draw = lambda: batches.append(draw()) or batches[-1]  # pyright: ignore[reportAttributeAccessIssue]
    found: list[torch.Tensor] = []

    def noting(*args: Any) -> torch.Tensor:
        sums = sequence_sums(*args)
        found.append(sums[0] / sums[1])
        return sums

    megatron_core.sequence_sums = noting
    naive = dict.fromkeys(range(engine.manifest.total), 1 / engine.manifest.total)
    for _ in range(ITERATIONS):
        found.clear()
        loop.evolve()
        own = torch.cat(found).tolist()
        ids = batches[-1].id[engine.own].tolist()
        everything: list[Any] = [None, None]
        dist.all_gather_object(everything, dict(zip(ids, own, strict=True)))
        told = {**everything[0], **everything[1]}
        for sample_id, loss in told.items():
            naive[sample_id] = 0.8 * naive[sample_id] + 0.2 * loss
    store = engine.store
    seen = np.flatnonzero(store.visits) + store.low
    assert len(seen) > META_BATCH
    np.testing.assert_allclose(store.score[seen - store.low], [naive[n] for n in seen.tolist()], rtol=1e-5)
    assert parallel_state.get_data_parallel_world_size() == 2
