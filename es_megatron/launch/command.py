"""Start a run on several nodes from one file: through DeepSpeed and pdsh, DeepSpeed on each node, SLURM or torchrun.

Every way first runs the pre-flight check on every node, then the run; `--dry-run` prints both and starts nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from es_megatron.checks.communication import address_of
from es_megatron.config import build, require, require_choice
from es_megatron.errors import ConfigError

Launcher = Literal["pdsh", "no-ssh", "slurm", "torchrun"]

ENVIRONMENT_FILE = "deepspeed_env"
SCRIPT = "run.sbatch"
PLAIN = re.compile(r"[A-Za-z0-9_./:=,+@%^-]*")
"""Arguments that pass through the shells of pdsh and ssh as they are."""

HOST_LINE = re.compile(r"(?P<host>\S+)(?:\s+slots\s*=\s*(?P<slots>\d+))?")


@dataclass(frozen=True)
class SlurmSettings:
    """What only SLURM is told."""

    job_name: str = "es_megatron"
    """Name of the job."""

    partition: str | None = None
    """Partition, if it must be said."""

    account: str | None = None
    """Account, if it must be said."""

    time: str | None = None
    """Time limit, as sbatch takes it."""

    signal: str = "TERM@120"
    """Signal sent before the time limit, so that the run saves and ends."""

    options: tuple[str, ...] = ()
    """Further lines for `#SBATCH`, such as `--gres=gpu:8`."""

    setup: tuple[str, ...] = ()
    """Shell lines before the run, such as `module load cuda`."""


@dataclass(frozen=True)
class LaunchSettings:
    """Where a run is started, and how."""

    launcher: Launcher = "pdsh"
    """`pdsh` (one command on one node, DeepSpeed reaches the others over ssh), `no-ssh` (the same command on every
    node, with its number), `slurm` (a batch script) or `torchrun` (the same on every node, c10d rendezvous)."""

    hostfile: Path | None = None
    """DeepSpeed's hostfile, lines `HOST slots=N`; needed for `pdsh` and `no-ssh`, and gives nodes and processes."""

    nodes: int = 1
    """Nodes, >= 1, where no hostfile gives them."""

    processes_per_node: int = 8
    """Processes on each node, >= 1, where no hostfile gives them."""

    master_addr: str | None = None
    """Address of the first node that the others reach; None: its name in the hostfile, or SLURM's first host."""

    master_port: int = 29500
    """Port there, in [1024, 65535]."""

    interface: str | None = None
    """Network interface that joins the nodes, for gloo and NCCL; needed with more than one node."""

    ssh_port: int | None = None
    """Port of sshd on the nodes, for `pdsh`."""

    preflight: bool = True
    """Check every node first."""

    environment: dict[str, str] = field(default_factory=dict[str, str])
    """Variables for every process on every node."""

    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    """What only SLURM is told."""

    command: tuple[str, ...] = ()
    """Arguments of `es-megatron`, such as [pretrain, --config, run.yaml]; those after `--` on the command line win."""

    def __post_init__(self) -> None:
        """Check every field."""
        require_choice("launcher", self.launcher, Launcher)
        require(self.nodes >= 1, "nodes", ">= 1", self.nodes)
        require(self.processes_per_node >= 1, "processes_per_node", ">= 1", self.processes_per_node)
        require(1024 <= self.master_port <= 65535, "master_port", "in [1024, 65535]", self.master_port)
        if self.launcher in ("pdsh", "no-ssh") and self.hostfile is None:
            raise ConfigError(
                f"`hostfile` must be given for launcher `{self.launcher}`. Write one, a line `HOST slots=N` per node."
            )


@dataclass(frozen=True)
class Cluster:
    """The nodes of a run."""

    hosts: tuple[str, ...]
    """Empty where SLURM or the user names them."""
    nodes: int
    processes: int
    """On each node."""


@dataclass(frozen=True)
class Step:
    """One command and the variables it needs besides those there are."""

    what: str
    command: tuple[str, ...]
    environment: Mapping[str, str]

    def line(self) -> str:
        """As one types it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join(["env", *variables, shlex.join(self.command)] if variables else [shlex.join(self.command)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--config", required=True, type=Path, help="YAML file of launch settings, such as launch/two_nodes.yaml"
    )
    parser.add_argument("--launcher", choices=("pdsh", "no-ssh", "slurm", "torchrun"), help="instead of the file's")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this node, for no-ssh and torchrun")
    parser.add_argument("--dry-run", action="store_true", help="print commands and environment, start nothing")
    parser.add_argument("--no-preflight", action="store_true", help="start without checking the nodes")
    parser.add_argument("run_command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="arguments of es-megatron")


def run_launch(arguments: argparse.Namespace) -> int:
    """Check the nodes and start the run; returns the exit code of what failed, or 0."""
    settings = load_launch(arguments.config, arguments.launcher)
    given = [each for each in arguments.run_command if each != "--"] or list(settings.command)
    if not given or given[0] != "pretrain":
        raise ConfigError(
            f"`command` must begin with `pretrain`, but is {given!r} instead. Give it in the file or after `--`: "
            "-- pretrain --config configs/run.yaml"
        )
    cluster = find_cluster(settings)
    check(settings, cluster, given, arguments.node_rank)
    preflight = settings.preflight and not arguments.no_preflight
    if settings.launcher == "slurm":
        return submit(batch_script(settings, cluster, given, preflight=preflight), dry=arguments.dry_run)
    steps = [Step("run", start_command(settings, cluster, given, arguments.node_rank), variables(settings))]
    if preflight:
        checking = ["preflight", *given[1:]]
        command = start_command(settings, cluster, checking, arguments.node_rank, processes=1)
        steps.insert(0, Step("pre-flight", command, variables(settings)))
    return follow(settings, steps, dry=arguments.dry_run)


def load_launch(path: Path, launcher: str | None = None) -> LaunchSettings:
    """Read launch settings; a relative `hostfile` is relative to the file.

    Raises:
        ConfigError: not readable, not YAML, an unknown key, a value out of range.
    """
    try:
        mapping: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"Launch settings `{path}` cannot be read: {error}. Check the path and the YAML.") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"Launch settings `{path}` must be a mapping, but are {mapping!r} instead.")
    mapping = cast(dict[str, Any], mapping)
    named: Any = mapping.pop("environment", None) or {}
    if launcher is not None:
        mapping["launcher"] = launcher
    if isinstance(mapping.get("hostfile"), str):
        mapping["hostfile"] = str(path.parent / mapping["hostfile"])
    settings = build(LaunchSettings, mapping, str(path))
    if not isinstance(named, dict):
        raise ConfigError(f"`environment` in `{path}` must be a mapping of variables, but is {named!r} instead.")
    settings.environment.update({str(name): str(value) for name, value in cast(dict[Any, Any], named).items()})
    return settings


def find_cluster(settings: LaunchSettings) -> Cluster:
    """Nodes and processes, from the hostfile where the launcher uses one.

    Raises:
        ConfigError: the hostfile cannot be read, or its nodes have different numbers of slots.
    """
    if settings.hostfile is None:
        return Cluster((), settings.nodes, settings.processes_per_node)
    try:
        text = settings.hostfile.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"`hostfile` `{settings.hostfile}` cannot be read: {error.strerror}. Check the path."
        ) from error
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = [(line, HOST_LINE.fullmatch(line)) for line in lines if line]
    for line, match in found:
        if match is None or match["slots"] is None:
            raise ConfigError(
                f"Lines of `{settings.hostfile}` must be `HOST slots=N`, but one is {line!r}. Correct it."
            )
    hosts = [(match["host"], int(match["slots"])) for _, match in found if match is not None]
    if not hosts or len({slots for _, slots in hosts}) > 1:
        raise ConfigError(
            f"`{settings.hostfile}` must name hosts with the same number of slots, but says {hosts}. Correct it."
        )
    return Cluster(tuple(host for host, _ in hosts), len(hosts), hosts[0][1])


def check(settings: LaunchSettings, cluster: Cluster, command: Sequence[str], node_rank: int) -> None:
    """Refuse what would hang or be mangled on the way.

    Raises:
        ConfigError: names the setting and the cure.
    """
    if cluster.nodes > 1 and settings.interface is None:
        raise ConfigError(
            "`interface` must be given with more than one node: gloo would choose 127.0.0.1 and wait for minutes. Look "
            "for the one that joins the nodes with `ip address`, such as eth0 or ib0."
        )
    if settings.launcher != "slurm" and not 0 <= node_rank < cluster.nodes:
        raise ConfigError(f"`--node-rank` must be in [0, {cluster.nodes}), but is {node_rank} instead.")
    if settings.launcher == "torchrun" and cluster.nodes > 1 and settings.master_addr is None and not cluster.hosts:
        raise ConfigError(
            "`master_addr` must be given for `torchrun` on several nodes. Set it to the first node's address."
        )
    if settings.launcher == "pdsh":
        for each in [*command, *settings.environment.values()]:
            if not PLAIN.fullmatch(each):
                raise ConfigError(
                    f"Arguments and variables for `pdsh` must have no spaces, quotes or brackets, which shells would "
                    f"take apart, but one is {each!r}. Put it into the settings file."
                )


def variables(settings: LaunchSettings) -> dict[str, str]:
    """Environment of every process."""
    found = {"OMP_NUM_THREADS": "1"}
    if settings.launcher == "pdsh":
        found["DS_ENV_FILE"] = str(Path(ENVIRONMENT_FILE).absolute())  # what DeepSpeed carries to the other nodes
    if settings.interface is not None:
        found |= {"GLOO_SOCKET_IFNAME": settings.interface, "NCCL_SOCKET_IFNAME": settings.interface}
    return {**found, **settings.environment}


def start_command(
    settings: LaunchSettings, cluster: Cluster, command: Sequence[str], node_rank: int, processes: int | None = None
) -> tuple[str, ...]:
    """What starts `es-megatron COMMAND` in so many processes on every node (None: all)."""
    if settings.launcher == "torchrun":
        return torchrun_command(settings, cluster, command, node_rank, processes or cluster.processes)
    address = settings.master_addr or cluster.hosts[0]  # these launchers have a hostfile
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(settings.hostfile)]
    start += ["--master_addr", address, "--master_port", str(settings.master_port), "--no_local_rank", "--force_multi"]
    if processes is not None:
        start += ["--num_gpus", str(processes)]
    if settings.launcher == "no-ssh":
        start += ["--no_ssh", "--node_rank", str(node_rank)]
    elif settings.ssh_port is not None:
        start += ["--ssh_port", str(settings.ssh_port)]
    return (*start, "--module", "es_megatron.cli", *command)


def torchrun_command(
    settings: LaunchSettings, cluster: Cluster, command: Sequence[str], node_rank: int, processes: int
) -> tuple[str, ...]:
    """The same by torchrun's c10d rendezvous."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(cluster.nodes)]
    start += ["--nproc-per-node", str(processes)]
    address = settings.master_addr or (cluster.hosts[0] if cluster.hosts else "127.0.0.1")
    start += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{address}:{settings.master_port}",
        "--rdzv-id",
        "es_megatron",
    ]
    own = address_of(settings.interface or "") or (address if node_rank == 0 else "")
    if node_rank == 0:
        start += ["--rdzv-conf", "is_host=1"]
    if own:
        start += ["--local-addr", own]  # a node's name may not be one that the others know
    return (*start, "-m", "es_megatron.cli", *command)


def batch_script(settings: LaunchSettings, cluster: Cluster, command: Sequence[str], *, preflight: bool) -> str:
    """A batch script for SLURM: one srun for the check, one for the run."""
    slurm = settings.slurm
    options = [f"--job-name={slurm.job_name}", f"--nodes={cluster.nodes}", f"--ntasks-per-node={cluster.processes}"]
    options += [f"--{name}={value}" for name in ("partition", "account", "time") if (value := getattr(slurm, name))]
    options += [f"--signal={slurm.signal}", *slurm.options]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables(settings).items())]
    master = settings.master_addr or '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    ranks = "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID"
    program = shlex.join([sys.executable, "-m", "es_megatron.cli"])

    def srun(arguments: Sequence[str], tasks: str, per_node: int) -> str:
        inner = f"exec env {ranks} LOCAL_WORLD_SIZE={per_node} {program} {shlex.join(arguments)}"
        return f"srun {tasks} bash -c {shlex.quote(inner)}"

    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "", "set -euo pipefail", *slurm.setup]
    lines += [*exports, f"export MASTER_ADDR={master}", f"export MASTER_PORT={settings.master_port}", ""]
    if preflight:
        tasks = f"--nodes={cluster.nodes} --ntasks={cluster.nodes} --ntasks-per-node=1"
        lines += ["# pre-flight", srun(["preflight", *command[1:]], tasks, 1)]
    lines += ["# run", srun(command, "--kill-on-bad-exit=1", cluster.processes)]
    return "\n".join(lines) + "\n"


def submit(script: str, *, dry: bool) -> int:
    """Hand the script to sbatch.

    Raises:
        ConfigError: there is no sbatch here.
    """
    if dry:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "`sbatch` must be on the path for launcher `slurm`. Run this on a login node, or use `--dry-run`."
        )
    Path(SCRIPT).write_text(script, encoding="utf-8")
    return subprocess.run(["sbatch", SCRIPT], check=False).returncode


def follow(settings: LaunchSettings, steps: Sequence[Step], *, dry: bool) -> int:
    """Print or run steps one after the other; ends with the first that fails."""
    carried = "".join(f"{name}={value}\n" for name, value in sorted(variables(settings).items()))
    over_ssh = settings.launcher == "pdsh"
    if dry:
        if over_ssh:
            print(f"# {ENVIRONMENT_FILE}, which DeepSpeed carries to every node\n{carried}", end="")
        for step in steps:
            print(f"# {step.what}\n{step.line()}")
        return 0
    if over_ssh:
        if shutil.which("pdsh") is None:
            raise ConfigError(
                "`pdsh` must be on the path for launcher `pdsh`. Install it, or use `no-ssh` or `torchrun`."
            )
        Path(ENVIRONMENT_FILE).write_text(carried, encoding="utf-8")
    for step in steps:
        code = subprocess.run(step.command, env={**os.environ, **step.environment}, check=False).returncode
        if code != 0:
            print(f"{step.what} failed with exit code {code}", file=sys.stderr)
            return code
    return 0
