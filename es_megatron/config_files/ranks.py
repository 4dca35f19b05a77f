"""How many ranks a launch line starts, by its launcher and scheduler."""

from __future__ import annotations

import posixpath

from es_megatron.config_files.launches import PYTHON, Launch, Script
from es_megatron.config_files.shell.traced import MARK

ELASTIC = {"torchrun", "torch.distributed.run", "torch.distributed.launch", "dlrover-run", "ft_launcher"}
MPI = {"mpirun", "mpiexec", "aprun", "orterun"}


def world_size_of(script: Script, launch: Launch) -> int | None:
    """Ranks that a launch line starts; None if the text does not tell."""
    names = {posixpath.basename(each) for each in launch.before}
    if names & ELASTIC:
        each = launch.option("--nproc-per-node") or "1"
        nodes = "1" if "--standalone" in launch.before else launch.option("--nnodes") or "1"
        return product(each, nodes.rpartition(":")[2])
    if names & {"deepspeed", "ds", "deepspeed.launcher.runner"}:
        hosts = launch.option("--hostfile", "-H") is not None
        return product(launch.option("--num-gpus"), launch.option("--num-nodes") or ("" if hosts else "1"))
    if "accelerate" in names:
        return product(launch.option("--num-processes"), "1")
    if names & MPI:
        return product(launch.option("-np", "--np", "-n"), "1")
    if "msrun" in names:
        return product(launch.option("--worker-num"), "1")
    if "srun" in names or script.directives:
        return scheduled(script, launch)
    value = script.variables.get("WORLD_SIZE")
    return product(value, "1") if value is not None else 1 if alone(launch) else None


def scheduled(script: Script, launch: Launch) -> int | None:
    """Tasks that `srun` starts, by its own options and those of `#SBATCH`."""
    found = [
        launch.option(*names) or next((script.directives[name] for name in names if name in script.directives), None)
        for names in (("--ntasks", "-n"), ("--ntasks-per-node",), ("--nodes", "-N"))
    ]
    return product(found[0], "1") if found[0] is not None else product(found[1], found[2])


def alone(launch: Launch) -> bool:
    """Whether nothing but an interpreter starts the script, so that it is one rank."""
    words = [each for each in launch.before if "=" not in each and not each.startswith("-")]
    return len(words) == 1 and PYTHON.fullmatch(posixpath.basename(words[0])) is not None and not MARK.search(words[0])


def product(left: str | None, right: str | None) -> int | None:
    """Of two whole numbers; None where one is not known."""
    return int(left) * int(right) if left and right and left.isdigit() and right.isdigit() else None
