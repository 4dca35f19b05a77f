"""What one node of a run finds out alone, and how the facts of all nodes are compared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from es_megatron.checks import communication
from es_megatron.checks.findings import Finding, fail, note, ok, split_error
from es_megatron.checks.versions import installed_version
from es_megatron.errors import EsError

if TYPE_CHECKING:
    from es_megatron.trainer.settings import PretrainSettings

PACKAGES = ("torch", "numpy", "megatron-core", "deepspeed", "sentencepiece", "safetensors")
PACKAGE = Path(__file__).resolve().parents[1]
INTERFACE = communication.GLOO_INTERFACE
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What one node states of itself; everything is JSON-able."""

    node: int
    host: str
    versions: dict[str, str]
    """By package; "not installed" where it is not."""
    code: str
    """Digest of this package's source files."""
    manifest: str
    """Digest of the data manifest, or what is wrong with the data or the settings."""
    data_cure: str
    """What to do about that; empty where the data are fine."""
    directory: str
    """What is wrong with the run's folder, or nothing."""
    free_bytes: int | None
    """In that folder; None where the settings that name it cannot be read."""
    interface: str
    """Name that `GLOO_SOCKET_IFNAME` gives, or nothing."""
    address: str
    """IPv4 address of that interface, or nothing."""
    interfaces: list[str] = field(default_factory=list[str])
    """Names of all interfaces."""


def leave_token(directory: Path) -> str:
    """Write a file into the run's folder that the other nodes look for; gives its name, whether or not that worked."""
    name = f".preflight-{os.getpid()}-{time.time_ns()}"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("seen by every node?", encoding="utf-8")
    return name


def observe(settings: PretrainSettings | EsError, node: int, token: str) -> Facts:
    """Look at everything that this node can find out alone.

    Args:
        settings: of the run, or why they cannot be read here.
        node: number of this node.
        token: name of the file that node 0 left in the run's folder.
    """
    trouble, free = "", None
    if isinstance(settings, EsError):
        manifest, cure = split_error(settings, "correct the settings")
    else:
        manifest, cure = digest_data(settings)
        trouble, free = look_at_folder(settings.run.directory, token)
    interface = os.environ.get(INTERFACE, "")
    packages = {name: installed_version(name) or "not installed" for name in PACKAGES}
    return Facts(
        node=node,
        host=socket.gethostname(),
        versions={"python": platform.python_version(), **packages},
        code=digest_code(PACKAGE),
        manifest=manifest,
        data_cure=cure,
        directory=trouble,
        free_bytes=free,
        interface=interface,
        address=communication.address_of(interface),
        interfaces=communication.interfaces(),
    )


def digest_code(folder: Path) -> str:
    """Digest of the Python files below a folder: checkouts of one version may differ."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def digest_data(settings: PretrainSettings) -> tuple[str, str]:
    """Open the run's data.

    Returns:
        A digest of their manifest and nothing; or what is wrong with them, and the cure.
    """
    from es_megatron.frameworks.megatron_data import load_blend

    try:
        manifest = load_blend(settings.data.blend, settings.model.seq_length).manifest
    except EsError as error:
        return split_error(error, "correct the blend file")
    document = manifest.to_json()
    content = json.dumps(
        [[each[key] for key in ("name", "samples", "weight", "fingerprint")] for each in document["components"]]
    )
    return f"{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()} ({manifest.total:,} samples)", ""


def look_at_folder(directory: Path, token: str) -> tuple[str, int]:
    """What is wrong with the run's folder on this node, and its free bytes."""
    mine = directory / f"{token}-{socket.gethostname()}-{os.getpid()}"
    try:
        if not (directory / token).exists():
            return f"what node 0 wrote into `{directory}` is not there", 0
        mine.write_text("", encoding="utf-8")
        mine.unlink()
        return "", shutil.disk_usage(directory).free
    except OSError as error:
        return f"`{directory}` cannot be written: {error.strerror}", 0


def judge(facts: Sequence[Facts]) -> list[Finding]:
    """Compare what the nodes stated; one finding per question."""
    return [
        judge_same(
            facts, "packages", lambda each: ", ".join(f"{k} {v}" for k, v in each.versions.items()), "install the same"
        ),
        judge_same(facts, "es_megatron", lambda each: f"source {each.code}", "check out the same commit"),
        judge_data(facts),
        judge_folder(facts),
        judge_interfaces(facts),
    ]


def judge_same(facts: Sequence[Facts], what: str, say: Callable[[Facts], str], cure: str) -> Finding:
    """Whether every node states the same.

    Args:
        facts: of all nodes.
        what: is compared.
        say: from a node's facts to what it states of that.
        cure: to be done on every node.
    """
    said = {say(each) for each in facts}
    if len(said) == 1:
        return ok(what, said.pop())
    return fail(what, f"differ: {by_node(facts, say)}", f"{cure} on every node")


def by_node(facts: Sequence[Facts], say: Callable[[Facts], str]) -> str:
    """What each node states, by number and host."""
    return "; ".join(f"node {each.node} ({each.host}): {say(each)}" for each in facts)


def judge_data(facts: Sequence[Facts]) -> Finding:
    """Whether every node reads the same data."""
    broken = [each for each in facts if each.data_cure]
    if broken:
        cures = dict.fromkeys(each.data_cure for each in broken)
        return fail("data", by_node(broken, lambda each: each.manifest), "; ".join(cures))
    return judge_same(facts, "data", lambda each: f"manifest {each.manifest}", "copy the same files, or share them")


def judge_folder(facts: Sequence[Facts]) -> Finding:
    """Whether every node can write to the same folder."""
    broken = [each for each in facts if each.directory]
    if broken:
        cure = "set `run.directory` to a folder that all nodes share and may write to"
        return fail("run directory", by_node(broken, lambda each: each.directory), cure)
    free = [each.free_bytes for each in facts if each.free_bytes is not None]
    if len(free) < len(facts):
        return note("run directory", "not looked at: settings that cannot be read name it", "correct the settings")
    return ok("run directory", f"shared and writable, {min(free) // MEGABYTE:,} MB free")


def judge_interfaces(facts: Sequence[Facts]) -> Finding:
    """Whether the network interface is set, exists, has an address and is the same everywhere."""
    first = facts[0].interface
    if len(facts) == 1:
        return ok(INTERFACE, first or "not needed on one node")
    judged = {
        each.node: communication.judge_interface(INTERFACE, each.interface or None, each.interfaces, several=True)
        for each in facts
    }
    broken = [each for each in facts if judged[each.node].blocks]
    if broken:
        cures = dict.fromkeys(judged[each.node].cure for each in broken)
        return fail(INTERFACE, by_node(broken, lambda each: judged[each.node].told), "; ".join(cures))
    silent = [each for each in facts if not each.address]
    if silent:
        told = by_node(
            silent, lambda each: f"`{each.interface}` has no IPv4 address, there are {', '.join(each.interfaces)}"
        )
        return fail(INTERFACE, told, "set `interface` of the launch settings to the one that joins the nodes")
    if len({each.interface for each in facts}) > 1:
        return judge_same(facts, INTERFACE, lambda each: each.interface, "use the interface of the same name")
    return ok(INTERFACE, f"{first}: {', '.join(each.address for each in facts)}")
