"""DeepSpeed across two hosts: network namespaces on this machine, joined by a pair of virtual cables.

Needs root on Linux, `ip`, and for the second test `sshd` and `pdsh`. Skipped with the reason where they are missing;
with ES_REQUIRE_NETNS=1 that is a failure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import small_run

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: install es_megatron[deepspeed]")

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = itertools.count(29610)
SSH_PORT = 2299
RUN_SECONDS = 280
KILL_AFTER = 10
"""Iterations after which a node is killed: in the middle of epoch 1, two iterations after a checkpoint."""

pytestmark = [pytest.mark.slow, pytest.mark.netns, pytest.mark.timeout(900)]


def missing(reason: str) -> None:
    """Skip, or fail where the namespaces are required."""
    if os.environ.get("ES_REQUIRE_NETNS") == "1":
        pytest.fail(f"ES_REQUIRE_NETNS=1, but {reason}")
    pytest.skip(reason)


def ip(*words: str, check: bool = True) -> str:
    """Run `ip`; its output."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if check and done.returncode != 0:
        raise OSError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


class Host:
    """A network namespace, and what runs in it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def start(self, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command in the namespace, with its output in a file."""
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=log.parent,
                env={**environment, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        """Processes in the namespace."""
        return [int(pid) for pid in ip("netns", "pids", self.name, check=False).split()]

    def kill(self) -> None:
        """End everything in the namespace, as a power cut would."""
        for _ in range(20):
            found = self.pids()
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not found:
                return
            time.sleep(0.2)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces with an `eth0` each; gone afterwards, with all that ran in them."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        missing("network namespaces need root on Linux")
    if shutil.which("ip") is None:
        missing("`ip` is not installed (package iproute2)")
    made = [Host(f"es-{os.getpid()}-{letter}", address) for letter, address in zip("ab", ADDRESSES, strict=True)]
    cables = [f"es{os.getpid() % 100000}{letter}" for letter in "ab"]
    try:
        for host in made:
            ip("netns", "add", host.name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for host, cable in zip(made, cables, strict=True):
            ip("link", "set", cable, "netns", host.name, "name", "eth0")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
    except OSError as error:
        remove(made, cables)
        missing(f"network namespaces are not allowed here: {error}")
    try:
        yield made[0], made[1]
    finally:
        remove(made, cables)


def remove(made: list[Host], cables: list[str]) -> None:
    """End what runs in the namespaces, and take them away."""
    for host in made:
        host.kill()
        ip("netns", "delete", host.name, check=False)
    ip("link", "delete", cables[0], check=False)


def write_run(folder: Path, directory: str) -> Path:
    """Settings of a small run that saves every 4 iterations; gives the launch settings."""
    run = {
        "backend": "deepspeed",
        "deepspeed": {"zero_stage": 1},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": small_run.T,
            "ffn_hidden_size": 64,
            "vocab_multiple": 8,
        },
        "data": {"blend": str(folder / "data" / "blend.yaml")},
        "training": {"train_samples": 30 * 16, "global_batch_size": 16, "micro_batch_size": 1, "eval_samples": 0},
        "run": {"directory": str(folder / directory), "audit": True, "progress": False, "save_interval": 4},
        "evolved_sampling": {"preset": "paper", "pruning_ratio": 0.3, "mask_lag": 4, "seed": 7},
    }
    (folder / f"{directory}.yaml").write_text(yaml.safe_dump(run))
    (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    launch = {
        "launcher": "no-ssh",
        "hostfile": "hostfile",
        "master_addr": ADDRESSES[0],
        "master_port": next(PORT),
        "interface": "eth0",
        "ssh_port": SSH_PORT,
        "environment": {"DS_ACCELERATOR": "cpu"},
        "command": ["pretrain", "--config", str(folder / f"{directory}.yaml")],
    }
    path = folder / f"launch-{directory}.yaml"
    path.write_text(yaml.safe_dump(launch))
    return path


def launch(path: Path, *more: str) -> list[str]:
    """The command a user types."""
    return [sys.executable, "-m", "es_megatron.cli", "launch", "--config", str(path), *more]


def start_nodes(hosts: tuple[Host, Host], path: Path, *more: str) -> list[subprocess.Popen[bytes]]:
    """Start the run on both hosts, as two users at two keyboards would."""
    return [
        host.start(launch(path, "--node-rank", str(rank), *more), path.parent / f"{path.stem}-{rank}.log")
        for rank, host in enumerate(hosts)
    ]


def finish(nodes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait for every node to end well."""
    deadline = time.monotonic() + RUN_SECONDS
    codes = [node.wait(max(1.0, deadline - time.monotonic())) for node in nodes]
    logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))
    assert codes == [0] * len(nodes), logs


def audit(folder: Path) -> list[dict[str, object]]:
    """Whole lines of the audit log so far."""
    path = folder / "audit.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


def chosen(folder: Path) -> list[object]:
    """Chosen ids by iteration."""
    lines = audit(folder)
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    return [line["chosen"] for line in lines]


def wait_for(condition, seconds: float = RUN_SECONDS) -> None:
    """Look until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_deepspeed_goes_on_after_a_host_is_killed(hosts, tmp_path):
    small_run.write_blend(tmp_path / "data")
    finish(start_nodes(hosts, write_run(tmp_path, "whole")), tmp_path)
    expected = chosen(tmp_path / "whole")
    assert len(expected) > KILL_AFTER + 5
    report = (tmp_path / "launch-whole-0.log").read_text()
    assert "pre-flight of 2 nodes" in report
    assert "may start" in report
    assert "a sum over 2 nodes" in report

    path = write_run(tmp_path, "killed")
    nodes = start_nodes(hosts, path, "--no-preflight")
    wait_for(lambda: len(audit(tmp_path / "killed")) >= KILL_AFTER or any(node.poll() is not None for node in nodes))
    hosts[1].kill()
    reached = len(audit(tmp_path / "killed"))
    assert KILL_AFTER <= reached < len(expected), (tmp_path / "launch-killed-0.log").read_text()[-3000:]
    assert nodes[0].wait(RUN_SECONDS) != 0  # the one left must not hang
    hosts[0].kill()
    assert nodes[1].wait(30) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "summary.json").exists()

    finish(start_nodes(hosts, path, "--no-preflight"), tmp_path)
    assert chosen(tmp_path / "killed") == expected
    assert "resumed from" in (tmp_path / "launch-killed-0.log").read_text()
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0]["passes"] == summaries[1]["passes"]


def test_deepspeed_preflight_tells_what_is_wrong_on_a_host(hosts, tmp_path):
    small_run.write_blend(tmp_path / "data")
    path = write_run(tmp_path, "wrong")
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**settings, "interface": "ib7"}))
    nodes = start_nodes(hosts, path)
    assert [node.wait(RUN_SECONDS) != 0 for node in nodes] == [True, True]
    report = (tmp_path / "launch-wrong-0.log").read_text()
    assert "`ib7` is no interface of this machine" in report
    assert "Cure: use one of: eth0." in report
    assert "do not start" in report
    assert not (tmp_path / "wrong" / "audit.jsonl").exists()


@pytest.fixture
def reachable(hosts, tmp_path) -> Path:
    """An sshd in each namespace; gives a folder to put first on the path, with an `ssh` that has the key.

    DeepSpeed's pdsh runner ends remote processes by `pkill -f` on a pattern that would match other runs of this
    machine, since namespaces share its processes: a harmless `pkill` stands first on sshd's path.
    """
    for program in ("sshd", "pdsh", "ssh-keygen", "ssh"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            missing(f"`{program}` is not installed (packages openssh-server, openssh-client, pdsh)")
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True, timeout=30)
    shutil.copy(folder / "user.pub", folder / "authorized")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    options = f"-i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -F none"
    for name, line in (("pkill", "exit 0"), ("ssh", f'exec {shutil.which("ssh")} {options} "$@"')):
        (bin_folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_folder / name).chmod(0o755)
    config = [
        f"Port {SSH_PORT}",
        f"HostKey {folder}/host",
        f"AuthorizedKeysFile {folder}/authorized",
        "StrictModes no",
        "PermitRootLogin prohibit-password",
        "PasswordAuthentication no",
        "UsePAM no",
        f"PidFile {folder}/%s.pid",
        f"SetEnv PATH={bin_folder}:{os.environ['PATH']}",
    ]
    Path("/run/sshd").mkdir(exist_ok=True)
    sshd = str(shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin"))
    servers = []
    for host in hosts:
        path = folder / f"sshd-{host.name}"
        path.write_text("\n".join(config) % host.name + "\n")
        servers.append(host.start([sshd, "-D", "-e", "-f", str(path)], folder / f"{host.name}.log"))
    time.sleep(1.0)
    for host, server in zip(hosts, servers, strict=True):
        assert server.poll() is None, (folder / f"{host.name}.log").read_text()
    return bin_folder  # `hosts` ends the servers with all else in the namespaces


def test_deepspeed_over_pdsh_and_ssh_chooses_the_same_ids(hosts, reachable, tmp_path):
    small_run.write_blend(tmp_path / "data")
    expected = tmp_path / "torchrun"
    finish(start_nodes(hosts, write_run(tmp_path, "torchrun"), "--launcher", "torchrun", "--no-preflight"), tmp_path)
    path = write_run(tmp_path, "pdsh")
    search = f"{reachable}:{os.environ['PATH']}"
    node = hosts[0].start(launch(path, "--launcher", "pdsh"), tmp_path / "launch-pdsh-0.log", PATH=search)
    finish([node], tmp_path)
    report = (tmp_path / "launch-pdsh-0.log").read_text()
    assert "may start" in report
    assert chosen(tmp_path / "pdsh") == chosen(expected)
