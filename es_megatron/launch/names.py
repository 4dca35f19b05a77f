"""What names of hosts, users, variables and jobs may look like: they go into command lines, scripts and shells.

A name that a tool would take for an option, a second line or a command is refused here, before anything starts.
"""

from __future__ import annotations

import ipaddress
import re

HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
INTERFACE = re.compile(r"[=^]?[A-Za-z0-9_][A-Za-z0-9_.:@-]*(?:,[A-Za-z0-9_][A-Za-z0-9_.:@-]*)*")
JOB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+=@%-]*")
LIST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*")
DURATION = re.compile(r"\d+(?::\d{1,2}){0,2}|\d+-\d{1,2}(?::\d{1,2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
SIGNAL = re.compile(r"(?:R:)?(?:SIG)?(?:TERM|15)(?:@\d+)?", re.IGNORECASE)
OPTION = re.compile(
    r"(?P<name>--[a-z][a-z-]*|-[A-Za-z])"
    r"(?:[= ]?(?:[A-Za-z0-9_./:,+@%^*\[\]()&|!=-]+|\"[^\"\\\x00-\x1f]+\"))?"
)
"""A line for sbatch: it takes words apart at spaces, and what follows `#` for a comment."""

SET_HERE = {
    "MASTER_ADDR": "`master_addr`",
    "MASTER_PORT": "`master_port`",
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ENV_FILE"), "nothing: leave it out"),
}
"""Variables that launchers set on every process, and what to set instead."""


def host_fault(host: str) -> str | None:
    """Why a name or address of a host cannot be used, with the cure; None if it can.

    Args:
        host: without user and port; an IPv6 address with or without brackets.
    """
    bare = without_brackets(host)
    if is_ipv6(bare):
        return None if "%" not in bare else "names a zone, which differs by machine: give a global address or a name"
    if "[" in host or "]" in host:
        return "is a range, or an address with a port: write one line for each host, and the port into `ssh_port`"
    if re.fullmatch(r"[^:]+:\d+", host):
        return "has a port: leave it out here, and set `ssh_port`"
    if not HOST.fullmatch(host) or len(host) > 253:
        return (
            "is no name of a host: give a name of letters, digits, `.`, `-` and `_` that begins with a letter or digit"
        )
    if re.fullmatch(r"[0-9.]+", host) and not is_ipv4(host):
        return "is no IPv4 address: correct its numbers"
    return None


def without_brackets(host: str) -> str:
    """`[fd00::1]` as `fd00::1`; anything else as it is."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_ipv4(host: str) -> bool:
    """Whether it is an IPv4 address."""
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def is_ipv6(host: str) -> bool:
    """Whether it is an IPv6 address, without brackets."""
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def same_host(host: str) -> str:
    """One spelling for names and addresses that mean the same host; nothing is looked up."""
    bare = without_brackets(host)
    if is_ipv6(bare):
        return ipaddress.IPv6Address(bare).compressed
    return bare.lower()


def is_loopback(host: str) -> bool:
    """Whether an address or name means the machine it is used on, so that other nodes cannot reach it."""
    bare = same_host(host)
    if is_ipv4(bare) or is_ipv6(bare):
        address = ipaddress.ip_address(bare)
        return address.is_loopback or address.is_unspecified
    return bare in ("localhost", "ip6-localhost", "ip6-loopback") or bare.startswith("localhost.")
