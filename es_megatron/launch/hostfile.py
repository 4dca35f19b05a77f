"""Hostfiles as DeepSpeed reads them: a line `[USER@]HOST slots=N` for each node, and comments.

DeepSpeed itself ignores what follows `slots=N`, and takes anything without spaces for a host; pdsh then expands ranges
and reads colons. What they would read otherwise than it looks is refused, with its line and the cure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from es_megatron.errors import ConfigError
from es_megatron.launch.names import USER, host_fault, is_ipv6, same_host, without_brackets

LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)(?:\s+max[_-]slots=(?P<most>\d+))?(?:\s*#.*)?")
SPACED = re.compile(r"\S+\s+(?:slots\s+=|slots=\s).*")


@dataclass(frozen=True)
class Cluster:
    """The nodes of a run."""

    hosts: tuple[str, ...]
    """Names or addresses, without users and brackets; empty where SLURM or the user names them."""
    nodes: int
    processes: int
    """On each node."""


def read_hostfile(path: Path, *, pdsh: bool) -> Cluster:
    """Read a hostfile.

    Args:
        path: of the file.
        pdsh: whether pdsh reaches the hosts, which cannot take IPv6 addresses.

    Raises:
        ConfigError: it cannot be read, or a line would be read otherwise than it looks; names line and cure.
    """
    lines: dict[str, int] = {}
    hosts: list[str] = []
    slots = 0
    for number, raw in enumerate(re.split(r"\r\n|\r|\n", read_text(path)), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        where = f"Line {number} of `{path}`"
        host, count = read_line(line, where, pdsh=pdsh)
        if same_host(host) in lines:
            raise ConfigError(
                f"{where} names `{host}` again, after line {lines[same_host(host)]}. Leave one of them, with all slots."
            )
        if hosts and count != slots:
            raise ConfigError(
                f"{where} must have `slots={slots}`, the same number of slots as the lines before, but has "
                f"`slots={count}`. Give every host as many."
            )
        lines[same_host(host)] = number
        hosts.append(host)
        slots = count
    if not hosts:
        raise ConfigError(
            f"`{path}` must name at least one host, but names none. Write a line `HOST slots=N` per node."
        )
    return Cluster(tuple(hosts), len(hosts), slots)


def read_text(path: Path) -> str:
    """Text of a hostfile, in UTF-8 without a byte order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"`hostfile` `{path}` cannot be read: {error.strerror}. Check the path.") from error
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(
            f"Line 1 of `{path}` begins with a byte order mark, which DeepSpeed would take for part of the host. "
            "Save the file as UTF-8 without one."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"Line {number} of `{path}` must be UTF-8, but has the byte 0x{data[error.start]:02x}. Save the "
            "file as UTF-8."
        ) from error


def read_line(line: str, where: str, *, pdsh: bool) -> tuple[str, int]:
    """Host, without user and brackets, and slots of one line that is no comment."""
    match = LINE.fullmatch(line)
    if match is None:
        cure = "Leave out the spaces around `=`." if SPACED.fullmatch(line) else "Correct it."
        raise ConfigError(f"{where} must be `HOST slots=N`, but is {line!r}. {cure}")
    slots, most = int(match["slots"]), match["most"]
    if slots < 1 or (most is not None and int(most) < slots):
        raise ConfigError(
            f"{where} must have at least 1 slot and no more than `max_slots`, but is {line!r}. Give the number of "
            "processes (GPUs), or leave the host out."
        )
    user, at, host = match["host"].rpartition("@")
    if at and not USER.fullmatch(user):
        raise ConfigError(f"{where} must be `USER@HOST slots=N`, but `{user}` is no name of a user. Correct it.")
    fault = host_fault(host)
    if fault is not None:
        raise ConfigError(f"{where}: `{host}` {fault}.")
    if pdsh and is_ipv6(without_brackets(host)):
        raise ConfigError(
            f"{where}: pdsh cannot take the IPv6 address `{host}`. Give the host's name, or use launcher `no-ssh` or "
            "`torchrun`."
        )
    return without_brackets(host), slots
