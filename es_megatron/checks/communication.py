"""Addresses and network interfaces that the processes of a run meet at, as this machine has them."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

from es_megatron.checks.findings import Finding, fail, note, ok

GLOO_INTERFACE, NCCL_INTERFACE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915
"""Request of Linux for the IPv4 address of an interface."""


def check_communication(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Addresses and interfaces that launchers set or need.

    Args:
        environment: variables of the run.
    """
    several = nodes_told(environment) > 1
    yield judge_address(environment.get("MASTER_ADDR"), several)
    for variable in (GLOO_INTERFACE, NCCL_INTERFACE):
        yield judge_interface(variable, environment.get(variable), interfaces(), several)


def interfaces() -> list[str]:
    """Names of all network interfaces, `lo` included."""
    return [name for _, name in socket.if_nameindex()]


def address_of(interface: str) -> str:
    """IPv4 address of a network interface, empty if it has none or does not exist."""
    if not interface:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
    return ""


def nodes_told(environment: Mapping[str, str]) -> int:
    """Number of nodes, as far as the environment tells."""
    for name in ("NNODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "GROUP_WORLD_SIZE"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    world, local = environment.get("WORLD_SIZE", ""), environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(world) // int(local)) if world.isdigit() and local.isdigit() and int(local) else 1


def judge_address(address: str | None, several: bool) -> Finding:
    """Whether MASTER_ADDR leads somewhere other nodes can reach.

    Args:
        address: name or address, None if it is not set.
        several: whether the run has more than one node.
    """
    what = "MASTER_ADDR"
    if address is None and several:
        return fail(what, "not set, but there are several nodes", "set it to the first node's name or address")
    if address is None:
        return ok(what, "not set; one node needs none under `torchrun --standalone`")
    try:
        found = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return fail(what, f"`{address}` cannot be resolved here", "use an address, or correct the name service")
    if several and ipaddress.ip_address(found.partition("%")[0]).is_loopback:
        told = f"`{address}` is {found}, which other nodes cannot reach"
        return fail(what, told, "give the address they see")
    return ok(what, f"{address} ({found})")


def judge_interface(variable: str, given: str | None, names: Sequence[str], several: bool) -> Finding:
    """Whether the network interface is set where it must be, and exists.

    Args:
        variable: `GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME`.
        given: its value, None if it is not set.
        names: interfaces of the machine that it is for.
        several: whether the run has more than one node.
    """
    listed = ", ".join(name for name in names if name != "lo") or "none but lo"
    if given is None and not several:
        return ok(variable, "not set; needed with several nodes only")
    if given is None:
        cure = f"set it, or `interface` of the launch settings, to the one between the nodes ({listed})"
        if variable == NCCL_INTERFACE:
            return note(variable, "not set: NCCL chooses among the interfaces by itself", cure)
        return fail(variable, "not set: gloo may try 127.0.0.1, and fail after minutes", cure)
    # NCCL takes lists and prefixes, and `=`, `^` in front of them; gloo a list of names
    wanted = [name for name in given.lstrip("=^").split(",") if name]
    prefix = variable == NCCL_INTERFACE and not given.startswith("=")
    if given.startswith("^") or all(any(n.startswith(w) if prefix else n == w for n in names) for w in wanted):
        return ok(variable, given)
    return fail(variable, f"`{given}` is no interface of this machine", f"use one of: {listed}")
