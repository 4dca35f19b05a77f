"""What a run is told by signals, what may change as it goes on, and what a finished one leaves."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from es_megatron.config import build
from es_megatron.errors import CheckpointError
from es_megatron.trainer import signals
from es_megatron.trainer.changes import OF_THE_BEGINNING, OF_THE_LENGTH, SECTIONS, TAKE_EFFECT, changes, comparable
from es_megatron.trainer.finished import SUMMARY, finished_summary, told
from es_megatron.trainer.settings import SETTINGS, PretrainSettings, write_settings
from tests.signals_helper import heed_all


def settings_of(directory="run", **training):
    content = {
        "data": {"blend": "blend.yaml"},
        "training": {"passes": 1, **training},
        "run": {"directory": str(directory)},
        "evolved_sampling": {"selection": {"policy": "reducible"}},
    }
    return build(PretrainSettings, content, "test")


@pytest.fixture
def heeding():
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    heed_all()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_asks_once_and_the_handlers_of_before_come_back(number):
    before, asked = signal.getsignal(number), []
    with signals.stopping(lambda: asked.append(number)):
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert asked == [number]
    assert signal.getsignal(number) == before


def test_what_the_launcher_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asked = []
    try:
        with signals.stopping(lambda: asked.append(1)):
            os.kill(os.getpid(), signal.SIGHUP)
        assert asked == []
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupted(pause: float, number: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import os, signal, time
from es_megatron.trainer import signals
signals.GRACE = 0.2
with signals.stopping(lambda: print("asked", flush=True)):
    os.kill(os.getpid(), signal.{number})
    time.sleep({pause})
    os.kill(os.getpid(), signal.{number})
    print("goes on", flush=True)
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        preexec_fn=heed_all,
    )


def test_a_second_interrupt_ends_at_once():
    done = interrupted(0.3, "SIGINT")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "asked\n")
    assert "Ctrl-C again ends at once" in done.stderr


@pytest.mark.parametrize(("pause", "number"), [(0.0, "SIGINT"), (0.3, "SIGTERM")])
def test_what_a_launcher_repeats_does_not(pause, number):
    done = interrupted(pause, number)
    assert (done.returncode, done.stdout) == (0, "asked\nasked\ngoes on\n")


def test_what_takes_effect_is_told_and_the_rest_is_refused():
    saved = comparable(settings_of(lr=0.003, seed=1))
    assert changes(saved, settings_of(lr=0.003, seed=1)) == []
    assert changes(saved, settings_of(lr=0.002, seed=1, weight_decay=0.0)) == [
        "training.lr: 0.003 -> 0.002",
        "training.weight_decay: 0.1 -> 0.0",
    ]
    with pytest.raises(CheckpointError, match=r"`training\.seed` was 1 and is 2\. Restore .* new run directory"):
        changes(saved, settings_of(lr=0.002, seed=2))
    del saved["training"]["seed"]  # of a version that did not have it
    assert changes(saved, settings_of(lr=0.003, seed=2)) == []
    assert changes({}, settings_of(lr=1.0)) == []


def test_every_setting_of_model_and_training_takes_effect_or_is_refused():
    usual = settings_of(train_samples=8, passes=None)
    known = {f"{name}.{each.name}" for name in SECTIONS for each in dataclasses.fields(getattr(usual, name))}
    assert known >= TAKE_EFFECT | OF_THE_LENGTH | OF_THE_BEGINNING
    saved = comparable(usual)
    for name in known - OF_THE_LENGTH:
        section, _, last = name.partition(".")
        other = {**saved, section: {**saved[section], last: "another"}}
        if name in OF_THE_BEGINNING:
            assert changes(other, usual) == []
        elif name in TAKE_EFFECT:
            assert changes(other, usual) == [f"{name}: another -> {saved[section][last]}"]
        else:
            with pytest.raises(CheckpointError, match=f"`{name}` was 'another'"):
                changes(other, usual)


def finish(directory: Path, settings: PretrainSettings, **summary: object) -> None:
    directory.mkdir(exist_ok=True)
    write_settings(settings, directory / SETTINGS)
    content = {"finished": True, "iterations": 7, "planned_iterations": 7, **summary}
    (directory / SUMMARY).write_text(json.dumps(content))


def test_a_finished_run_is_known_by_its_summary_and_settings(tmp_path):
    directory = tmp_path / "run"
    settings = settings_of(directory)
    assert finished_summary(settings, resumed=True) is None
    finish(directory, settings)
    found = finished_summary(settings, resumed=False)
    assert found is not None
    assert "7 of 7 iterations" in told(settings, found)
    other = settings_of(directory, lr=0.002)
    assert finished_summary(other, resumed=False) is None
    assert finished_summary(other, resumed=True) is not None, "the checkpoint says how far the run is"
    anew = dataclasses.replace(settings, run=dataclasses.replace(settings.run, resume=False))
    assert finished_summary(anew, resumed=False) is None
    written = yaml.safe_load((directory / SETTINGS).read_text())
    written["evolved_sampling"]["seed"] = 2
    (directory / SETTINGS).write_text(yaml.safe_dump(written))
    assert finished_summary(settings, resumed=False) is None


def test_a_run_that_was_stopped_is_not_finished(tmp_path):
    directory = tmp_path / "run"
    settings = settings_of(directory)
    finish(directory, settings, finished=False)
    assert finished_summary(settings, resumed=False) is None
    assert finished_summary(settings, resumed=True) is None
    (directory / SUMMARY).write_text("{")
    assert finished_summary(settings, resumed=True) is None
