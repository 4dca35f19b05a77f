"""Launch settings: where a run is started, and how; read from YAML, and checked before anything starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from es_megatron.config import build, require, require_choice
from es_megatron.errors import ConfigError
from es_megatron.launch import names

Launcher = Literal["pdsh", "no-ssh", "slurm", "torchrun"]

TEXT, NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
AS_WRITTEN = ("environment", "slurm")
"""Sections whose plain scalars are text: YAML would read `off` as false, 0755 as 493 and 24:00:00 as 86400."""

TAKEN = {
    **dict.fromkeys(("--nodes", "-N"), "`nodes` or the hostfile"),
    **dict.fromkeys(("--ntasks-per-node", "--ntasks", "-n"), "`processes_per_node` or the hostfile"),
    **dict.fromkeys(("--job-name", "-J"), "`slurm.job_name`"),
    **dict.fromkeys(("--partition", "-p"), "`slurm.partition`"),
    **dict.fromkeys(("--account", "-A"), "`slurm.account`"),
    **dict.fromkeys(("--time", "-t"), "`slurm.time`"),
    "--signal": "`slurm.signal`",
}
"""Options of sbatch that settings give already."""


@dataclass(frozen=True)
class SlurmSettings:
    """What only SLURM is told."""

    job_name: str = "es_megatron"
    """Name of the job: letters, digits and `_.:+=@%-`."""

    partition: str | None = None
    """Partition, if it must be said."""

    account: str | None = None
    """Account, if it must be said."""

    time: str | None = None
    """Time limit, as sbatch takes it: minutes, H:M:S or D-H:M:S."""

    signal: str = "TERM@120"
    """Signal sent before the time limit, so that the run saves and ends: TERM, which is the one it knows."""

    options: tuple[str, ...] = ()
    """Further lines for `#SBATCH`, such as `--gres=gpu:8`."""

    setup: tuple[str, ...] = ()
    """Shell lines before the run, such as `module load cuda`."""

    def __post_init__(self) -> None:
        """Check what goes into the script's head."""
        for name, pattern, rule in (
            ("job_name", names.JOB, "of letters, digits and `_.:+=@%-`, and begin with a letter or digit"),
            ("partition", names.LIST, "of letters, digits and `_.,-`, and begin with a letter or digit"),
            ("account", names.LIST, "of letters, digits and `_.,-`, and begin with a letter or digit"),
            ("time", names.DURATION, "a time limit such as 90, 24:00:00 or 2-12:00:00"),
            ("signal", names.SIGNAL, "TERM, as in TERM@120: the run saves and ends on no other"),
        ):
            value = getattr(self, name)
            require(value is None or bool(pattern.fullmatch(value)), f"slurm.{name}", rule, value)
        for option in self.options:
            found = names.OPTION.fullmatch(option)
            if found is None:
                raise ConfigError(
                    f"`slurm.options` must be single options of sbatch, such as `--gres=gpu:8`, with double quotes "
                    f"around values that have spaces, but one is {option!r}. Correct it."
                )
            if found["name"] in TAKEN:
                raise ConfigError(
                    f"`slurm.options` must leave `{found['name']}` to {TAKEN[found['name']]}, but has {option!r}. "
                    "Set it there."
                )


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
    """Name or address of the first node that the others reach, IPv6 with or without brackets; None: its name in the
    hostfile. SLURM takes the first host of the allocation instead."""

    master_port: int = 29500
    """Port there, in [1024, 65535]."""

    interface: str | None = None
    """Network interface that joins the nodes, for gloo and NCCL; needed with more than one node."""

    ssh_port: int | None = None
    """Port of sshd on the nodes, in [1, 65535], for `pdsh`."""

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
        port = self.ssh_port
        require(port is None or 1 <= port <= 65535, "ssh_port", "in [1, 65535]", port)
        interface = self.interface
        require(
            interface is None or bool(names.INTERFACE.fullmatch(interface)),
            "interface",
            "a network interface such as eth0, or several joined by commas",
            interface,
        )
        fault = None if self.master_addr is None else names.host_fault(self.master_addr)
        if fault is not None:
            raise ConfigError(f"`master_addr`: {self.master_addr!r} {fault}.")
        if self.launcher in ("pdsh", "no-ssh") and self.hostfile is None:
            raise ConfigError(
                f"`hostfile` must be given for launcher `{self.launcher}`. Write one, a line `HOST slots=N` per node."
            )


def load_launch(path: Path, launcher: str | None = None) -> LaunchSettings:
    """Read launch settings; a relative `hostfile` is relative to the file.

    Raises:
        ConfigError: not readable, not YAML, an unknown key, a key twice, a value that cannot be.
    """
    try:
        mapping: Any = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"Launch settings `{path}` cannot be read: {error}. Check the path, and that it is YAML in UTF-8."
        ) from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"Launch settings `{path}` must be a mapping, but are {mapping!r} instead.")
    mapping = cast(dict[str, Any], mapping)
    named: Any = mapping.pop("environment", None)
    if launcher is not None:
        mapping["launcher"] = launcher
    if isinstance(mapping.get("hostfile"), str):
        mapping["hostfile"] = str(path.parent / mapping["hostfile"])
    settings = build(LaunchSettings, mapping, str(path))
    named = {} if named is None else named
    if not isinstance(named, dict):
        raise ConfigError(f"`environment` in `{path}` must be a mapping of variables, but is {named!r} instead.")
    for name, value in cast(dict[Any, Any], named).items():
        check_variable(name, value, str(path))
    settings.environment.update(cast(dict[str, str], named))
    return settings


def read_yaml(text: str, where: str) -> Any:
    """The document in a YAML text, with the plain scalars of `AS_WRITTEN` as text.

    Raises:
        YAMLError: it is not YAML.
        ConfigError: a mapping has a key twice, of which YAML would keep the last in silence.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        refuse_duplicates(root, where)
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            refuse_duplicates(value, where)
            if key.value in AS_WRITTEN:
                keep_text(loader, value)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def refuse_duplicates(node: yaml.Node, where: str) -> None:
    """Raise `ConfigError` if a node is a mapping with a key twice."""
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, times in keys.items() if times > 1]
        if twice:
            raise ConfigError(f"`{where}` has the key `{twice[0]}` twice. Leave one of them.")


def keep_text(loader: yaml.SafeLoader, node: yaml.Node, depth: int = 2) -> None:
    """Make text of all scalars in a node but null, as they are written; lists in a mapping included."""
    if isinstance(node, yaml.ScalarNode) and node.tag != NULL:
        node.tag = TEXT
    if depth == 0:
        return
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        for key, value in node.value:
            keep_text(loader, key, 0)
            keep_text(loader, value, depth - 1)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            keep_text(loader, each, depth - 1)


def check_variable(name: Any, value: Any, where: str) -> None:
    """Refuse a variable that shells would not take, that launchers set, or whose value is no text."""
    if not isinstance(name, str) or not names.VARIABLE.fullmatch(name):
        raise ConfigError(
            f"Names in `environment` of `{where}` must be letters, digits and `_`, and not begin with a digit, but one "
            f"is {name!r}. Correct it."
        )
    if name in names.SET_HERE:
        raise ConfigError(
            f"`environment` of `{where}` must not have `{name}`, which the launcher sets. Set {names.SET_HERE[name]}."
        )
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(
            f"`{name}` in `environment` of `{where}` must be text, but is {value!r} instead. Put quotes around the "
            'value, "" for an empty one.'
        )
