"""What launchers start, run with stand-ins for Python, srun and scontrol that write down what reaches them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from es_megatron.launch.command import add_arguments, run_launch
from tests.signals_helper import heed_all

# The tests put a stand-in in its place; `sys.orig_argv` may be relative.
PYTHON = sys.executable

NASTY = "a b'c\"d;touch pwned $(touch pwned) `touch pwned` ${IFS} \\ %n #x\n-oProxyCommand=touch"
RUN = ["pretrain", "--config", "run one.yaml", f"run.directory={NASTY}"]

RECORDER = """\
#!{python}
import json, os, sys
with open({path!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
sys.exit(int(os.environ.get("STAND_IN_CODE", "0")))
"""

SRUN = """\
#!{python}
import os, subprocess, sys
given = sys.argv[1:]
options = dict(each.partition("=")[::2] for each in given[: given.index("bash")])
nodes = int(options.get("--nodes", 2))
per_node = int(options.get("--ntasks-per-node", os.environ["STAND_IN_TASKS"]))
for rank in range(nodes * per_node):
    task = dict(SLURM_PROCID=str(rank), SLURM_NTASKS=str(nodes * per_node), SLURM_LOCALID=str(rank % per_node))
    if subprocess.call(given[given.index("bash"):], env=dict(os.environ, **task)):
        sys.exit(1)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A Python that writes down its arguments and environment; gives what it wrote."""
    monkeypatch.chdir(tmp_path)
    path, seen = tmp_path / "my python", tmp_path / "seen.jsonl"
    path.write_text(RECORDER.format(python=PYTHON, path=str(seen)))
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))

    def records() -> list[tuple[list[str], dict[str, str]]]:
        found = [tuple(json.loads(line)) for line in seen.read_text().splitlines()] if seen.exists() else []
        seen.unlink(missing_ok=True)
        return found

    yield records
    assert not list(tmp_path.rglob("pwned"))


def launch(tmp_path: Path, *more: str, **changes: object) -> int:
    (tmp_path / "hostfile").write_text("alice@10.0.0.1 slots=2\nalice@10.0.0.2 slots=2\n")
    settings = {"hostfile": "hostfile", "interface": "eth0", "environment": {"NASTY": NASTY, "EMPTY": ""}, **changes}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(settings))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--config", str(tmp_path / "launch.yaml"), *more, "--", *RUN]
    return run_launch(parser.parse_args(arguments))


@pytest.mark.parametrize("launcher", ["no-ssh", "torchrun"])
def test_what_is_run_are_the_lines_of_the_dry_run(launcher, tmp_path, stand_in, capsys):
    options = ("--launcher", launcher, "--node-rank", "1")
    assert launch(tmp_path, *options) == 0
    ran = stand_in()
    for (given, environment), command in zip(ran, ("preflight", "pretrain"), strict=True):
        assert given[-len(RUN) :] == [command, *RUN[1:]]
        assert (environment["NASTY"], environment["EMPTY"], environment["GLOO_SOCKET_IFNAME"]) == (NASTY, "", "eth0")
    capsys.readouterr()
    assert launch(tmp_path, *options, "--dry-run") == 0
    subprocess.run(["bash", "-c", capsys.readouterr().out], check=True, timeout=60)
    typed = stand_in()
    assert [given for given, _ in typed] == [given for given, _ in ran]
    assert [environment["NASTY"] for _, environment in typed] == [NASTY, NASTY]


@pytest.mark.parametrize("launcher", ["no-ssh", "torchrun"])
def test_a_failed_check_ends_it(launcher, tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_CODE", "3")
    assert launch(tmp_path, "--launcher", launcher, "--node-rank", "0") == 3
    assert ["preflight" in given for given, _ in stand_in()] == [True]
    assert "pre-flight failed with exit code 3" in capsys.readouterr().err


def test_users_and_brackets_stay_out_of_the_masters_address(tmp_path, stand_in):
    launch(tmp_path, "--launcher", "no-ssh", "--node-rank", "0", "--no-preflight")
    ((given, _),) = stand_in()
    assert given[given.index("--master_addr") + 1] == "10.0.0.1"
    launch(tmp_path, "--launcher", "torchrun", "--node-rank", "0", "--no-preflight", master_addr="fd00::1")
    ((given, _),) = stand_in()
    assert given[given.index("--rdzv-endpoint") + 1] == "[fd00::1]:29500"
    launch(tmp_path, "--launcher", "no-ssh", "--node-rank", "0", "--no-preflight", master_addr="[fd00::1]")
    ((given, _),) = stand_in()
    assert given[given.index("--master_addr") + 1] == "fd00::1"


def slurm_script(tmp_path: Path, monkeypatch, capsys, **changes: object) -> Path:
    """A script of two nodes with two tasks each, and stand-ins for srun and scontrol on the path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scontrol = '#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n'
    for name, text in (("srun", SRUN.format(python=PYTHON)), ("scontrol", scontrol)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    monkeypatch.setenv("STAND_IN_TASKS", "2")
    assert launch(tmp_path, "--launcher", "slurm", "--dry-run", **changes) == 0
    path = tmp_path / "run.sbatch"
    path.write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)
    return path


def test_slurm_takes_its_master_from_the_allocation(tmp_path, stand_in, monkeypatch, capsys):
    options = ["--gres=gpu:2", '--comment="two words"']
    script = slurm_script(tmp_path, monkeypatch, capsys, master_addr="10.0.0.1", slurm={"options": options})
    head = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert [shlex.split(line)[1] for line in head[-2:]] == ["--gres=gpu:2", "--comment=two words"]
    subprocess.run(["bash", str(script)], check=True, timeout=60)
    seen = stand_in()
    assert [given[2] for given, _ in seen] == ["preflight"] * 2 + ["pretrain"] * 4
    assert all(given[3:] == RUN[1:] for given, _ in seen)
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"], each["NASTY"], each["EMPTY"]) for _, each in seen} == {
        ("node7", "29500", NASTY, "")
    }
    ranks = [[each[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] for _, each in seen]
    assert ranks[:2] == [["0", "2", "0", "1"], ["1", "2", "0", "1"]]
    assert ranks[2:] == [[str(rank), "4", str(rank % 2), "2"] for rank in range(4)]


def test_slurm_starts_nothing_without_an_allocation_or_after_a_failed_check(tmp_path, stand_in, monkeypatch, capsys):
    script = slurm_script(tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "other")
    assert subprocess.run(["bash", str(script)], check=False, timeout=60).returncode != 0
    assert stand_in() == []
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    monkeypatch.setenv("STAND_IN_CODE", "1")
    assert subprocess.run(["bash", str(script)], check=False, timeout=60).returncode != 0
    assert [given[2] for given, _ in stand_in()] == ["preflight"]


LAUNCHER = """\
import sys
from es_megatron.launch.steps import Step, run_steps
rank = 'trap "sleep 0.5; echo saved > saved; exit" TERM; touch ready; while :; do sleep 0.05; done'
shell = f'trap "" INT; ({rank}) & wait'
sys.exit(run_steps([Step("first", ("bash", "-c", shell), {}), Step("second", ("touch", "started"), {})]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_what_was_started_and_it_may_save(number, tmp_path):
    """The command dies of the signal at once, as DeepSpeed's runner does; what it started takes its time."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_all,  # noqa: PLW1509 - no threads here
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert f"first was stopped by {number.name}" in said
    assert not (tmp_path / "started").exists()
