"""Checkpoints of the reference GPT on real megatron-core: resume is exact, layouts may change, damage is refused."""

import multiprocessing
import os
import re
import shutil

import pytest
import torch
import torch.distributed as dist

from es_megatron.errors import CheckpointError
from es_megatron.trainer import model_state
from es_megatron.trainer.model_settings import ParallelSettings
from es_megatron.trainer.model_state import load_model, save_model
from tests.gpt_helper import LARGE_LAYOUTS, LAYOUTS, Layout, Run, settings_of
from tests.ranks_helper import run_on_ranks


def train_and_save(settings, directory, at, stop):
    run = Run(settings)
    run.train(0, at)
    save_model(directory, run.chunks, run.optimizer, run.scheduler, at)
    return run.train(at, stop)[at:]


def load_and_train(settings, directory, at, stop):
    run = Run(settings)
    torch.manual_seed(99)  # what a checkpoint must put back
    assert load_model(directory, run.chunks, run.optimizer, run.scheduler) == at
    return run.train(at, stop)


ONE = Layout("one", 1, ParallelSettings())
ONE_SHARDED = Layout("one", 1, ParallelSettings(distributed_optimizer=True))
BY_NAME = {layout.name: layout for layout in [ONE, *LAYOUTS, *LARGE_LAYOUTS]}
EXACT = [("one", "fp32"), ("dp2-overlapping", "fp32"), ("vpp2", "fp32")]
EXACT_SLOW = [
    *(("one", "bf16"), ("tp2", "fp32"), ("dp2-sharded", "bf16"), ("dp2-overlapping", "bf16"), ("vpp2", "bf16")),
    *(("tp2-pp2", "bf16"), ("pp2-dp2-overlapping", "fp32"), ("vpp2-dp2-overlapping", "fp32")),
]


@pytest.mark.parametrize(
    ("name", "precision"), EXACT + [pytest.param(*case, marks=pytest.mark.slow) for case in EXACT_SLOW]
)
def test_resume_is_exact_on_the_same_layout(name, precision, tmp_path):
    layout = BY_NAME[name]
    settings = settings_of(layout.parallel, precision=precision, dropout=0.2)
    directory = tmp_path / "model"
    uninterrupted = run_on_ranks(layout.ranks, train_and_save, settings, directory, 2, 4)
    assert run_on_ranks(layout.ranks, load_and_train, settings, directory, 2, 4) == uninterrupted


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(BY_NAME["dp2"], ONE, id="dp2-to-one"),
        pytest.param(ONE, BY_NAME["tp2"], id="one-to-tp2", marks=pytest.mark.slow),
        pytest.param(BY_NAME["dp2-overlapping"], ONE_SHARDED, id="overlapping-to-one"),
        pytest.param(BY_NAME["vpp2"], BY_NAME["dp2"], id="vpp2-to-dp2", marks=pytest.mark.slow),
        pytest.param(
            BY_NAME["dp2-overlapping"],
            BY_NAME["pp2-dp2-overlapping"],
            id="overlapping-to-pp2-dp2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resume_on_another_layout(old, new, tmp_path):
    uninterrupted = run_on_ranks(old.ranks, train_and_save, settings_of(old.parallel), tmp_path / "model", 2, 4)[0]
    moved = run_on_ranks(new.ranks, load_and_train, settings_of(new.parallel), tmp_path / "model", 2, 4)[0]
    assert moved == [pytest.approx(expected, rel=1e-5) for expected in uninterrupted]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    run_on_ranks(1, train_and_save, settings_of(), directory, 1, 1)
    return directory


def test_loading_into_a_run_that_has_gone_on_winds_it_back(checkpoint):
    def wind_back():
        run = Run(settings_of())
        first = run.train(0, 1)[0]
        ahead = run.train(1, 3)[1:]
        load_model(checkpoint, run.chunks, run.optimizer, run.scheduler)
        return first, ahead, run.train(1, 3)[3:]

    _, ahead, again = run_on_ranks(1, wind_back)[0]
    assert again == ahead


def message_of_loading(settings, directory):
    run = Run(settings)
    with pytest.raises(CheckpointError) as raised:
        load_model(directory, run.chunks, run.optimizer, run.scheduler)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": ParallelSettings(distributed_optimizer=True)}, "distributed_optimizer: false"),
        ({"hidden_size": 64}, "could not be loaded"),
        ({"num_layers": 8}, "could not be loaded"),
    ],
    ids=["sharding", "width", "depth"],
)
def test_the_checkpoint_of_another_run_is_refused_on_every_rank(changes, message, checkpoint):
    for told in run_on_ranks(2, message_of_loading, settings_of(**changes), checkpoint):
        assert message in told
        assert str(checkpoint) in told


def test_a_folder_without_a_checkpoint_is_refused_on_every_rank(checkpoint, tmp_path):
    assert "no complete" in run_on_ranks(1, message_of_loading, settings_of(), tmp_path / "none")[0]


def test_a_checkpoint_with_a_damaged_file_is_refused_on_every_rank(checkpoint, tmp_path):
    """Whichever files this version of Megatron-Core writes: `common.pt` is no more one of them since 0.19."""
    names = [path.name for path in checkpoint.iterdir()]
    assert {".metadata", "metadata.json", "__0_0.distcp"} <= set(names)
    for number, name in enumerate(names):
        damaged = tmp_path / str(number)
        shutil.copytree(checkpoint, damaged)
        (damaged / name).write_bytes((damaged / name).read_bytes()[:50])
        for told in run_on_ranks(2, message_of_loading, settings_of(), damaged):
            assert re.search("could not be loaded|no complete", told), name


def test_too_little_space_on_one_rank_is_seen_on_every_rank_before_anything_is_written(tmp_path, monkeypatch):
    def save():
        run = Run(settings_of())
        if dist.get_rank() == 1:
            monkeypatch.setattr(model_state.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
        with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, but 10 are free \(rank 1\)"):
            save_model(tmp_path / "model", run.chunks, run.optimizer, run.scheduler, 0)
        return list((tmp_path / "model").iterdir())

    assert run_on_ranks(2, save) == [[], []]


def test_the_space_asked_for_is_that_of_the_files(checkpoint, monkeypatch):
    asked = []

    def save():
        run = Run(settings_of())
        run.train(0, 1)
        monkeypatch.setattr(model_state, "_make_room", lambda _, size: asked.append(size) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_model(checkpoint, run.chunks, run.optimizer, run.scheduler, 0)
        return asked[0]

    stored = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert run_on_ranks(1, save)[0] == pytest.approx(stored, rel=0.25)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    def save():
        run = Run(settings_of())
        with pytest.raises(CheckpointError, match="cannot be made"):
            save_model(tmp_path / "file" / "model", run.chunks, run.optimizer, run.scheduler, 0)
        return True

    assert run_on_ranks(2, save) == [True, True]


def test_saving_starts_no_process(tmp_path, monkeypatch):
    """What a writer process would outlive: a rank that is killed."""

    def save():
        run = Run(settings_of())
        run.train(0, 1)
        monkeypatch.setattr(os, "fork", lambda: pytest.fail("the writer forks"))
        save_model(tmp_path / "model", run.chunks, run.optimizer, run.scheduler, 1)
        return multiprocessing.active_children()

    assert run_on_ranks(1, save) == [[]]
    assert list((tmp_path / "model").glob("*.distcp"))
