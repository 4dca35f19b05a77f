"""What a user can get wrong gives an error that names the thing and the cure, on every rank, and no rank hangs."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from es_megatron import cli
from es_megatron.checkpoint import disk
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import CheckpointError, ConfigError, DataError, EsError, LayoutError, LossError
from es_megatron.trainer.model import initialize
from tests.ranks_helper import on_ranks, run_on_ranks
from tests.small_loop import MANIFEST, Loop, RandomRows
from tests.small_run import META_BATCH, SIZES, Trainer, settings_of, train, write_blend, write_component

SECONDS = 60


@pytest.fixture
def blend(tmp_path: Path) -> Path:
    return write_blend(tmp_path / "data")


def told_by_every_rank(ranks: int, settings: Any, kind: type[EsError] = EsError) -> str:
    """Build the trainer on every rank; every one must raise the same words in time."""

    def refuse() -> str:
        with pytest.raises(kind) as raised:
            Trainer(settings)
        return str(raised.value)

    told = run_on_ranks(ranks, refuse, timeout=SECONDS)
    assert len(set(told)) == 1
    return told[0]


# --- data files ---


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file(suffix: str, blend: Path, tmp_path: Path) -> None:
    (blend.parent / f"b.{suffix}").unlink()
    message = told_by_every_rank(2, settings_of(blend, tmp_path / "run"), DataError)
    assert f"b.{suffix}` does not exist" in message
    assert "es-megatron prepare" in message


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_truncated_file(suffix: str, blend: Path, tmp_path: Path) -> None:
    path = blend.parent / f"b.{suffix}"
    path.write_bytes(path.read_bytes()[:-6])
    message = told_by_every_rank(2, settings_of(blend, tmp_path / "run"), DataError)
    assert str(path) in message
    assert "bytes" in message
    assert "es-megatron prepare" in message


def test_a_file_that_only_one_rank_misses(blend: Path, tmp_path: Path) -> None:
    """A node whose disk lacks the data stops all, not itself alone."""

    def refuse() -> str:
        chosen = blend if dist.get_rank() == 0 else tmp_path / "elsewhere" / "blend.yaml"
        with pytest.raises(EsError) as raised:
            Trainer(settings_of(chosen, tmp_path / "run"))
        return str(raised.value)

    told = run_on_ranks(2, refuse, timeout=SECONDS)
    assert told[0] == told[1]
    assert "rank 1" in told[0]
    assert "elsewhere/blend.yaml` does not exist" in told[0]


def test_data_of_another_tokenizer(blend: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(blend.read_text())
    blend.write_text(yaml.safe_dump({**content, "vocab_size": 8}))

    def refuse() -> str:
        with pytest.raises(EsError, match="another tokenizer") as raised:
            train(settings_of(blend, tmp_path / "run"))
        return str(raised.value)

    assert "must be in [0, 8)" in run_on_ranks(1, refuse)[0]


# --- settings, through the command line as under torchrun ---


def command_line(arguments: list[str]) -> tuple[int, str]:
    """Exit code and what the command said on standard error."""
    import contextlib
    import io

    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        code = cli.main(arguments)
    return code, heard.getvalue()


SETTINGS = [
    ("training.learning_rate=1", "Unknown key `learning_rate`", "Known keys: passes"),
    ("evolved_sampling.keepratio=0.5", "Unknown key `keepratio`", "Did you mean `keep_ratio`?"),
    ("evolved_sampling.beta1=1.5", "`beta1` must be in [0, 1], but is 1.5 instead", ""),
    ("evolved_sampling.beta2=1", "`beta2` must be in [0, 1), but is 1.0 instead", ""),
    ("evolved_sampling.keep_ratio=0", "`keep_ratio` must be in (0, 1], but is 0.0 instead", ""),
    ("evolved_sampling.keep_ratio=0.2", "must be a multiple of 2", "Use `keep_ratio` 0.25"),
    ("evolved_sampling.pruning_ratio=1", "`pruning_ratio` must be in [0, 1), but is 1.0 instead", ""),
    ("evolved_sampling.arm=unifrom", "`arm` must be one of", "Did you mean `uniform`?"),
    ("evolved_sampling.scoring_micro_batch_size=3", "`scoring_micro_batch_size` must cut", "Use one of [1, 2, 4, 8]"),
    ("training.global_batch_size=15", "`global_batch_size` must be a multiple of", "Use 16"),
    ("training.passes=2", "Exactly one of `passes` and `train_samples`", "Give one"),
    ("parallel.tensor=4", "must be a multiple of tensor x pipeline = 4 x 1", "Start 4"),
    ("data.num_workers=8", "`mask_lag` must be >= 16", "Raise it, or use fewer workers"),
]


@pytest.mark.parametrize(("override", "said", "cure"), SETTINGS, ids=[setting[0] for setting in SETTINGS])
def test_settings(override: str, said: str, cure: str, blend: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(plain_settings(blend, tmp_path)))
    for code, heard in run_on_ranks(2, command_line, ["pretrain", "--config", str(path), override], timeout=SECONDS):
        assert code == 2
        assert heard.startswith("es-megatron pretrain: error: ")
        assert said in heard
        assert cure in heard
        assert "Traceback" not in heard


def plain_settings(blend: Path, folder: Path) -> dict[str, Any]:
    """The small run as a configuration file has it."""
    return {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
        "data": {"blend": str(blend)},
        "training": {"train_samples": 320, "global_batch_size": 16, "micro_batch_size": 1},
        "run": {"directory": str(folder / "run")},
    }


@pytest.mark.parametrize(
    ("overrides", "said", "cure"),
    [
        (("training.micro_batch_size=16", "evolved_sampling.keep_ratio=1"), "but are 1 instead", "micro_batch_size"),
        (("evolved_sampling.keep_ratio=0.0625",), "must be a multiple of 2", "Use `keep_ratio` 0.125"),
        (
            ("evolved_sampling.scoring_micro_batch_size=16",),
            "into a multiple of 2 micro-batches",
            "Use one of [1, 2, 4, 8]",
        ),
    ],
    ids=["training", "chosen", "scoring"],
)
def test_too_few_micro_batches_for_virtual_stages(
    overrides: tuple[str, ...], said: str, cure: str, blend: Path, tmp_path: Path
) -> None:
    virtual = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    message = told_by_every_rank(2, settings_of(blend, tmp_path / "run", *virtual, *overrides))
    assert said in message
    assert cure in message


def test_a_world_that_cannot_hold_the_layout(blend: Path, tmp_path: Path) -> None:
    message = told_by_every_rank(3, settings_of(blend, tmp_path / "run", "parallel.pipeline=2"), LayoutError)
    assert "1 x 2, but is 3 instead" in message


# --- checkpoints ---


@pytest.mark.parametrize("change", ["tokens", "size", "weight", "name", "seq_length"])
def test_the_checkpoint_of_another_manifest(change: str, blend: Path, tmp_path: Path) -> None:
    short = ("training.train_samples=32", "run.save_interval=1")
    run_on_ranks(2, train, settings_of(blend, tmp_path / "run", *short))
    overrides = short
    if change == "tokens":
        write_component(blend.parent / "b", SIZES["b"], 99)
    elif change == "size":
        write_component(blend.parent / "b", SIZES["b"] + 1, 1)
    elif change == "seq_length":
        overrides = (*short, "model.seq_length=8")
    else:
        content = yaml.safe_load(blend.read_text())
        for entry in content["components"]:
            entry.update({"weight": 1.0} if change == "weight" else {"name": entry["name"].replace("b", "x")})
        blend.write_text(yaml.safe_dump(content))
    message = told_by_every_rank(2, settings_of(blend, tmp_path / "run", *overrides), CheckpointError)
    said = {"tokens": "`fingerprint` was", "size": "`samples` was 30 and is 31", "weight": "`weight` was"}
    said |= {"name": "component `b` was removed", "seq_length": "`seq_length` was 16 and is 8"}
    assert said[change] in message
    assert "start a new run in another folder" in message


@pytest.fixture
def saved(blend: Path, tmp_path: Path) -> Path:
    """A run directory with a checkpoint after iteration 4."""

    def stop(trainer: Trainer, iteration: int) -> None:
        if iteration == 3:
            trainer._stop = True  # pyright: ignore[reportPrivateUsage]

    run_on_ranks(2, train, settings_of(blend, tmp_path / "run"), before_nothing, stop)
    return tmp_path / "run"


def before_nothing(trainer: Trainer, iteration: int) -> None:
    """No hook between backward and optimizer."""


def fail_to_save(settings: Any, spoil: Callable[[], None]) -> Callable[[], str]:
    def run() -> str:
        with pytest.raises(CheckpointError) as raised:
            train(settings, after=lambda _, iteration: spoil() if iteration == 5 else None)
        return str(raised.value)

    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_up_while_scores_are_saved(rank: int, saved: Path, blend: Path) -> None:
    """One rank of two runs out of space; both say so, the older checkpoint stays and resumes."""

    class FullDisk:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, *_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill() -> None:
        if dist.get_rank() == rank:
            disk.os = FullDisk()  # pyright: ignore[reportAttributeAccessIssue]

    told = run_on_ranks(2, fail_to_save(settings_of(blend, saved, "run.save_interval=2"), fill), timeout=SECONDS)
    check_full(told, saved, blend, "No space left on device; free space there")
    assert f"rank {rank}" in told[0]


@pytest.mark.parametrize(("rank", "size"), [(0, 1000), (1, 1000), (0, 100_000)], ids=["before", "other", "within"])
def test_a_file_that_cannot_grow_while_the_model_is_saved(rank: int, size: int, saved: Path, blend: Path) -> None:
    """A real failure on one rank, before Megatron writes or in the middle of it."""

    def limit() -> None:
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    told = run_on_ranks(2, fail_to_save(settings_of(blend, saved, "run.save_interval=2"), limit), timeout=SECONDS)
    check_full(told, saved, blend, "checkpoints/iter_0000006")


def check_full(told: list[str], saved: Path, blend: Path, said: str) -> None:
    """Both ranks said the same, nothing half-written counts, and the run goes on from the older checkpoint."""
    assert len(set(told)) == 1
    assert said in told[0]
    names = sorted(path.name for path in (saved / "checkpoints").iterdir() if path.suffix != ".partial")
    assert names == ["iter_0000004", "latest"]
    rest = run_on_ranks(2, train, settings_of(blend, saved))
    assert rest[0].summary["finished"]
    assert len(rest[0].chosen) == rest[0].summary["iterations"] - 4


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs the right to mount a small file system")
def test_a_file_system_without_space(blend: Path, tmp_path: Path) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True, timeout=20).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        run = fail_to_save(settings_of(blend, small / "run", "run.save_interval=6"), lambda: None)
        told = run_on_ranks(2, run, timeout=SECONDS)
        assert len(set(told)) == 1
        assert "bytes are free" in told[0] or "are free" in told[0]
        assert "Free some space" in told[0]
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=20)


# --- losses ---


def evolve_with(
    empty: tuple[int, ...], share: float, iterations: int, *overrides: str
) -> tuple[list[list[int]], list[int], bytes]:
    """Chosen ids, bad counts and visits of a loop whose rows in `empty` have no loss."""
    settings = settings_of(Path("unused"), Path("unused"), f"evolved_sampling.max_bad_losses={share}", *overrides)
    initialize(settings)
    loop = Loop(settings, RandomRows(empty=empty))
    assert loop.sampling is not None
    engine = loop.sampling.engine
    chosen, bad = [], []
    for _ in range(iterations):
        chosen.append(loop.evolve().chosen)
        assert engine.last is not None
        bad.append(engine.last.bad)
    return chosen, bad, engine.store.visits.tobytes()


@pytest.mark.parametrize("overrides", [(), ("parallel.pipeline=2",)], ids=["dp2", "pp2"])
def test_a_sample_without_a_loss_is_skipped_and_told(
    overrides: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    empty = (3, 40, 72)

    def run() -> tuple[Any, list[str]]:
        with caplog.at_level("WARNING"):
            found = evolve_with(empty, 0.25, 12, *overrides)
        return found, [record.getMessage() for record in caplog.records if "non-finite" in record.getMessage()]

    told = run_on_ranks(2, run)
    for (chosen, bad, _), messages in told:
        assert chosen == told[0][0][0]
        evolving = [ids for ids in chosen if len(ids) == 4]
        assert len(evolving) >= 9
        assert not set(empty) & set().union(*evolving)
        assert sum(bad) == len(messages) >= 2
        assert any("a[3]" in message for message in messages)
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
    assert "`max_bad_losses` = 0.25" in told[0]
    assert "a[" in told[0]
    assert "resume from the last checkpoint" in told[0]


def test_too_few_finite_losses_to_choose_from_stop_every_rank() -> None:
    almost_all = tuple(n for n in range(MANIFEST.total) if n % 8)

    def run() -> str:
        with pytest.raises(LossError) as raised:
            evolve_with(almost_all, 1.0, 6, "evolved_sampling.anneal=0")
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
    from es_megatron.frameworks.megatron_core import check_model, mask_of_partial

    config = loop.chunks[0].config
    for settings in (EvolvedSamplingConfig(), EvolvedSamplingConfig(preset="paper")):
        check_model(config, settings)
        config.context_parallel_size = 2
        with pytest.raises(ConfigError, match="`context_parallel_size` must be 1 with Evolved Sampling, but is 2"):
            check_model(config, settings)
        config.context_parallel_size = 1
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
        attached(model, EvolvedSamplingConfig())
        attached(model, EvolvedSamplingConfig(arm="uniform", scorer="fresh"))
        if refused is None:
            attached(model, EvolvedSamplingConfig(preset="paper"))
            continue
        with pytest.raises(ConfigError, match=rf"`{refused}` must be .* instead: .* `scorer: history`"):
            attached(model, EvolvedSamplingConfig(preset="paper"))


@pytest.fixture(autouse=True)
def _no_logging_from_before() -> Iterator[None]:
    """The command line sets logging up; other tests want it as it was."""
    import logging

    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers = before
