"""The doctor: each line is OK or names the cure, and the exit code tells."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from es_megatron.checkpoint.es_state import ScoreRange, save_es_state
from es_megatron.checks import communication, doctor, gloo, storage, targets, versions
from es_megatron.checks.findings import ok, split_error
from es_megatron.checks.targets import Target, Targets
from es_megatron.errors import DataError
from es_megatron.patching import read_patches
from es_megatron.rank_grid import RankGrid

ROWS, LENGTH = 8, 16


def write_blend(folder: Path, token: int = 1) -> Path:
    """A blend of one component of `ROWS` rows, as `prepare` and Megatron write it."""
    tokens = ROWS * LENGTH + 1
    (folder / "text.bin").write_bytes(np.full(tokens, token, np.int32).tobytes())
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 1, 2)
    (folder / "text.idx").write_bytes(head + struct.pack("<iqqq", tokens, 0, 0, 1))
    path = folder / "blend.yaml"
    path.write_text("vocab_size: 100\ncomponents:\n  - {name: text, train: text}\n")
    return path


def states(findings) -> dict[str, str]:
    return {finding.what: finding.severity for finding in findings}


def asked(**given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given})


def test_this_machine_passes_and_tells_what_was_not_checked(monkeypatch, capsys):
    for name in ("MASTER_ADDR", "NNODES", "SLURM_NNODES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.run_doctor(asked()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing to cure"
    assert "OK      gloo: a group of one adds up." in lines
    assert "NOTE    data: not checked. Cure: give `--blend FILE`." in lines
    assert any(line.startswith("OK      megatron-core: ") for line in lines)


def test_anything_to_cure_gives_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "try_alone", lambda: ok("gloo", ""))
    assert doctor.run_doctor(asked(blend=tmp_path / "none.yaml")) == 1
    assert "1 thing to cure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "told", "cure"),
    [
        ("`a.bin` does not exist: copy it again.", "`a.bin` does not exist", "copy it again"),
        (
            "`a.idx` is damaged: it ends early. Cure: copy it again.",
            "`a.idx` is damaged: it ends early",
            "copy it again",
        ),
        ("`a.yaml` must be YAML. Correct it.", "`a.yaml` must be YAML", "correct it"),
        ("a.yaml: `weight` must be > 0.", "a.yaml: `weight` must be > 0", "look at it"),
        ("Nothing is known.", "Nothing is known", "look at it"),
    ],
)
def test_the_cure_is_taken_out_of_an_error(message, told, cure):
    assert split_error(DataError(message), "look at it") == (told, cure)


def test_versions_are_held_against_the_metadata():
    installed = {requirement.name: "99.0" for requirement in versions.requirements()}
    installed |= {"torch": "2.5.1", "safetensors": None, "deepspeed": None}
    found = {finding.what: finding for finding in versions.check_versions(installed.get)}
    assert found["torch"].severity == "FAIL"
    assert found["torch"].cure == "`pip install 'torch>=2.6'`"
    assert found["safetensors"].severity == "FAIL"
    assert found["deepspeed"].severity == "NOTE"
    assert found["numpy"].line() == "OK      numpy: 99.0."
    assert "pytest" not in found


@pytest.mark.parametrize(
    ("name", "version", "python", "told"),
    [
        ("torch", "2.13.0+cpu", "3.11.7", None),
        ("torch", "2.9.1", "3.11.7", "the tests run with 2.13.0 on Python 3.11"),
        ("torch", "2.13.0", "3.13.0", None),
        ("torch", "2.14.0", "3.13.0", "the tests run with 2.13.0"),
        ("megatron-core", "0.16.1rc0", "3.11.7", "the tests run with 0.16.1 on Python 3.11"),
        ("python", "3.12.1", "3.12.1", None),
        ("python", "3.13.0", "3.13.0", "the tests run with 3.11 and 3.12"),
        ("megatron-core", "0.16.1", "3.11.7", None),
        ("megatron-core", "0.19.2", "3.12.1", None),
        ("megatron-core", "0.19.1", "3.12.1", "the tests run with 0.19.2 on Python 3.12"),
        ("megatron-core", "0.16.1", "3.12.1", "the tests run with 0.19.2 on Python 3.12"),
        ("tqdm", "1", "3.12.1", None),
    ],
)
def test_ok_is_said_of_what_the_tests_run_with_alone(name, version, python, told):
    finding = versions.judge_tested(name, version, python)
    assert finding.severity == ("OK" if told is None else "NOTE")
    assert finding.told == version if told is None else finding.told.endswith(told)


def test_the_environment_of_these_tests_is_listed():
    """What doctor calls tested is tested: `.ci/run` asks for that."""
    python = platform.python_version()
    listed = next((each for each in versions.TESTED if versions.is_version(python, each["python"])), None)
    if listed is None or not os.environ.get("ES_REQUIRE_TESTED"):
        pytest.skip("only where ES_REQUIRE_TESTED is set, and on a Python that is listed")
    here = {name: versions.installed_version(name) for name in listed if name != "python"}
    newer = [f"{name} {here[name]}" for name in here if Version(here[name] or "0") > Version(listed[name] + ".999")]
    if newer:
        pytest.skip(f"{', '.join(newer)} is newer than what es_megatron/checks/versions.py lists: add it there")
    assert all(versions.is_version(found or "0", listed[name]) for name, found in here.items()), here


CONFIG = "torchrun --nproc_per_node 4 pretrain_gpt.py --micro-batch-size 1 --global-batch-size 64 --mtp-num-layers 1"
GRAPHS = "--fp8-format hybrid --cuda-graph-impl local"


@pytest.mark.parametrize("scorer", ["history", "external", "fresh", "every-k"])
def test_settings_of_a_run_are_judged_by_its_scorer(tmp_path, scorer):
    script = tmp_path / "train.sh"
    script.write_text(f"{CONFIG} {GRAPHS} --es-scorer {scorer} --es-scores-initial scores\n")
    findings = list(doctor.check_config(script))
    failed = [finding.what for finding in findings if finding.severity == "FAIL"]
    assert all(finding.severity != "REFUSE" for finding in findings)
    if scorer in ("history", "external"):
        assert failed == []
        assert any(finding.what == "config train.sh: model" for finding in findings if finding.severity == "OK")
    else:
        assert failed == [f"config train.sh: `--{each}`" for each in ("fp8-recipe delayed", "cuda-graph-impl local")]
        assert all(finding.cure for finding in findings if finding.severity == "FAIL")


def test_flags_that_cannot_be_read_end_no_report(tmp_path):
    script = tmp_path / "train.sh"
    for scorer in ("$SCORER", "best", ""):
        script.write_text(f"{CONFIG} --es-scorer {scorer}\n")
        (finding,) = doctor.check_config(script)
        assert finding.severity == "FAIL"
        assert "--es-scorer" in finding.told


def test_settings_that_cannot_be_read_are_told(tmp_path):
    (finding,) = doctor.check_config(tmp_path / "none.sh")
    assert finding.severity == "FAIL"
    assert "none.sh" in finding.told


def test_data_opens_or_the_cure_is_named(tmp_path):
    blend, findings = storage.check_data(write_blend(tmp_path), LENGTH)
    assert blend is not None
    (finding,) = findings
    assert finding.severity == "OK"
    assert finding.told.startswith(f"{ROWS} samples of {LENGTH} tokens, fingerprint ")
    (tmp_path / "text.bin").write_bytes(b"123")
    blend, (finding,) = storage.check_data(tmp_path / "blend.yaml", LENGTH)
    assert blend is None
    assert finding.severity == "FAIL"
    assert finding.cure


def save_scores(folder: Path, manifest) -> None:
    scores = ScoreRange(ROWS, 0, np.zeros(ROWS, np.float32), np.zeros(ROWS, np.uint8))
    (folder / "iter_0000010").mkdir(parents=True)
    save_es_state(folder / "iter_0000010" / "es_state", scores, {}, {}, manifest.to_json(), RankGrid.alone())


def test_scores_of_other_data_and_damaged_ones_are_found(tmp_path):
    (tmp_path / "data").mkdir()
    blend, _ = storage.check_data(write_blend(tmp_path / "data"), LENGTH)
    assert blend is not None
    folder = tmp_path / "checkpoints"
    assert states(storage.check_checkpoint(folder, blend)) == {"checkpoint": "OK"}
    assert not folder.exists()
    save_scores(folder, blend.manifest)
    assert states(storage.check_checkpoint(folder, blend)) == {"checkpoint": "OK", "scores iter_0000010": "OK"}
    other, _ = storage.check_data(write_blend(tmp_path / "data", token=2), LENGTH)
    *_, finding = storage.check_checkpoint(folder, other)
    assert finding.severity == "FAIL"
    assert "`fingerprint` was" in finding.told
    manifest = folder / "iter_0000010" / "es_state" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    *_, finding = storage.check_checkpoint(folder, blend)
    assert finding.severity == "FAIL"


def test_folder_that_cannot_be_written_or_is_full(tmp_path, monkeypatch):
    (finding,) = storage.check_checkpoint(Path("/proc/no/such"), None)
    assert (finding.severity, finding.what) == ("FAIL", "checkpoint")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1 << 20))
    (finding,) = storage.check_checkpoint(tmp_path, None)
    assert finding.severity == "FAIL"
    assert "0.0 GB free" in finding.told


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [({}, 1), ({"NNODES": "4"}, 4), ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2), ({"SLURM_NNODES": "3"}, 3)],
)
def test_number_of_nodes(environment, nodes):
    assert communication.nodes_told(environment) == nodes


@pytest.mark.parametrize(
    ("address", "several", "state"),
    [
        (None, False, "OK"),
        (None, True, "FAIL"),
        ("localhost", False, "OK"),
        ("localhost", True, "FAIL"),
        ("10.1.2.3", True, "OK"),
        ("no.such.host.invalid", False, "FAIL"),
    ],
)
def test_master_address(address, several, state):
    finding = communication.judge_address(address, several)
    assert finding.severity == state
    assert bool(finding.cure) == (state == "FAIL")


@pytest.mark.parametrize(
    ("variable", "given", "several", "state"),
    [
        ("GLOO_SOCKET_IFNAME", None, False, "OK"),
        ("GLOO_SOCKET_IFNAME", None, True, "FAIL"),
        ("NCCL_SOCKET_IFNAME", None, True, "NOTE"),
        ("GLOO_SOCKET_IFNAME", "eth0", True, "OK"),
        ("GLOO_SOCKET_IFNAME", "eth", True, "FAIL"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", True, "FAIL"),
        ("NCCL_SOCKET_IFNAME", "eth", True, "OK"),
        ("NCCL_SOCKET_IFNAME", "=eth", True, "FAIL"),
        ("NCCL_SOCKET_IFNAME", "^docker", True, "OK"),
    ],
)
def test_interfaces(variable, given, several, state):
    assert communication.judge_interface(variable, given, ["lo", "eth0"], several).severity == state


def test_gloo_that_fails_or_hangs_is_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    finding = gloo.try_alone()
    assert finding.severity == "FAIL"
    assert "nosuch0" in finding.told
    assert "did not answer within 0.01 s" in gloo.try_alone(0.01).told  # importing torch takes longer


def test_patch_targets_are_judged_by_what_the_checkout_says(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    assert states(targets.check_targets({"megatron-lm": folder}))["patches megatron-lm"] == "FAIL"
    (folder / "megatron").mkdir(parents=True)
    assert states(targets.check_targets({}))["patches megatron-lm"] == "NOTE"
    patches = read_patches("megatron-lm")
    target = patches.patches[0].target
    ready, applied = Target(target, "ready", ""), Target(target, "applied", "")
    missing, refused = Target(target, "missing", "no such name"), Target(target, "refused", "known not to work")
    told = {
        "all 2 targets found": Targets("0.16.1", None, (ready, applied)),
        "all 1 targets are as declared, but it is new": Targets("0.99.0", "it is new", (ready,)),
        "missing: no such name": Targets("0.16.1", None, (ready, missing)),
        "refused: known not to work": Targets("0.11.0", "it is new", (refused, refused)),
        "cannot be imported": Targets(trouble="it cannot be imported: boom"),
    }
    expected_states = {"all 2": "OK", "all 1": "NOTE"}
    for expected, each in told.items():
        monkeypatch.setattr(targets, "look_for_targets", lambda *_, each=each: each)
        (finding,) = [f for f in targets.check_targets({"megatron-lm": folder}) if f.what == "patches megatron-lm"]
        assert finding.severity == expected_states.get(expected[:5], "FAIL")
        assert expected in finding.told


@pytest.mark.slow
def test_a_checkout_that_lacks_the_targets_is_found_out(tmp_path):
    package = tmp_path / "megatron"
    (package / "core").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "core" / "__init__.py").write_text("")
    (package / "core" / "package_info.py").write_text('__version__ = "0.16.1"\n')
    told = targets.look_for_targets("megatron-lm", tmp_path)
    assert told.version == "0.16.1"
    finding = targets.judge_targets("patches", read_patches("megatron-lm"), told)
    assert finding.severity == "FAIL"
    assert "missing" in finding.told
    (package / "core" / "package_info.py").write_text("raise RuntimeError('no GPU driver')\n")
    assert "no GPU driver" in targets.look_for_targets("megatron-lm", tmp_path).trouble


@pytest.mark.slow
def test_the_real_checkout_has_all_targets():
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip("set MEGATRON_LM=CHECKOUT to look for the patch targets in it")
    told = targets.look_for_targets("megatron-lm", Path(checkout))
    assert targets.judge_targets("patches", read_patches("megatron-lm"), told).severity == "OK"


def test_imports_that_take_too_long_are_told(tmp_path, monkeypatch):
    def slow(*_, **__):
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", slow)
    assert "took over" in targets.look_for_targets("megatron-lm", tmp_path).trouble
