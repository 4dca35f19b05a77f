"""Weights & Biases, with a module that stands in for its client."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from es_megatron.errors import ConfigError
from es_megatron.trainer import boards
from es_megatron.trainer.boards import WANDB_ID, WandbBoard, check_clients
from tests.ranks_helper import run_on_ranks
from tests.small_run import settings_of, train, write_blend


class Client(ModuleType):
    """As much of `wandb` as is used, and what it was told."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails, self.begun, self.rows, self.metrics, self.finished = fails, {}, [], [], 0
        self.__spec__ = boards.__spec__  # `find_spec` asks for one

    def init(self, **options: Any) -> Client:
        if self.fails == "init":
            raise RuntimeError("no network")
        self.begun = options
        return self

    def define_metric(self, name: str, step_metric: str = "") -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        if self.fails == "log":
            raise RuntimeError("disk full")
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


def install(monkeypatch: pytest.MonkeyPatch, fails: str = "") -> Client:
    client = Client(fails)
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


def settings_in(folder: Path, *changes: str) -> Any:
    return settings_of(write_blend(folder / "data"), folder / "run", "run.wandb=true", *changes)


def test_a_run_resumes_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = install(monkeypatch)
    settings = settings_in(tmp_path)
    settings.run.directory.mkdir()
    check_clients(settings.run)
    board = WandbBoard(settings)
    board.write({"lm loss": 4.0}, 7)
    board.close()
    first = client.begun
    assert client.rows == [{"iteration": 7, "lm loss": 4.0}]
    assert ("*", "iteration") in client.metrics
    assert client.finished == 1
    assert first["config"]["training"]["lr"] == settings.training.lr
    assert first["dir"] == str(settings.run.directory)
    WandbBoard(settings)
    assert client.begun["id"] == first["id"] == (settings.run.directory / WANDB_ID).read_text().strip()
    assert client.begun["resume"] == "allow"


def test_what_cannot_be_sent_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    client = install(monkeypatch, "log")
    settings = settings_in(tmp_path)
    settings.run.directory.mkdir()
    board = WandbBoard(settings)
    for iteration in range(3):
        board.write({"lm loss": 4.0}, iteration)
    board.close()
    assert caplog.text.count("disk full") == 1
    assert client.rows == []


def test_a_missing_client_ends_the_run_before_its_first_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boards, "find_spec", lambda _: None)
    with pytest.raises(Exception, match=r"`run.wandb` must be off .*pip install wandb"):
        run_on_ranks(1, train, settings_in(tmp_path))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_client_that_cannot_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "init")
    settings = settings_in(tmp_path)
    settings.run.directory.mkdir()
    with pytest.raises(ConfigError, match=r"cannot begin: RuntimeError: no network. Log in"):
        WandbBoard(settings)


def run_and_tell(settings: Any) -> list[dict[str, float]]:
    train(settings)
    return sys.modules["wandb"].rows


def test_the_trainer_sends_what_tensorboard_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    changes = ("training.train_samples=96", "training.log_interval=2", "run.tensorboard=true")
    rows = run_on_ranks(1, run_and_tell, settings_in(tmp_path, *changes))[0]
    assert [row["iteration"] for row in rows] == sorted(row["iteration"] for row in rows)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    board = accumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("lm loss", "grad-norm", "es/trained_share/a"):
        sent = [(row["iteration"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in board.Scalars(name)] == sent
        assert len(sent) > 1
