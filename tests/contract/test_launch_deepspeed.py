"""DeepSpeed's own runner, with stand-ins for pdsh and ssh: what it makes of hostfiles, and what reaches the nodes."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("deepspeed")

from tests import small_run  # isort: skip - it keeps DeepSpeed from compiling

from deepspeed.launcher.runner import _parse_hostfile

from es_megatron.errors import ConfigError
from es_megatron.launch.hostfile import read_hostfile
from es_megatron.launch.names import same_host

PIECES = ["a", "b1", "10.0.0.1", "u@", "-", "[1-2]", ":22", " ", "  ", "\t", "slots=", "slots = ", "max_slots=", "8"]
PIECES += ["0", "4", "#", "# c", ",", "\u00e9", "\x0c", "\x1c", "\u2028"]

PDSH = """\
#!{python}
import json, os, subprocess, sys
given = sys.argv[1:]
hosts = given[given.index("-w") + 1].split(",")
line = " ".join(given[given.index("-w") + 2 :])
with open({seen!r}, "a") as file:
    file.write(json.dumps(hosts) + "\\n")
for number, host in enumerate(hosts):  # as pdsh and a shell at the other end of ssh
    line_here = line.replace("%n", str(number)).replace("%h", host).replace(sys.executable, {recorder!r})
    subprocess.run(["bash", "-c", line_here], check=True, env={{"PATH": os.environ["PATH"]}}, cwd="/")
"""

RECORDER = """\
#!{python}
import json, os, sys
with open({seen!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]) + "\\n")
"""


def test_hostfiles_that_pass_are_read_as_deepspeed_reads_them(tmp_path):
    draw = random.Random(5)
    path, passed = tmp_path / "hostfile", 0
    for _ in range(1500):
        start = [draw.choice(["a", "b1", "u@c", "10.0.0.1"]) + draw.choice([" ", "\t", "  "]) + "slots=8"]
        lines = [
            "".join([*(start if draw.random() < 0.7 else []), *draw.choices(PIECES, k=draw.randrange(4))])
            for _ in range(draw.randrange(1, 4))
        ]
        text = draw.choice(["\n", "\r\n"]).join(lines) + draw.choice(["", "\n"])
        path.write_bytes(text.encode())
        try:
            ours = read_hostfile(path, pdsh=True)
        except ConfigError:
            continue
        with path.open(encoding="utf-8") as file:
            theirs = _parse_hostfile(file.readlines())
        assert [same_host(host.rpartition("@")[2]) for host in theirs] == [same_host(host) for host in ours.hosts], text
        assert set(theirs.values()) == {ours.processes}, text
        passed += 1
    assert passed > 150


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_pdsh_is_given_reaches_every_node_whole(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    seen = str(tmp_path / "seen.jsonl")
    recorder = tmp_path / "recorder"
    recorder.write_text(RECORDER.format(python=sys.executable, seen=seen))
    for name, text in (
        ("pdsh", PDSH.format(python=sys.executable, seen=seen, recorder=str(recorder))),
        ("ssh", f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    recorder.chmod(0o755)
    (tmp_path / "hostfile").write_text("# two\nalice@10.0.0.1 slots=2 max_slots=2 # head\nbob@10.0.0.2 slots=2\n")
    settings = {
        "hostfile": "hostfile",
        "interface": "eth0",
        "ssh_port": 2222,
        "environment": {"A_B": "x=1,y:2@z^", "EMPTY": ""},
        "preflight": False,
        "command": ["pretrain", "--config", "run.yaml", "training.lr=1e-4"],
    }
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(settings))
    subprocess.run(
        [sys.executable, "-m", "es_megatron.cli", "launch", "--config", "launch.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
        timeout=280,
    )
    assert (tmp_path / "asked").read_text().split()[-2:] == ["alice@10.0.0.1", "hostname"]
    hosts, *nodes = [json.loads(line) for line in Path(seen).read_text().splitlines()]
    assert hosts == ["alice@10.0.0.1", "bob@10.0.0.2"]
    for number, (given, environment, folder) in enumerate(nodes):
        told = dict(each.partition("=")[::2] for each in given if each.startswith("--"))
        assert (told["--node_rank"], told["--master_addr"], told["--master_port"]) == (str(number), "10.0.0.1", "29500")
        world = json.loads(base64.urlsafe_b64decode(told["--world_info"]))
        assert world == {"alice@10.0.0.1": [0, 1], "bob@10.0.0.2": [0, 1]}
        assert given[-5:] == ["es_megatron.cli", *settings["command"]]
        assert (environment["A_B"], environment["EMPTY"]) == ("x=1,y:2@z^", "")
        assert environment["GLOO_SOCKET_IFNAME"] == "eth0"
        assert folder == str(tmp_path)
    assert len(nodes) == 2


@pytest.mark.timeout(300)
def test_deepspeed_runs_alone_without_a_launcher(tmp_path):
    small_run.write_blend(tmp_path / "data")
    run = {
        "backend": "deepspeed",
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": small_run.T},
        "data": {"blend": str(tmp_path / "data" / "blend.yaml")},
        "training": {"train_samples": 64, "global_batch_size": 16, "micro_batch_size": 1, "eval_samples": 0},
        "run": {"directory": str(tmp_path / "run"), "progress": False},
        "evolved_sampling": {"preset": "paper", "mask_lag": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    told = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "es_megatron.cli", "pretrain", "--config", str(tmp_path / "run.yaml")]
    subprocess.run(command, env=environment, check=True, timeout=280)
    assert (tmp_path / "run" / "checkpoints" / "iter_0000004").is_dir()
