"""Layout, resume and DP-change invariants with a kept mixture and with a reference, on both backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from es_megatron.frameworks.megatron_data import load_blend
from tests import deepspeed_helper
from tests.deepspeed_helper import Trace
from tests.reference_helper import write_reference
from tests.small_run import META_BATCH, T, write_blend

SECONDS = 240
LONG = f"training.train_samples={76 * META_BATCH}"
SHALLOW = "model.num_layers=2"
STOP = 31
DEEPSPEED = "backend=deepspeed"
VARIANTS: dict[str, tuple[str, ...]] = {
    "kept": ("selection.mixture=kept",),
    "kept-history": ("selection.mixture=kept", "scorer=history"),
    "residual": (
        "selection.mixture=kept",
        "scorer=history",
        "selection.policy=reducible",
        "selection.options={rule: residual}",
    ),
    "excess-fresh": ("selection.mixture=free", "selection.policy=reducible", "selection.options={rule: excess}"),
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "pp2": (2, ("parallel.pipeline=2",)),
    "dp4": (4, ()),
    "tp2": (2, ("parallel.tensor=2",)),
    "vpp2": (2, ("model.num_layers=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "pp2-dp2": (4, ("parallel.pipeline=2",)),
    "zero1-dp2": (2, (DEEPSPEED, "deepspeed.zero_stage=1")),
    "zero3-dp2": (2, (DEEPSPEED, "deepspeed.zero_stage=3")),
    "deepspeed-pp2": (2, (DEEPSPEED, "deepspeed.zero_stage=1", "parallel.pipeline=2")),
}
FAST = {("kept-history", "dp2"), ("residual", "pp2"), ("excess-fresh", "dp2")}
Run = Callable[..., list[Trace]]


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    path = write_blend(folder / "data")
    manifest = load_blend(path, T).manifest
    loss = 1.0 + 3 * np.random.default_rng(3).random(manifest.total)
    loss[::17] = np.nan
    write_reference(folder / "data" / "reference", manifest, loss)
    return path


def options_of(variant: str, blend: Path) -> list[str]:
    own = list(VARIANTS[variant])
    if any("reducible" in option for option in own):
        own.append(f"reference={blend.parent / 'reference'}")
    return [LONG, SHALLOW, *(f"evolved_sampling.{option}" for option in own)]


@pytest.fixture(scope="module")
def of_one_rank(blend: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trace]:
    @functools.cache
    def run(variant: str, *overrides: str) -> Trace:
        folder = tmp_path_factory.mktemp("one")
        return deepspeed_helper.run(1, blend, folder / "run", *options_of(variant, blend), *overrides)[0]

    return run


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        pytest.param(variant, layout, marks=() if (variant, layout) in FAST else pytest.mark.slow)
        for variant in VARIANTS
        for layout in LAYOUTS
    ],
)
def test_layouts_choose_what_one_rank_chooses(
    variant: str, layout: str, blend: Path, of_one_rank: Callable[..., Trace], tmp_path: Path
) -> None:
    ranks, overrides = LAYOUTS[layout]
    deeper = [each for each in overrides if each.startswith("model.")]
    expected = of_one_rank(variant, *deeper)
    assert sum(len(ids) == 4 for ids in expected.chosen) >= 50
    traces = deepspeed_helper.run(ranks, blend, tmp_path / "run", *options_of(variant, blend), *overrides)
    for trace in traces:
        assert trace.chosen == expected.chosen


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("first", "second", "overrides"),
    [(1, 2, ()), (2, 1, ()), (2, 2, (DEEPSPEED, "deepspeed.zero_stage=1")), (2, 2, ("parallel.pipeline=2",))],
    ids=["1-to-2", "2-to-1", "zero1", "pp2"],
)
def test_a_resumed_run_chooses_what_an_uninterrupted_one_does(
    variant: str,
    first: int,
    second: int,
    overrides: tuple[str, ...],
    blend: Path,
    of_one_rank: Callable[..., Trace],
    tmp_path: Path,
) -> None:
    options = [*options_of(variant, blend), *overrides]
    chosen = deepspeed_helper.run(first, blend, tmp_path / "run", *options, stop_at=STOP)[0].chosen
    chosen += deepspeed_helper.run(second, blend, tmp_path / "run", *options)[0].chosen
    assert chosen == of_one_rank(variant).chosen
