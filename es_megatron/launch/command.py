"""Start a run on several nodes from one file: through DeepSpeed and pdsh, DeepSpeed on each node, SLURM or torchrun.

Every way first runs the pre-flight check on every node, then the run; `--dry-run` prints both and starts nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from es_megatron.checks.communication import address_of
from es_megatron.errors import ConfigError
from es_megatron.launch.hostfile import Cluster, read_hostfile
from es_megatron.launch.names import is_ipv6, is_loopback, without_brackets
from es_megatron.launch.settings import LaunchSettings, load_launch
from es_megatron.launch.slurm import batch_script, submit, write_here
from es_megatron.launch.steps import Step, run_steps

ENVIRONMENT_FILE = "deepspeed_env"
PLAIN = re.compile(r"[A-Za-z0-9_./:=,+@^-]+")
"""What passes through pdsh, which replaces `%n` and the like, and the shells of ssh as it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--config", required=True, type=Path, help="YAML file of launch settings, such as launch/cluster.yaml"
    )
    parser.add_argument("--launcher", choices=("pdsh", "no-ssh", "slurm", "torchrun"), help="instead of the file's")
    parser.add_argument("--node-rank", type=int, help="number of this node from 0, for no-ssh and torchrun")
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
    node = arguments.node_rank or 0
    preflight = settings.preflight and not arguments.no_preflight
    if settings.launcher == "slurm":
        script = batch_script(settings, cluster, given, variables(settings), preflight=preflight)
        return submit(script, dry=arguments.dry_run)
    steps = [Step("run", start_command(settings, cluster, given, node), variables(settings))]
    if preflight:
        checking = ["preflight", *given[1:]]
        command = start_command(settings, cluster, checking, node, processes=1)
        steps.insert(0, Step("pre-flight", command, variables(settings)))
    return follow(settings, steps, dry=arguments.dry_run)


def find_cluster(settings: LaunchSettings) -> Cluster:
    """Nodes and processes, from the hostfile where there is one.

    Raises:
        ConfigError: see `read_hostfile`.
    """
    if settings.hostfile is None:
        return Cluster((), settings.nodes, settings.processes_per_node)
    return read_hostfile(settings.hostfile, pdsh=settings.launcher == "pdsh")


def check(settings: LaunchSettings, cluster: Cluster, command: Sequence[str], node_rank: int | None) -> None:
    """Refuse what would hang or be mangled on the way.

    Args:
        settings: of the launch.
        cluster: nodes and processes.
        command: arguments of `es-megatron`.
        node_rank: number of this node, None if it is not given.

    Raises:
        ConfigError: names the setting and the cure.
    """
    if cluster.nodes > 1 and settings.interface in (None, "lo"):
        raise ConfigError(
            "`interface` must be given with more than one node, and not be lo: gloo would choose 127.0.0.1 and wait "
            "for minutes. Look for the one that joins the nodes with `ip address`, such as eth0 or ib0."
        )
    check_node_rank(settings, cluster, node_rank)
    if settings.launcher != "slurm":
        check_master(settings, cluster)
    if settings.launcher == "pdsh":
        check_plain(settings, command)


def check_node_rank(settings: LaunchSettings, cluster: Cluster, node_rank: int | None) -> None:
    """Refuse a missing number of this node, one out of range, and one where nothing takes it."""
    launcher = settings.launcher
    if launcher in ("pdsh", "slurm"):
        if node_rank is not None:
            raise ConfigError(
                f"`--node-rank` must be left out for launcher `{launcher}`, which is started once for all nodes. Leave "
                "it out, or use launcher `no-ssh` or `torchrun`."
            )
    elif node_rank is None and cluster.nodes > 1:
        raise ConfigError(
            f"`--node-rank` must be given for launcher `{launcher}` with {cluster.nodes} nodes. Give 0 on the first "
            "node, 1 on the second, and so on, in the order of the hostfile."
        )
    elif node_rank is not None and not 0 <= node_rank < cluster.nodes:
        raise ConfigError(f"`--node-rank` must be in [0, {cluster.nodes}), but is {node_rank} instead.")


def check_master(settings: LaunchSettings, cluster: Cluster) -> None:
    """Refuse a first node that others have no address of."""
    address = master(settings, cluster)
    if cluster.nodes == 1:
        return
    if address is None:
        raise ConfigError(
            f"`master_addr` must be given for `{settings.launcher}` on several nodes. Set it to the first node's "
            "address."
        )
    if is_loopback(address):
        where = "`master_addr`" if settings.master_addr else f"The first host of `{settings.hostfile}`"
        raise ConfigError(
            f"{where} must be an address that the other nodes reach, but is {address!r} instead, which is every node's "
            "own. Set `master_addr` to the first node's address on the interface that joins the nodes."
        )


def check_plain(settings: LaunchSettings, command: Sequence[str]) -> None:
    """Refuse what pdsh and the shells behind it would take apart; DeepSpeed quotes neither folders nor arguments."""
    carried = [(f"`{name}` in `environment`", value) for name, value in settings.environment.items() if value]
    told = [(f"Argument {each!r}", each) for each in command]
    places = [("The current folder", str(Path.cwd())), ("The path of Python", sys.executable)]
    for what, each in [*carried, *told, *places]:
        if not PLAIN.fullmatch(each):
            raise ConfigError(
                f"{what} must have no spaces, quotes, brackets or `%` for launcher `pdsh`, and not be empty: pdsh and "
                "shells would take it apart. Put it into the settings file, or use launcher `no-ssh` or `torchrun`."
            )


def master(settings: LaunchSettings, cluster: Cluster) -> str | None:
    """Name or address of the first node, without brackets; None where nothing tells it."""
    if settings.master_addr is not None:
        return without_brackets(settings.master_addr)
    return cluster.hosts[0] if cluster.hosts else None


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
    address = master(settings, cluster) or "127.0.0.1"
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
    address = master(settings, cluster) or "127.0.0.1"
    host = f"[{address}]" if is_ipv6(address) else address
    endpoint = f"{host}:{settings.master_port}"
    start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "es_megatron"]
    own = address_of(settings.interface or "") or (address if node_rank == 0 else "")
    if node_rank == 0:
        start += ["--rdzv-conf", "is_host=1"]
    if own:
        start += ["--local-addr", own]  # a node's name may not be one that the others know
    return (*start, "-m", "es_megatron.cli", *command)


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
        write_here(ENVIRONMENT_FILE, carried)
    return run_steps(steps)
