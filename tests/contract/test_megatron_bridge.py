"""Megatron-Bridge: its settings under Megatron-LM's names, and its own training loop where a Bridge is given.

`MEGATRON_BRIDGE=FOLDER python -m pytest tests/contract/test_megatron_bridge.py`; FOLDER is an unpacked wheel, or `src`
of a checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError
from es_megatron.frameworks import megatron_bridge, megatron_lm
from es_megatron.frameworks.megatron_bridge import BridgeArguments, check_settings, find_start, read_sources
from es_megatron.frameworks.megatron_lm_settings import StartingPoint, plan_length
from es_megatron.patching import read_patches
from tests.es_config import es_config
from tests.megatron_lm_helper import write_component

BRIDGE = os.environ.get("MEGATRON_BRIDGE", "")


def tree(**changes: Any) -> Any:
    """A `ConfigContainer`, as far as it is read."""
    sections: dict[str, dict[str, Any]] = {
        "train": {"train_iters": 100, "train_samples": None, "global_batch_size": 16, "rampup_batch_size": None},
        "dataset": {"dataloader_type": "single", "seq_length": 32, "blend": (["a", "b"], [1, 2]), "split": "90,5,5"},
        "scheduler": {
            "lr_decay_iters": 100,
            "lr_decay_samples": None,
            "lr_wsd_decay_iters": None,
            "lr_wsd_decay_samples": None,
            "override_opt_param_scheduler": False,
        },
        "checkpoint": {"load": None, "save": None, "finetune": False, "ckpt_step": None},
        "model": {"pipeline_model_parallel_size": 1, "fp8": None, "seq_length": 32},
        "optimizer": {"clip_grad": 1.0},
    }
    for name, value in changes.items():
        next(part for part in sections.values() if name in part)[name] = value
    more = {"peft": None, "mixed_precision": SimpleNamespace(fp8=None, fp8_recipe="delayed")}
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in sections.items()}, **more)


def test_settings_are_read_and_set_where_they_are() -> None:
    config = tree()
    args = BridgeArguments(config)
    assert (args.train_iters, args.pipeline_model_parallel_size, args.dataloader_type) == (100, 1, "single")
    length = plan_length(args, StartingPoint(0, None, 0))
    length.shorten(args, 75)
    assert (config.train.train_iters, config.scheduler.lr_decay_iters) == (75, 75)
    with length.original(args):
        assert config.train.train_iters == 100
    assert config.train.train_iters == 75
    assert not hasattr(args, "sft")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rampup_batch_size": [4, 4, 90]}, "`rampup_batch_size` must be off with Evolved Sampling"),
        ({"dataloader_type": "batch"}, "`dataset.dataloader_type` must be single or cyclic"),
        ({"fp8": "hybrid"}, "`fp8_recipe` must be `tensorwise`"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], told: str) -> None:
    check_settings(BridgeArguments(tree()), es_config(preset="paper"))
    with pytest.raises(ConfigError, match=told):
        check_settings(BridgeArguments(tree(**changes)), es_config(preset="paper"))


def test_the_blend_of_the_dataset() -> None:
    found = read_sources(BridgeArguments(tree()))
    assert found.files == [("a", 1), ("b", 2)]
    assert found.training_part(100) == 90
    with pytest.raises(ConfigError, match="names no files"):
        read_sources(BridgeArguments(tree(blend=None)))


def test_where_a_run_goes_on(tmp_path: Path) -> None:
    def at(**changes: Any) -> StartingPoint:
        return find_start(BridgeArguments(tree(load=str(tmp_path), **changes)))

    assert at() == StartingPoint(0, None, 0)
    torch.save({"step": torch.tensor(20, dtype=torch.int32)}, tmp_path / "latest_train_state.pt")
    assert at() == StartingPoint(20, None, 20)
    folder = tmp_path / "iter_0000020" / "es_state"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "state.json").write_text('{"started_at": 5}')
    assert at() == StartingPoint(20, str(folder), 5)
    assert at(ckpt_step=10) == StartingPoint(10, None, 10)
    assert at(finetune=True) == StartingPoint(0, None, 0)


@pytest.mark.parametrize(
    ("skipped", "norm", "called"),
    [
        (False, 0.5, {"skipped": False, "leaving": False}),
        (True, 0.5, {"skipped": True, "leaving": False}),
        (True, None, {"skipped": True, "leaving": True}),
    ],
)
def test_a_step_that_is_left_is_told_from_one_that_is_skipped(
    skipped: bool, norm: float | None, called: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, logged = list[dict[str, bool]](), list[int]()
    monkeypatch.setattr(megatron_lm, "active", lambda: SimpleNamespace(iteration=7))
    monkeypatch.setattr(megatron_lm, "finish_step", lambda **named: calls.append(named))
    monkeypatch.setattr(megatron_lm, "correct_auxiliary_losses", lambda: None)
    monkeypatch.setattr(megatron_lm, "log", logged.append)
    context = SimpleNamespace(state=SimpleNamespace(cfg=tree()), skipped_iter=skipped, grad_norm=norm)
    megatron_bridge.on_train_step_end(context)
    assert calls == [called]
    assert logged == ([] if called["leaving"] else [7])


def test_off_it_does_nothing() -> None:
    assert megatron_bridge.Current.switches is None
    megatron_bridge.start(tree())
    assert megatron_bridge.Current.arguments is None
    assert EvolvedSamplingConfig() is not None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not BRIDGE, reason="needs an unpacked wheel of Megatron-Bridge: MEGATRON_BRIDGE=FOLDER")
def test_bridges_own_loop_evolves(tmp_path: Path) -> None:
    write_component(tmp_path / "books", 110, seed=1)
    write_component(tmp_path / "code", 60, seed=2)
    output, checkout = tmp_path / "out", Path(__file__).parents[2]
    output.mkdir()
    command = [sys.executable, "-W", "ignore", str(checkout / "tests" / "bridge_run.py"), BRIDGE]
    command += [str(tmp_path / "books"), str(tmp_path / "code"), str(output), "40"]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    environment = {**os.environ, **alone, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    targets = [line for line in done.stdout.splitlines() if line.startswith("target: ")]
    assert len(targets) == len(read_patches("megatron-bridge").patches) - 1, (
        "`save` has one for older and newer versions"
    )
    assert all(line.endswith(" ready") for line in targets)
    audit = [json.loads(line) for line in (output / "audit.jsonl").read_text().splitlines()]
    sizes = [len(line["chosen"]) for line in audit]
    assert f"train_iters 40 -> {len(audit)}" in done.stdout
    assert [line["iteration"] for line in audit] == list(range(1, len(audit) + 1))
    assert (sizes[0], sizes[len(sizes) // 2], sizes[-1]) == (16, 4, 16)
    assert f"trained: {len(audit)} iterations, rate 0.0001" in done.stdout, "the rate ends with the planned run"
    assert f" es: iteration {len(audit):8d}/{len(audit):8d} | es kept: 16/16 |" in done.stdout
