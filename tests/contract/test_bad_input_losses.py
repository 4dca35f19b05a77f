"""Losses that are not finite, and calls and models that the hook cannot serve, are told on every rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from es_megatron.algorithm.evolution import NO_LOSS
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError, LossError
from es_megatron.frameworks import megatron_core, scoring
from es_megatron.trainer.model import initialize
from tests.es_config import es_config
from tests.ranks_helper import on_ranks, run_on_ranks
from tests.small_loop import MANIFEST, Loop, RandomRows, swap
from tests.small_run import META_BATCH, settings_of

# --- losses ---


def spoil_losses() -> None:
    """Have a row without a loss report one that is not finite, until this process ends."""
    true = scoring.means_of

    def spoiled(*args: Any) -> scoring.Float32 | None:
        losses = true(*args)
        return None if losses is None else np.where(losses == NO_LOSS, np.float32(np.nan), losses)

    swap(megatron_core, "means_of", spoiled)


def evolve_with(
    empty: tuple[int, ...], share: float, iterations: int, *overrides: str, masked: bool = False
) -> tuple[list[list[int]], list[int], bytes]:
    """Chosen ids, counts and visits of a loop whose rows in `empty` have a bad loss, or none if `masked`."""
    if not masked:
        spoil_losses()
    settings = settings_of(
        Path("unused"), Path("unused"), f"evolved_sampling.selection.max_bad_losses={share}", *overrides
    )
    initialize(settings)
    loop = Loop(settings, RandomRows(empty=empty))
    assert loop.sampling is not None
    engine = loop.sampling.engine
    chosen, bad = [], []
    for _ in range(iterations):
        chosen.append(loop.evolve().chosen)
        assert engine.last is not None
        assert 0 in (engine.last.bad, engine.last.masked)
        bad.append(engine.last.masked if masked else engine.last.bad)
    return chosen, bad, engine.store.visits.tobytes()


@pytest.mark.parametrize("masked", [False, True], ids=["bad", "masked"])
@pytest.mark.parametrize("overrides", [(), ("parallel.pipeline=2",)], ids=["dp2", "pp2"])
def test_a_sample_without_a_finite_loss_is_skipped_and_told_if_it_should_have_one(
    overrides: tuple[str, ...], masked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    empty = (3, 40, 72)

    def run() -> tuple[Any, list[str]]:
        with caplog.at_level("WARNING"):
            found = evolve_with(empty, 0.0 if masked else 0.25, 12, *overrides, masked=masked)
        return found, [record.getMessage() for record in caplog.records if "non-finite" in record.getMessage()]

    told = run_on_ranks(2, run)
    for (chosen, bad, _), messages in told:
        assert chosen == told[0][0][0]
        evolving = [ids for ids in chosen if len(ids) == 4]
        assert len(evolving) >= 9
        assert not set(empty) & set().union(*evolving)
        assert sum(bad) >= 2
        assert len(messages) == (0 if masked else sum(bad))
        assert masked or any("a[3]" in message for message in messages)
        assert all("left out" in message for message in messages)
    visits = np.frombuffer(told[0][0][2], np.uint8)
    if overrides:
        assert len(visits) == MANIFEST.total
        assert not visits[list(empty)].any()
        assert visits.any()


def test_losses_without_end_stop_every_rank() -> None:
    everything = tuple(range(0, MANIFEST.total, 2))

    def run() -> str:
        with pytest.raises(LossError) as raised:
            evolve_with(everything, 0.25, 6)
        return str(raised.value)

    told = run_on_ranks(2, run)
    assert told[0] == told[1]
    assert "have a non-finite loss: " in told[0]
    assert "`selection.max_bad_losses` = 0.25" in told[0]
    assert "a[" in told[0]
    assert "resume from the last checkpoint" in told[0]


def test_too_few_finite_losses_to_choose_from_stop_every_rank() -> None:
    almost_all = tuple(n for n in range(MANIFEST.total) if n % 8)

    def run() -> str:
        with pytest.raises(LossError) as raised:
            evolve_with(almost_all, 1.0, 6, "evolved_sampling.selection.anneal=0")
        return str(raised.value)

    told = run_on_ranks(2, run)
    assert told[0] == told[1]
    assert "At least 4 sequences of the meta-batch must have a finite loss" in told[0]


@on_ranks(2)
def test_a_nan_in_the_weights_stops_the_run() -> None:
    """A model that has diverged gives only NaN; nothing of it reaches the scores."""
    settings = settings_of(Path("unused"), Path("unused"))
    initialize(settings)
    loop = Loop(settings, RandomRows())
    assert loop.sampling is not None
    for _ in range(3):
        loop.evolve()
    before = loop.sampling.engine.store.checksum()
    with torch.no_grad():
        next(iter(loop.chunks[0].parameters())).fill_(float("nan"))
    with pytest.raises(LossError, match=f"{META_BATCH} of {META_BATCH} sequences of iteration 3"):
        loop.evolve()
    assert loop.sampling.engine.store.checksum() == before


# --- the hook itself ---


@on_ranks(1)
def test_the_hook_refuses_what_it_cannot_do() -> None:
    settings = settings_of(Path("unused"), Path("unused"))
    initialize(settings)
    loop = Loop(settings, RandomRows())
    assert loop.sampling is not None
    wrapped = loop.sampling.wrap(lambda **_: pytest.fail("must not be called"))
    with pytest.raises(ConfigError, match="16 micro-batches of 1, but is called with 8 of 1"):
        wrapped(**loop.call(8), data_iterator=None)
    from es_megatron.frameworks.megatron_core import mask_of_partial
    from es_megatron.frameworks.megatron_core_checks import check_context, check_model

    config = loop.chunks[0].config
    config.context_parallel_size = 2
    for settings in (es_config(), es_config(preset="paper")):
        check_model(config, settings)
    with pytest.raises(ConfigError, match="`context_parallel_size` must be 1 with `scorer: prefix`, but is 2"):
        check_model(config, es_config(scorer="prefix"))
    config.context_parallel_size = 1
    check_context(16, 4)
    with pytest.raises(ConfigError, match="is 4 with `seq_length` 20 instead"):
        check_context(20, 4)
    with pytest.raises(ConfigError, match="loss_mask_of"):
        mask_of_partial(lambda output: output)


MODELS = [
    ({"fp8": "hybrid", "mtp_num_layers": 1}, "fp8_recipe"),
    ({"fp8": "hybrid", "fp8_recipe": "of-next-year"}, "fp8_recipe"),
    ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, None),
    ({"fp4": "e2m1"}, None),
    ({"cuda_graph_impl": "local"}, "cuda_graph_impl"),
    ({"cuda_graph_impl": "transformer_engine", "mtp_num_layers": 2}, None),
]


@on_ranks(1)
def test_attach_looks_at_arm_and_scorer() -> None:
    """FP8 and CUDA graphs cannot run here, but a run with them is let in, or kept out, before it builds anything."""
    from es_megatron.frameworks.megatron_core import attach

    settings = settings_of(Path("unused"), Path("unused"))
    initialize(settings)
    loop = Loop(settings, RandomRows())
    assert loop.sampling is not None

    def attached(model: dict[str, Any], config: EvolvedSamplingConfig) -> None:
        manifest = loop.sampling.engine.manifest  # pyright: ignore[reportOptionalMemberAccess]
        sizes = {"global_batch_size": META_BATCH, "micro_batch_size": 1, "train_samples": 8 * META_BATCH}
        attach(config, manifest, None, model_config=SimpleNamespace(**model), **sizes)

    for model, refused in MODELS:
        attached(model, es_config())
        attached(model, es_config(arm="uniform", scorer="fresh"))
        if refused is None:
            attached(model, es_config(preset="paper"))
            continue
        with pytest.raises(ConfigError, match=rf"`{refused}` must be .* instead: .* `scorer: history`"):
            attached(model, es_config(preset="paper"))
