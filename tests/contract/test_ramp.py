"""Batch-size ramp-up through real schedules: the same sequences on every layout, and sizes as upstream steps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.data.ramp import Ramp
from es_megatron.errors import ConfigError
from es_megatron.trainer.model import initialize
from tests.ranks_helper import run_on_ranks
from tests.small_loop import Loop, RandomRows
from tests.small_run import META_BATCH, settings_of

from megatron.core import num_microbatches_calculator as upstream  # isort: skip - after the CPU layer

ITERATIONS = 18
RAMP = Ramp.linear(8, 4, 40, META_BATCH)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "pp2": (2, ("parallel.pipeline=2",)),
    "vpp2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "cp2": (2, ("parallel.context=2",)),
}


def chosen(overrides: tuple[str, ...]) -> tuple[list[list[int]], list[float]]:
    """Ids trained and mean losses, by iteration."""
    settings = settings_of(Path("unused"), Path("unused"), *overrides)
    initialize(settings)
    loop = Loop(settings, RandomRows(), ramp=RAMP)
    assert loop.sampling is not None
    taken, losses = list[list[int]](), list[float]()
    for _ in range(ITERATIONS):
        taken.append(loop.evolve().chosen)
        losses.append(loop.sampling.engine.last.meta_loss)  # pyright: ignore[reportOptionalMemberAccess]
    return taken, losses


@pytest.fixture(scope="module")
def alone() -> tuple[list[list[int]], list[float]]:
    return run_on_ranks(1, chosen, (), timeout=120)[0]


def test_a_ramp_trains_on_everything_until_the_batch_is_full(alone: Any) -> None:
    sizes = [len(ids) for ids in alone[0]]
    assert sizes[: RAMP.iterations] == [8, 8, 8, 12, 12]
    assert 4 in sizes[RAMP.iterations :]
    assert set(sizes[RAMP.iterations :]) <= {4, META_BATCH}
    assert np.isfinite(alone[1]).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_choose_alike(name: str, alone: Any) -> None:
    ranks, overrides = LAYOUTS[name]
    for ids, losses in run_on_ranks(ranks, chosen, overrides, timeout=120):
        assert ids == alone[0]
        # attention that gathers the sequence adds up in another order, and Adam's first steps enlarge that
        np.testing.assert_allclose(losses, alone[1], rtol=0, atol=1e-4 if name == "cp2" else 2e-6)


def refused() -> None:
    settings = settings_of(Path("unused"), Path("unused"))
    initialize(settings)
    with pytest.raises(ConfigError, match=r"`rampup_batch_size` must be a multiple of 2 .*, but 9 is not"):
        Loop(settings, RandomRows(), ramp=Ramp.linear(9, 1, 40, META_BATCH))


def test_sizes_that_ranks_cannot_share_are_refused() -> None:
    run_on_ranks(2, refused, timeout=120)


@pytest.mark.skipif(
    not hasattr(upstream, "RampupBatchsizeNumMicroBatchesCalculator"), reason="megatron-core 0.19 steps in another way"
)
@pytest.mark.parametrize(
    ("start", "increment", "samples"), [(16, 16, 3000), (32, 8, 777), (8, 8, 100_003), (64, 64, 1)]
)
def test_the_sizes_are_those_of_upstreams_calculator(start: int, increment: int, samples: int) -> None:
    ramp, drawn = Ramp.linear(start, increment, samples, 128), 0
    theirs: Any = upstream.RampupBatchsizeNumMicroBatchesCalculator(128, 1, 1, False, 1, start, increment, samples)
    assert ramp.iterations > 0
    for iteration in range(ramp.iterations + 3):
        theirs.update(drawn, consistency_check=False)
        assert ramp.size(iteration) == theirs.get_current_global_batch_size()
        drawn += ramp.size(iteration)
    assert ramp.size(ramp.iterations) == 128
