"""`es-megatron reference`: what it trains, and losses that are the model's, on any ranks and after a stop."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from es_megatron import cli
from es_megatron.checkpoint import disk
from es_megatron.checkpoint import loss_blocks as blocks
from es_megatron.checkpoint.es_state import load_es_state
from es_megatron.errors import CheckpointError, ConfigError, EsError
from es_megatron.frameworks.megatron_data import load_blend
from es_megatron.rank_grid import RankGrid
from es_megatron.reference.command import add_arguments, run_reference
from es_megatron.reference.scoring import score_blend
from es_megatron.trainer.backends import stop
from es_megatron.trainer.loop import pretrain
from tests.ranks_helper import run_on_ranks
from tests.small_run import T, settings_of, write_blend, write_component

SECONDS = 120


def trained(blend: Path, folder: Path) -> None:
    options = ("model.num_layers=2", "training.train_samples=64", "evolved_sampling.arm=plain")
    pretrain(settings_of(blend, folder, *options))


def scored(model: Path, blend: Path, output: Path, **options: Any) -> tuple[int, int, dict[str, float]]:
    try:
        done = score_blend(model, blend, output, say=lambda _: None, **options)
    finally:
        stop()
    return done.rows, done.known, done.means


def refusal(model: Path, blend: Path, output: Path, options: dict[str, Any]) -> str:
    try:
        return str(scored(model, blend, output, **options))
    except EsError as error:
        return f"{type(error).__name__}: {error}"


def losses_of(folder: Path, blend: Path) -> Any:
    manifest = load_blend(blend, T).manifest
    state = load_es_state(folder, manifest.total, RankGrid.alone(), manifest.to_json())
    assert (state.visits == 1).all()
    assert state.state["reference"]["tokens"] == T
    return state.score


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A blend, and the run of a model on it."""
    folder = tmp_path_factory.mktemp("reference")
    blend = write_blend(folder / "data")
    run_on_ranks(1, trained, blend, folder / "model", timeout=SECONDS)
    return blend, folder / "model"


def naive(blend: Path, model: Path, tokens: int = T) -> list[float]:
    """Losses of every row by the model itself, one at a time, with no schedule around it."""
    from es_megatron.frameworks.feed import collate
    from es_megatron.trainer.backends import start
    from es_megatron.trainer.model import build_model, forward_step
    from es_megatron.trainer.model_state import load_weights
    from es_megatron.trainer.settings import load_settings

    settings = load_settings(model / "settings.yaml")
    start(settings)
    data = load_blend(blend, T)
    chunks = build_model(settings, data.vocab_size)
    load_weights(model / "checkpoints" / (model / "checkpoints" / "latest").read_text().strip() / "model", chunks)
    chunks[0].eval()
    found = []
    with torch.no_grad():
        for row in range(data.manifest.total):
            batch = {name: each[:, :tokens] for name, each in collate([data.rows[row]]).items()}
            output, _ = forward_step(iter([batch]), chunks[0])
            mask = batch["loss_mask"].reshape(-1)
            found.append(float((output.reshape(-1).float() * mask).sum() / mask.sum()))
    stop()
    return found


@pytest.mark.timeout(SECONDS)
def test_losses_are_the_model_s_own_on_any_ranks(model: tuple[Path, Path], tmp_path: Path) -> None:
    blend, run = model
    expected = run_on_ranks(1, naive, blend, run, timeout=SECONDS)[0]
    for name, ranks, options in (
        ("one", 1, {"micro_batch_size": 8}),
        ("dp2", 2, {}),
        ("pp2", 2, {"overrides": ("parallel.pipeline=2",)}),
        ("tp2", 2, {"overrides": ("parallel.tensor=2",)}),
    ):
        done = run_on_ranks(ranks, Scored(run, blend, tmp_path / name, options), timeout=SECONDS)
        assert {rows for rows, _, _ in done} == {len(expected)}
        np.testing.assert_allclose(losses_of(tmp_path / name, blend), expected, atol=1e-5)
        offsets = load_blend(blend, T).manifest.offsets.tolist()
        means = [np.mean(expected[low:high]) for low, high in itertools.pairwise(offsets)]
        assert [list(each.values()) for _, _, each in done] == [pytest.approx(means, abs=1e-5)] * ranks
        assert not list(tmp_path.glob(".*scoring"))


class Scored:
    """`scored` of these arguments, for ranks."""

    def __init__(self, model: Path, blend: Path, output: Path, options: dict[str, Any]) -> None:
        self.arguments, self.options = (model, blend, output), options

    def __call__(self) -> tuple[int, int, dict[str, float]]:
        return scored(*self.arguments, **self.options)


@pytest.mark.timeout(SECONDS)
def test_prefixes_are_scored_alone(model: tuple[Path, Path], tmp_path: Path) -> None:
    blend, run = model
    run_on_ranks(1, Scored(run, blend, tmp_path / "prefix", {"tokens": 8}), timeout=SECONDS)
    manifest = load_blend(blend, T).manifest
    state = load_es_state(tmp_path / "prefix", manifest.total, RankGrid.alone())
    assert state.state["reference"]["tokens"] == 8
    np.testing.assert_allclose(state.score, run_on_ranks(1, naive, blend, run, 8, timeout=SECONDS)[0], atol=1e-5)


def scored_in_blocks(model: Path, blend: Path, output: Path, stop_after: int) -> list[int]:
    """Score in small blocks; the blocks that were written, as many as that at most."""
    blocks.SMALLEST_BLOCK = 16
    written: list[int] = []
    write = blocks.LossBlocks.write

    def counting(self: blocks.LossBlocks, block: int, loss: Any) -> None:
        write(self, block, loss)
        written.append(block)
        if len(written) == stop_after:
            raise KeyboardInterrupt

    blocks.LossBlocks.write = counting
    with contextlib.suppress(KeyboardInterrupt):
        scored(model, blend, output)
    return written


@pytest.mark.timeout(SECONDS)
def test_a_stopped_command_goes_on_where_it_was(model: tuple[Path, Path], tmp_path: Path) -> None:
    blend, run = model
    output = tmp_path / "losses"
    first = run_on_ranks(1, scored_in_blocks, run, blend, output, 2, timeout=SECONDS)[0]
    assert not output.exists()
    damaged = output.with_name(f".{output.name}.scoring") / f"block-{first[0]:06d}"
    damaged.write_bytes(damaged.read_bytes()[:-5] + b"12345")
    more = run_on_ranks(1, scored_in_blocks, run, blend, output, 0, timeout=SECONDS)[0]
    total = load_blend(blend, T).manifest.total
    assert sorted(more) == [block for block in range(-(-total // 16)) if block != first[1]]
    run_on_ranks(1, Scored(run, blend, tmp_path / "whole", {}), timeout=SECONDS)
    assert losses_of(output, blend).tolist() == losses_of(tmp_path / "whole", blend).tolist()


@pytest.mark.timeout(SECONDS)
def test_a_new_component_is_scored_alone(model: tuple[Path, Path], tmp_path: Path) -> None:
    blend, run = model
    run_on_ranks(1, Scored(run, blend, tmp_path / "losses", {}), timeout=SECONDS)
    before = losses_of(tmp_path / "losses", blend)
    content = yaml.safe_load(blend.read_text())
    write_component(blend.parent / "new", 23, 99)
    content["components"].insert(1, {"name": "new", "train": "new"})
    wider = blend.with_name("wider.yaml")
    wider.write_text(yaml.safe_dump(content))
    rows, known, means = run_on_ranks(1, Scored(run, wider, tmp_path / "losses", {}), timeout=SECONDS)[0]
    assert (rows, known) == (23, len(before))
    assert list(means)[1] == "new"
    found = losses_of(tmp_path / "losses", wider)
    offsets = load_blend(wider, T).manifest.offsets
    assert np.delete(found, np.arange(offsets[1], offsets[2])).tolist() == before.tolist()


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokens": T + 1}, rf"ConfigError: `--tokens` must be in \[1, {T}\]"),
        ({"tokens": 0}, "ConfigError: `--tokens`"),
        ({"overrides": ("model.hidden_size=16",)}, "CheckpointError: The weights of .* could not be loaded"),
        ({"overrides": ("backend=deepspeed",)}, "must be a run with `backend: megatron`"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused(
    model: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    blend, run = model
    found = run_on_ranks(1, refusal, run, blend, tmp_path / "out", options, timeout=SECONDS)[0]
    assert re.search(told, found), found
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(SECONDS)
def test_losses_of_another_model_are_not_mixed(model: tuple[Path, Path], tmp_path: Path) -> None:
    blend, run = model
    run_on_ranks(1, Scored(run, blend, tmp_path / "losses", {}), timeout=SECONDS)
    found = run_on_ranks(1, refusal, run, blend, tmp_path / "losses", {"tokens": 8}, timeout=SECONDS)[0]
    assert "CheckpointError" in found
    assert "holds losses of another model, or about other tokens" in found
    with pytest.raises(CheckpointError, match="must be the folder of a run"):
        scored(tmp_path / "nothing", blend, tmp_path / "other")


def test_blocks_of_another_command_are_not_taken_over(tmp_path: Path) -> None:
    found = blocks.LossBlocks(tmp_path / "losses", 1000)
    found.begin({"about": 1})
    found.begin({"about": 1})
    with pytest.raises(CheckpointError, match=r"of another model, blend or number of tokens. Finish"):
        found.begin({"about": 2})
    assert found.missing() == [0, 1, 2, 3]
    found.write(1, np.ones(256, np.float32))
    assert found.missing() == [0, 2, 3]
    with pytest.raises(CheckpointError, match=r"missing or damaged. Run the command again"):
        found.gather(200, 600)
    assert found.gather(300, 400).tolist() == [1.0] * 100
    found.remove()
    assert not disk.list_files(tmp_path)


def command(*arguments: str) -> int:
    try:
        return cli.main(["reference", *arguments])
    finally:
        stop()


@pytest.mark.timeout(SECONDS)
def test_the_command_line_trains_and_scores(
    model: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    blend, _ = model
    size = ("model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.vocab_multiple=8")
    train = ("train", "--blend", str(blend), "--seq-length", str(T), "--output", str(tmp_path / "small"), *size)
    assert run_on_ranks(1, command, *train, "training.passes=1", "run.progress=false", timeout=SECONDS) == [0]
    told = capfd.readouterr().out
    assert "M parameters" in told
    assert told.index("M parameters") < told.index("] iteration ")
    score = ("score", "--model", str(tmp_path / "small"), "--blend", str(blend), "--output", str(tmp_path / "losses"))
    assert run_on_ranks(1, command, *score, timeout=SECONDS) == [0]
    told = capfd.readouterr().out
    assert "rows scored" in told
    assert "selection.policy=reducible" in told
    assert np.isfinite(losses_of(tmp_path / "losses", blend)).all()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    both = parser.parse_args([*train, "--text", "a=b", "--train-blend", "c"])
    with pytest.raises(ConfigError, match="One of `--text` and `--train-blend` must be left out"):
        run_reference(both)
