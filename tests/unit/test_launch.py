"""Commands of every launcher, and the report of the pre-flight check."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from torch.distributed import TCPStore

from es_megatron import cli
from es_megatron.checks import communication, gloo, nodes, preflight
from es_megatron.checks.findings import blocking
from es_megatron.errors import ConfigError, LayoutError
from es_megatron.launch.command import find_cluster
from es_megatron.launch.settings import LaunchSettings, SlurmSettings, load_launch
from es_megatron.launch.slurm import batch_script

CHECKOUT = Path(__file__).parents[2]
RUN = ["pretrain", "--config", "run.yaml", "--backend", "deepspeed"]


def write(folder: Path, hosts: str = "a slots=4\n# a comment\nb slots=4\n", **changes) -> Path:
    (folder / "hostfile").write_text(hosts)
    settings = {"hostfile": "hostfile", "interface": "eth0", "master_addr": "10.0.0.1", **changes}
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    return path


def dry(path: Path, *more: str, capsys) -> str:
    assert cli.main(["launch", "--config", str(path), "--dry-run", *more, "--", *RUN]) == 0
    return capsys.readouterr().out


def options(line: str) -> dict[str, str]:
    words = shlex.split(line)
    return {word: after for word, after in pairwise(words) if word.startswith("--")}


def lines_of(out: str) -> tuple[str, str]:
    commands = [line for line in out.splitlines() if line.startswith("env ")]
    assert [line for line in out.splitlines() if line in ("# pre-flight", "# run")] == ["# pre-flight", "# run"]
    check, run = commands
    assert check.endswith("es_megatron.cli preflight --config run.yaml --backend deepspeed")
    assert run.endswith(f"es_megatron.cli {shlex.join(RUN)}")
    return check, run


def test_pdsh_is_one_command_with_an_environment_that_travels(tmp_path, capsys):
    out = dry(write(tmp_path, ssh_port=2299, environment={"NCCL_DEBUG": "WARN"}), capsys=capsys)
    check, run = lines_of(out)
    for line in (check, run):
        assert f"{sys.executable} -m deepspeed.launcher.runner" in line
        found = options(line)
        assert found["--hostfile"] == str(tmp_path / "hostfile")
        assert (found["--master_addr"], found["--master_port"], found["--ssh_port"]) == ("10.0.0.1", "29500", "2299")
        assert f"DS_ENV_FILE={os.getcwd()}/deepspeed_env" in line
    assert options(check)["--num_gpus"] == "1"
    assert "--num_gpus" not in run
    assert "\nGLOO_SOCKET_IFNAME=eth0\nNCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n" in out


def test_without_ssh_every_node_has_its_number(tmp_path, capsys):
    path = write(tmp_path)
    _, run = lines_of(dry(path, "--launcher", "no-ssh", "--node-rank", "1", capsys=capsys))
    assert "--no_ssh" in run
    assert options(run)["--node_rank"] == "1"
    assert "DS_ENV_FILE" not in run
    assert run.startswith("env GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 ")


def test_torchrun_meets_by_c10d(tmp_path, capsys):
    check, run = lines_of(dry(write(tmp_path), "--launcher", "torchrun", "--node-rank", "0", capsys=capsys))
    found = options(run)
    assert (found["--nnodes"], found["--nproc-per-node"]) == ("2", "4")
    assert found["--rdzv-conf"] == "is_host=1"
    assert (found["--rdzv-backend"], found["--rdzv-endpoint"]) == ("c10d", "10.0.0.1:29500")
    assert options(check)["--nproc-per-node"] == "1"


def test_slurm_gets_a_script_that_checks_first(tmp_path, capsys):
    slurm = {"partition": "gpu", "time": "24:00:00", "options": ["--gres=gpu:4"], "setup": ["module load cuda"]}
    script = dry(write(tmp_path, slurm=slurm, master_addr=None), "--launcher", "slurm", capsys=capsys)
    head = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert head == [
        "--job-name=es_megatron",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--partition=gpu",
        "--time=24:00:00",
        "--signal=TERM@120",
        "--gres=gpu:4",
    ]
    body = script.splitlines()
    assert body[0] == "#!/bin/bash"
    assert body.index("module load cuda") < body.index("export GLOO_SOCKET_IFNAME=eth0") < body.index("# pre-flight")
    check, run = (shlex.split(body[body.index(mark) + 1]) for mark in ("# pre-flight", "# run"))
    placed = ["srun", "--export=ALL", "--distribution=block"]
    assert check[:6] == [*placed, "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert run[:4] == [*placed, "--kill-on-bad-exit=1"]
    assert "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=1 " in check[-1]
    assert run[-1].endswith(shlex.join(RUN))
    assert "LOCAL_WORLD_SIZE=4 " in run[-1]


def test_a_slurm_script_without_a_check_has_none():
    settings = LaunchSettings(launcher="slurm", nodes=3, processes_per_node=2, interface="ib0", slurm=SlurmSettings())
    script = batch_script(settings, find_cluster(settings), RUN, {}, preflight=False)
    assert "preflight" not in script
    assert script.count("srun ") == 1


def test_the_command_may_stand_in_the_file(tmp_path, capsys):
    path = write(tmp_path, launcher="no-ssh", command=RUN)
    assert cli.main(["launch", "--config", str(path), "--dry-run", "--no-preflight", "--node-rank", "1"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(shlex.join(RUN))
    assert "preflight" not in out


@pytest.mark.parametrize(
    ("changes", "hosts", "more", "message"),
    [
        ({"interface": None}, None, [], "`interface` must be given with more than one node"),
        ({"hostfile": None}, None, [], "`hostfile` must be given for launcher `pdsh`"),
        (
            {"hostfile": None, "launcher": "torchrun", "nodes": 2, "master_addr": None},
            None,
            ["--node-rank", "1"],
            "`master_addr` must be given",
        ),
        ({"hostfile": "none"}, None, [], "`hostfile` .*cannot be read"),
        ({"master_port": 80}, None, [], r"`master_port` must be in \[1024, 65535\], but is 80"),
        ({"launcher": "pdhs"}, None, [], "Did you mean `pdsh`"),
        ({"interfaces": "eth0"}, None, [], "Unknown key `interfaces`.*Did you mean `interface`"),
        ({"environment": ["A=1"]}, None, [], "`environment` .* must be a mapping"),
        ({"environment": {"A": "two words"}}, None, [], "`A` in `environment` must have no spaces"),
        ({"environment": {"A": "x\ny"}}, None, [], "`A` in `environment` must have no spaces"),
        ({"environment": {"A": "%n"}}, None, [], "`A` in `environment` must have no spaces"),
    ],
)
def test_mistakes_are_told(changes, hosts, more, message, tmp_path, capsys):
    path = write(tmp_path, **changes) if hosts is None else write(tmp_path, hosts, **changes)
    assert cli.main(["launch", "--config", str(path), "--dry-run", *more, "--", *RUN]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said


def test_only_training_is_launched(tmp_path, capsys):
    assert cli.main(["launch", "--config", str(write(tmp_path)), "--dry-run", "--", "prepare"]) == 2
    assert "`command` must begin with `pretrain`" in capsys.readouterr().err


def test_the_shipped_launch_file_works(capsys):
    path = CHECKOUT / "launch" / "cluster.yaml"
    settings = load_launch(path)
    assert find_cluster(settings).nodes == 2
    for name in ("pdsh", "no-ssh", "slurm", "torchrun"):
        node = [] if name in ("pdsh", "slurm") else ["--node-rank", "1"]
        assert "preflight" in dry(path, "--launcher", name, *node, capsys=capsys)


FACTS = nodes.Facts(
    node=0,
    host="a",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    code="c0de",
    manifest="da7a (10 samples)",
    data_cure="",
    directory="",
    free_bytes=5 << 30,
    interface="eth0",
    address="10.0.0.1",
    interfaces=["lo", "eth0"],
)
OTHER = replace(FACTS, node=1, host="b", address="10.0.0.2")


def test_two_nodes_alike_may_start():
    findings = nodes.judge([FACTS, OTHER])
    assert not blocking(findings)
    lines = [finding.line() for finding in findings]
    assert "OK      GLOO_SOCKET_IFNAME: eth0: 10.0.0.1, 10.0.0.2." in lines
    assert "OK      run directory: shared and writable, 5,120 MB free." in lines


@pytest.mark.parametrize(
    ("changes", "what", "told", "cure"),
    [
        (
            {"versions": {"python": "3.11.7", "torch": "2.12.0"}},
            "packages",
            "node 1 (b): python 3.11.7, torch 2.12.0",
            "install the same on every node",
        ),
        ({"code": "0ther"}, "es_megatron", "node 1 (b): source 0ther", "check out the same commit on every node"),
        ({"manifest": "0ther (10 samples)"}, "data", "differ: node 0 (a): manifest da7a", "copy the same files"),
        (
            {"manifest": "`x.bin` does not exist", "data_cure": "copy it"},
            "data",
            "node 1 (b): `x.bin` does not exist",
            "copy it",
        ),
        (
            {"directory": "what node 0 wrote is not there"},
            "run directory",
            "node 1 (b): what node 0 wrote is not there",
            "set `run.directory` to a folder that all nodes share",
        ),
        (
            {"interface": "", "address": ""},
            "GLOO_SOCKET_IFNAME",
            "node 1 (b): not set: gloo may try 127.0.0.1",
            "`interface` of the launch settings, to the one between the nodes (eth0)",
        ),
        (
            {"interface": "ib7", "address": ""},
            "GLOO_SOCKET_IFNAME",
            "node 1 (b): `ib7` is no interface of this machine",
            "use one of: eth0",
        ),
        (
            {"address": ""},
            "GLOO_SOCKET_IFNAME",
            "node 1 (b): `eth0` has no IPv4 address, there are lo, eth0",
            "the one that joins the nodes",
        ),
        (
            {"interface": "eth1", "interfaces": ["lo", "eth1"]},
            "GLOO_SOCKET_IFNAME",
            "differ: node 0 (a): eth0; node 1 (b): eth1",
            "use the interface of the same name on every node",
        ),
    ],
)
def test_a_node_that_differs_is_named_with_the_cure(changes, what, told, cure):
    (finding,) = blocking(nodes.judge([FACTS, replace(OTHER, **changes)]))
    assert finding.what == what
    assert told in finding.told
    assert cure in finding.cure


def test_one_node_needs_no_interface():
    assert not blocking(nodes.judge([replace(FACTS, interface="", address="")]))


def test_a_report_ends_with_what_to_do(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["preflight", "--config", "none.yaml"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pre-flight of 1 node"
    assert lines[-1] == "1 of 5 checks failed: do not start"
    (data,) = [line for line in lines if line.startswith("FAIL")]
    assert "none.yaml" in data
    assert ". Cure: " in data


def test_a_sum_over_gloo_that_fails_names_the_node(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Connection refused.\nmore")

    monkeypatch.setattr(gloo, "add_up", refuse)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    finding = gloo.try_between(store, 1, 2)
    assert finding.line() == (
        "FAIL    gloo between nodes: node 1: Connection refused. Cure: check the firewall and `interface`."
    )


def test_an_interface_that_exists_has_an_address():
    assert communication.address_of("lo") == "127.0.0.1"
    assert communication.address_of("none0") == ""
    assert communication.address_of("") == ""


def test_a_folder_that_is_not_shared_or_not_writable_is_told(tmp_path):
    token = nodes.leave_token(tmp_path)
    assert nodes.look_at_folder(tmp_path, token)[0] == ""
    assert "is not there" in nodes.look_at_folder(tmp_path, "another")[0]
    (tmp_path / "file").write_text("")
    assert nodes.leave_token(tmp_path / "file" / "run")  # told by what looks for it
    assert nodes.look_at_folder(tmp_path / "file" / "run", token)[0]


def test_a_taken_port_is_told():
    with socket.socket() as taken, pytest.MonkeyPatch.context() as patch:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        patch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(LayoutError, match=r"another program has that port.*`master_port`"):
            preflight.meet(0, 2, 2.0)


def test_a_node_that_does_not_come_is_told(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(LayoutError, match="not every node was started"):
        preflight.meet(0, 2, 1.0)


@pytest.mark.parametrize(
    "path", sorted((CHECKOUT / "configs" / "deepspeed").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_deepspeed_configs_can_be_read(path):
    from es_megatron.trainer.settings import check_layout, load_settings

    settings = load_settings(path)
    assert settings.backend == "deepspeed"
    assert settings.deepspeed.config is not None
    assert settings.deepspeed.config.with_suffix(".yaml").name == path.name
    assert (CHECKOUT / settings.deepspeed.config).is_file()
    ranks = int(path.read_text().split("(")[1].split(" in all")[0])
    check_layout(settings, ranks)
    data = settings.parallel.data_parallel(ranks)
    kept = settings.evolved_sampling.selection.keep_ratio * settings.training.global_batch_size
    assert kept % (settings.training.micro_batch_size * data) == 0


def test_a_wrong_configuration_is_not_hidden_by_the_word_launch(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_launch(tmp_path / "none.yaml")
