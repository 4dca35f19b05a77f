"""`make gpu-check` without a GPU: what it starts, in which order, and how it judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import gpu_check
from benchmarks.gpu_check import CASES, Case, Machine, Measured, check, command_of, judge, settings_of, write_blend
from es_megatron.config import build
from es_megatron.frameworks.megatron_data import load_blend
from es_megatron.trainer.settings import PretrainSettings, apply_override

NOTHING = Machine((), False, {"torch": "2.13.0"})
IDS = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]
FALLING = [3.0, 2.9, 2.8, 2.5, 2.2, 2.0]


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_without_a_gpu_it_tells_what_it_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "look", lambda: NOTHING)
    output = tmp_path / "gpu_check.json"
    monkeypatch.setattr("sys.argv", ["gpu_check", "--output", str(output), "--folder", str(tmp_path / "runs")])
    assert gpu_check.main() == 0
    report = json.loads(output.read_text())
    assert report["run"] is False
    assert report["versions"] == {"torch": "2.13.0"}
    assert set(report["would_run"]) == {case.name for case in CASES}
    assert "benchmarks.gpu_worker" in report["would_run"]["tp2"]
    assert "nothing was run" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_the_machine_is_looked_at_without_a_device() -> None:
    found = gpu_check.look()
    assert found.versions["torch"] is not None
    assert found.versions["numpy"] is not None
    assert isinstance(found.transformer_engine, bool)


def test_every_case_is_a_run_that_the_trainer_knows(tmp_path: Path) -> None:
    blend = write_blend(tmp_path)
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        settings = settings_of(blend)
        for override in case.settings:
            apply_override(settings, override)
        built = build(PretrainSettings, settings, case.name)
        assert case.ranks % built.parallel.ranks == 0
        assert case.against in {each.name for each in CASES}
        assert by_name(case.against).judged != "ids", "it runs first"
    rows = load_blend(blend, gpu_check.SEQ_LENGTH)
    assert [len(each) for each in rows.datasets] == list(gpu_check.ROWS.values())


def test_a_command_says_ranks_settings_and_model() -> None:
    command, more = command_of(by_name("fp8-delayed-free-scores"), Path("s.yaml"), Path("out"))
    assert command[command.index("--nproc-per-node") + 1] == "1"
    assert json.loads(command[command.index("benchmarks.gpu_worker") + 1]) == {"fp8": "hybrid", "fp8_recipe": "delayed"}
    assert "run.directory=out" in command
    assert more["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in more
    assert command_of(by_name("cpu"), Path("s.yaml"), Path("out"))[1]["CUDA_VISIBLE_DEVICES"] == ""


def test_a_machine_runs_what_it_can(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(case: Case, settings: Path, folder: Path) -> Measured:
        assert yaml.safe_load(settings.read_text())["data"]["blend"].endswith("blend.yaml")
        ran.append(case.name)
        seconds = {"step": 6.0, "exchange": 0.05, "order": 0.01}
        return Measured(IDS, FALLING, seconds, error="out of memory" if case.name == "tp2" else None)

    said: list[str] = []
    report = check(Machine(("H100", "H100"), False, {}), tmp_path / "runs", run, said.append)
    assert report["run"] is True
    assert report["ok"] is False
    skipped = {name for name, told in report["cases"].items() if told["told"].startswith("needs ")}
    assert skipped == {case.name for case in CASES} - set(ran)
    assert {"cp2", "dp4-overlaps", "fp8-delayed-free-scores"} <= skipped
    assert report["cases"]["dp4-overlaps"]["told"] == "needs 4 CUDA devices"
    assert report["cases"]["cp2"] == {"ok": None, "told": "needs Transformer Engine"}
    assert report["cases"]["tp2"]["told"] == "out of memory"
    assert report["cases"]["dp2"]["ok"] is True
    assert ran.index("cpu") < ran.index("dp2")
    assert ran.index("bf16") < ran.index("bf16-dp2")
    cost = report["cases"]["overhead-4096"]["overhead"]
    assert cost == pytest.approx({"milliseconds": 10.0, "share_of_step": 0.01, "step_milliseconds": 1000.0})
    assert len(said) == len(CASES)
    json.dumps(report)


DRIFTED = [*IDS[:5], [11, 99]]
EARLY = [[1, 99], *IDS[1:]]
SINGLE = ("training.precision=fp32",)


@pytest.mark.parametrize(
    ("case", "chosen", "loss", "ok", "told"),
    [
        (
            Case("a", settings=SINGLE),
            IDS,
            FALLING,
            True,
            "100.0% of the ids are those of `cpu`, all in the first 6 of 6",
        ),
        (Case("a", settings=SINGLE), IDS[:5], FALLING, False, "83.3% of the ids"),
        (Case("a", settings=SINGLE), DRIFTED, FALLING, False, "91.7% of the ids"),
        (Case("a", settings=SINGLE), EARLY * 4, FALLING, False, "all in the first 0 of"),
        (Case("a"), [*IDS[:1], *DRIFTED[1:]], FALLING, False, "91.7% of the ids"),
        (Case("a"), IDS, [3.0, float("nan")], False, "its losses are not all finite"),
        (Case("a"), IDS, [], False, "its losses are not all finite"),
        (Case("a", judged="learns"), [], FALLING, True, "losses fell from 3.000 to 2.000"),
        (Case("a", judged="learns"), [], FALLING[::-1], False, "losses did not fall from 2.000 to 3.000"),
        (Case("a", judged="ends"), [], FALLING[::-1], True, "6 iterations, all losses finite"),
    ],
)
def test_how_it_judges(case: Case, chosen: Any, loss: Any, ok: bool, told: str) -> None:
    verdict = judge(case, Measured(chosen, loss, {}), Measured(IDS, FALLING, {}))
    assert (verdict.ok, told in verdict.told) == (ok, True), verdict


def test_a_little_drift_late_is_forgiven() -> None:
    ids = [[2 * n, 2 * n + 1] for n in range(20)]
    late = [*ids[:19], [38, 99]]
    verdict = judge(Case("a", settings=SINGLE), Measured(late, FALLING, {}), Measured(ids, FALLING, {}))
    assert verdict == (True, "97.5% of the ids are those of `cpu`, all in the first 19 of 20 iterations")


def test_what_did_not_run_is_not_judged() -> None:
    broken = Measured([], [], {}, error="ended with 1")
    assert judge(Case("a"), broken, None) == (False, "ended with 1")
    assert judge(Case("a"), Measured(IDS, FALLING, {}), broken) == (None, "`cpu` did not run")
    assert Measured([], [], {}).overhead is None
