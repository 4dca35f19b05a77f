"""The batch script for SLURM, and its way to sbatch."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from es_megatron.errors import ConfigError
from es_megatron.launch.hostfile import Cluster
from es_megatron.launch.settings import LaunchSettings

SCRIPT = "run.sbatch"

MASTER = """\
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${hosts%%$'\\n'*}"  # the first host of this allocation, whatever files say"""

SRUN = "srun --export=ALL --distribution=block"
"""Ranks are numbered host by host, as the pre-flight check and node-local groups rely on."""


def batch_script(
    settings: LaunchSettings,
    cluster: Cluster,
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    preflight: bool,
) -> str:
    """A batch script for SLURM: one srun for the check, one for the run.

    Args:
        settings: of the launch.
        cluster: nodes and processes.
        command: arguments of `es-megatron`.
        environment: of every process.
        preflight: whether to check first.
    """
    slurm = settings.slurm
    options = [f"--job-name={slurm.job_name}", f"--nodes={cluster.nodes}", f"--ntasks-per-node={cluster.processes}"]
    options += [f"--{name}={value}" for name in ("partition", "account", "time") if (value := getattr(slurm, name))]
    options += [f"--signal={slurm.signal}", *slurm.options]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items())]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "", "set -euo pipefail", *slurm.setup]
    lines += [*exports, MASTER, f"export MASTER_PORT={settings.master_port}", ""]
    if preflight:
        tasks = f"--nodes={cluster.nodes} --ntasks={cluster.nodes} --ntasks-per-node=1"
        lines += ["# pre-flight", srun(["preflight", *command[1:]], tasks, 1)]
    lines += ["# run", srun(command, "--kill-on-bad-exit=1", cluster.processes)]
    return "\n".join(lines) + "\n"


def srun(arguments: Sequence[str], tasks: str, per_node: int) -> str:
    """The line that starts `es-megatron ARGUMENTS` as so many tasks, each with its rank."""
    ranks = "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID"
    program = shlex.join([sys.executable, "-m", "es_megatron.cli", *arguments])
    return f"{SRUN} {tasks} bash -c {shlex.quote(f'exec env {ranks} LOCAL_WORLD_SIZE={per_node} {program}')}"


def submit(script: str, *, dry: bool) -> int:
    """Hand the script to sbatch.

    Raises:
        ConfigError: there is no sbatch here, or the script cannot be written.
    """
    if dry:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "`sbatch` must be on the path for launcher `slurm`. Run this on a login node, or use `--dry-run`."
        )
    write_here(SCRIPT, script)
    return subprocess.run(["sbatch", SCRIPT], check=False).returncode


def write_here(name: str, text: str) -> None:
    """Write a file into the current folder.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"`{name}` cannot be written into `{Path.cwd()}`: {error.strerror}. Start from a folder you may write to."
        ) from error
