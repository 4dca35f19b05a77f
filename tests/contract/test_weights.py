"""A model that begins with the weights of another run: on any layout, and with nothing else of it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from es_megatron.errors import ConfigError
from es_megatron.trainer.settings import SETTINGS, PretrainSettings, write_settings
from es_megatron.trainer.weights import find_weights
from tests.ranks_helper import RankFailure, run_on_ranks
from tests.small_run import History, settings_of, train, write_blend

STILL = ("training.lr=1e-12", "training.min_lr=0", "training.weight_decay=0")
"""Weights stay what they are."""
SECONDS = 120


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History]:
    """Folder of a finished run on two data-parallel ranks, and what it ended with."""
    folder = tmp_path_factory.mktemp("weights")
    blend = write_blend(folder / "data")
    return folder, run_on_ranks(2, train, settings_of(blend, folder / "base"), timeout=SECONDS)[0]


def beginning(folder: Path, name: str, *overrides: str) -> PretrainSettings:
    weights = folder / "base"
    return settings_of(folder / "data" / "blend.yaml", folder / name, f"model.weights={weights}", *overrides)


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-6), ("bf16", 3e-3)])
def test_it_begins_with_these_weights(base: tuple[Path, History], precision: str, near: float) -> None:
    folder, ended = base
    common = (*STILL, f"training.precision={precision}")
    one = run_on_ranks(1, train, beginning(folder, f"{precision}-one", *common), timeout=SECONDS)[0]
    assert one.weights == pytest.approx(ended.weights, rel=near)
    assert one.loss[0] < ended.loss[0] - 0.3, "of random weights"
    staged = beginning(folder, f"{precision}-staged", *common, "parallel.pipeline=2")
    assert run_on_ranks(2, train, staged, timeout=SECONDS)[0].loss[0] == pytest.approx(one.loss[0], rel=near)


def test_it_goes_on_from_its_own_checkpoint_without_them(base: tuple[Path, History]) -> None:
    folder, _ = base
    whole = run_on_ranks(1, train, beginning(folder, "whole"), timeout=SECONDS)[0]
    shutil.copytree(folder / "base", folder / "moved")
    own = settings_of(
        folder / "data" / "blend.yaml", folder / "half", f"model.weights={folder / 'moved'}", "run.save_interval=2"
    )
    assert run_on_ranks(1, train, own, timeout=SECONDS)[0].loss == whole.loss
    shutil.rmtree(folder / "moved")
    assert run_on_ranks(1, train, own, timeout=SECONDS)[0].summary["finished"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("model.num_layers=1",), r"`model.weights` must be of the same model, but .*`num_layers` 4 \(here 1\)"),
        (("model.weights=/nowhere",), "`/nowhere` must be the folder of a run"),
    ],
)
def test_other_models_are_refused(base: tuple[Path, History], overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(RankFailure, match=told):
        run_on_ranks(1, train, beginning(base[0], "refused", *overrides), timeout=SECONDS)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_deepspeed_refuses_them(base: tuple[Path, History]) -> None:
    with pytest.raises(RankFailure, match=r"`model\.weights` must be left out with this backend"):
        run_on_ranks(1, train, beginning(base[0], "deepspeed", "backend=deepspeed"), timeout=SECONDS)


def test_another_tokenizer_is_refused(base: tuple[Path, History], tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / f"{name}.model").write_bytes(name.encode())
        told = (base[0] / "data" / "blend.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(f"{told}tokenizer: {name}.model\n")
    run = shutil.copytree(base[0] / "base", tmp_path / "run")
    write_settings(settings_of(tmp_path / "one.yaml", run), run / SETTINGS)
    assert find_weights(settings_of(tmp_path / "one.yaml", tmp_path / "new", f"model.weights={run}")) is not None
    assert find_weights(beginning(base[0], "new", f"model.weights={run}")) is not None, "its tokenizer is not known"
    with pytest.raises(ConfigError, match="its ids mean other tokens"):
        find_weights(settings_of(tmp_path / "other.yaml", tmp_path / "new", f"model.weights={run}"))
