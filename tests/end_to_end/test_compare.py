"""`es-megatron compare` as users call it: killed, called again, and its runs equal to those of fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.unit.test_prepare import make_texts, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLI = [sys.executable, "-m", "es_megatron.cli"]


@pytest.fixture
def spec(tmp_path):
    lines = write_lines(tmp_path / "text.jsonl", make_texts(120))
    content = {
        "base": {
            "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 16},
            "training": {"passes": 1, "global_batch_size": 24, "micro_batch_size": 2, "eval_samples": 16},
            "evolved_sampling": {"preset": "paper", "keep_ratio": 0.25},
        },
        "blends": {"tiny": {"components": [f"text={lines}"], "vocab_size": 400, "damage": {"share": 0.4}}},
        "arms": {"es": {}, "uniform": {"evolved_sampling.arm": "uniform", "evolved_sampling.selection.budget": 0.6324}},
        "references": ["uniform"],
        "equal_cost": ["es", "uniform"],
        "seeds": [1, 2],
        "search_seeds": [9],
        "learning_rates": [1e-3, 1e-2],
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def finished(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.glob("spec/runs/**/summary.json")}


def test_killed_resumed_and_equal_to_fresh_processes(spec, tmp_path):
    directory = tmp_path / "out"
    command = [*CLI, "compare", str(spec), "--directory", str(directory)]

    first = subprocess.Popen(command)
    limit = time.monotonic() + 240
    while len(finished(directory)) < 2:
        assert first.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)
    workers = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    done = finished(directory)
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "a worker outlives its command"

    second = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"{len(done)} of 8 runs are there" in second.stdout
    after = finished(directory)
    assert len(after) == 8
    assert done.items() <= after.items()  # nothing that had finished was run again
    results = json.loads((directory / "spec" / "results.json").read_text())
    arms = results["cases"]["tiny"]
    assert results["finished"] == 8
    assert arms["es"]["against"]["uniform"]["seeds"] == 2
    assert arms["uniform"]["nominal_cost"] == pytest.approx(arms["es"]["nominal_cost"], rel=0.02)
    assert sum(arms["es"]["chosen"].values()) == pytest.approx(1)
    assert set(arms["es"]["chosen"]) > {"text", "damaged-words"}
    assert list(arms["es"]["domains"]) == ["text"]

    third = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "8 of 8 runs are there" in third.stdout
    assert finished(directory) == after

    # The last run of a worker that has trained several is what a process of its own makes of the same settings.
    last = max(after, key=after.__getitem__)
    alone = tmp_path / "alone"
    settings = [str(last.parent / "settings.yaml"), f"run.directory={alone}"]
    subprocess.run([*CLI, "pretrain", "--config", *settings], check=True, capture_output=True)
    one, other = json.loads(last.read_text()), json.loads((alone / "summary.json").read_text())
    assert one["validation"] == other["validation"]
    assert one["chosen"] == other["chosen"]


def test_a_run_that_fails_is_told_and_the_others_go_on(spec, tmp_path):
    content = yaml.safe_load(spec.read_text())
    content["arms"]["broken"] = {"training.weight_decay": 1e300}  # the first step makes every weight infinite
    content |= {"learning_rates": [1e-3], "seeds": [1], "search_seeds": []}
    spec.write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [*CLI, "compare", str(spec), "--directory", str(tmp_path / "out")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "tiny broken lr 0.001 seed 1: FAILED: " in done.stdout
    assert "failed: tiny broken" in done.stdout
    assert len(finished(tmp_path / "out")) == 2
