"""Check every host of a run before it starts, and tell in one report what would go wrong.

One process per node, under the launcher the run will have. Nodes meet at a key-value store on the run's own master
address and port, which needs no network interface to be set: so a wrong interface is told rather than waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es_megatron.errors import EsError, LayoutError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PACKAGES = ("torch", "numpy", "megatron-core", "deepspeed", "sentencepiece", "safetensors")
PACKAGE = Path(__file__).resolve().parents[1]
INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915
GLOO_SECONDS = 60
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What one node says of itself; everything is JSON-able."""

    node: int
    host: str
    versions: dict[str, str]
    """By package; "not installed" where it is not."""
    code: str
    """Digest of this package's source files."""
    manifest: str
    """Digest of the data manifest, or what is wrong with the data."""
    data_ok: bool
    directory: str
    """What is wrong with the run's folder, or nothing."""
    free_bytes: int
    interface: str
    """Name that `GLOO_SOCKET_IFNAME` gives, or nothing."""
    address: str
    """IPv4 address of that interface, or nothing."""
    interfaces: list[str] = field(default_factory=list[str])
    """Names of all interfaces."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    ok: bool
    what: str
    said: str
    """What was found, or what is wrong and the cure."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--config", required=True, help="settings of the run, as `pretrain` takes them")
    parser.add_argument("--backend", choices=("megatron", "deepspeed"), help="short for backend=NAME")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for the other nodes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def run_preflight(arguments: argparse.Namespace) -> int:
    """Check this node and, with the others, the whole run; returns 0 if it may start."""
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return 0
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    node, nodes = (int(os.environ.get(name, last)) // per_node for name, last in (("RANK", "0"), ("WORLD_SIZE", "1")))
    store = meet(node, nodes, arguments.timeout) if nodes > 1 else None
    settings = read_settings(arguments)
    folder = Path() if isinstance(settings, str) else settings.run.directory
    token = tell(store, "token", node, lambda: leave_token(folder))
    facts = gather(store, node, nodes, observe(settings, node, token))
    findings = judge(facts)
    if store is not None and all(finding.ok for finding in findings):
        findings.append(try_gloo(store, node, nodes))
        failed = [other for other in gather(store, node, nodes, findings[-1], "gloo") if not other.ok]
        findings[-1:] = failed[:1] or findings[-1:]
    if node == 0:
        print(report(findings, nodes), flush=True)
        with contextlib.suppress(OSError):
            (folder / token).unlink()
    return 0 if all(finding.ok for finding in findings) else 1


def read_settings(arguments: argparse.Namespace) -> Any:
    """Settings of the run, or what is wrong with them on this node: the others must hear of it."""
    from es_megatron.trainer.settings import load_settings

    overrides = [*arguments.overrides, *([f"backend={arguments.backend}"] if arguments.backend else [])]
    try:
        return load_settings(arguments.config, overrides)
    except EsError as error:
        return str(error)


def meet(node: int, nodes: int, timeout: float) -> TCPStore:
    """Open the store that all nodes use, on the port that the run will have.

    Raises:
        LayoutError: the port is taken, or the master or another node does not answer.
    """
    import torch.distributed as dist

    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    hosts = node == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(host, port, is_master=hosts, timeout=timedelta(seconds=timeout), wait_for_workers=False)
        store.set(f"es/here/{node}", "yes")
        store.wait([f"es/here/{other}" for other in range(nodes)], timedelta(seconds=timeout))
    except (dist.DistError, RuntimeError, OSError) as error:
        said = str(error).splitlines()[0][:200]
        cure = (
            "another program has that port: end it, or choose another `master_port`; or not every node was started"
            if node == 0
            else "check `master_addr` and the firewall"
        )
        raise LayoutError(f"Node {node} cannot meet the others at {host}:{port} ({said}): {cure}.") from error
    return store


def tell(store: TCPStore | None, key: str, node: int, make: Callable[[], str]) -> str:
    """What `make` gives on node 0, on every node."""
    if store is None:
        return make()
    if node == 0:
        store.set(f"es/{key}", make())
    return store.get(f"es/{key}").decode()


def gather(store: TCPStore | None, node: int, nodes: int, value: Any, key: str = "facts") -> list[Any]:
    """The dataclass objects of all nodes, by node."""
    if store is None:
        return [value]
    store.set(f"es/{key}/{node}", json.dumps(asdict(value)))
    found = [type(value)(**json.loads(store.get(f"es/{key}/{other}"))) for other in range(nodes)]
    store.set(f"es/{key}/read/{node}", "yes")
    store.wait([f"es/{key}/read/{other}" for other in range(nodes)])  # the node that hosts it leaves last
    return found


def leave_token(directory: Path) -> str:
    """Write a file into the run's folder that the other nodes look for; gives its name, whether or not that worked."""
    name = f".preflight-{os.getpid()}-{time.time_ns()}"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("seen by every node?", encoding="utf-8")
    return name


def observe(settings: Any, node: int, token: str) -> Facts:
    """Look at everything this node can tell alone."""
    interface = os.environ.get(INTERFACE, "")
    manifest, data_ok, trouble, free = str(settings), False, "", 0
    if not isinstance(settings, str):
        manifest, data_ok = digest_data(settings)
        trouble, free = look_at_folder(settings.run.directory, token)
    return Facts(
        node=node,
        host=socket.gethostname(),
        versions={"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        code=digest_code(PACKAGE),
        manifest=manifest,
        data_ok=data_ok,
        directory=trouble,
        free_bytes=free,
        interface=interface,
        address=address_of(interface),
        interfaces=[name for _, name in socket.if_nameindex()],
    )


def version_of(package: str) -> str:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def digest_code(folder: Path) -> str:
    """Digest of the Python files below a folder: checkouts of one version may differ."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def digest_data(settings: Any) -> tuple[str, bool]:
    """Digest of the manifest of the run's data, or what is wrong with them."""
    from es_megatron.frameworks.megatron_data import load_blend

    try:
        manifest = load_blend(settings.data.blend, settings.model.seq_length).manifest
    except EsError as error:
        return str(error), False
    document = manifest.to_json()
    content = json.dumps(
        [[each[key] for key in ("name", "samples", "weight", "fingerprint")] for each in document["components"]]
    )
    return f"{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()} ({manifest.total:,} samples)", True


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


def address_of(interface: str) -> str:
    """IPv4 address of a network interface, empty if it has none or does not exist."""
    if not interface:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
    return ""


def judge(facts: Sequence[Facts]) -> list[Finding]:
    """Compare what the nodes said; one finding per question."""
    return [
        judge_same(
            facts, "packages", lambda each: ", ".join(f"{k} {v}" for k, v in each.versions.items()), "Install the same"
        ),
        judge_same(facts, "es_megatron", lambda each: f"source {each.code}", "Check out the same commit"),
        judge_data(facts),
        judge_folder(facts),
        judge_interface(facts),
    ]


def judge_same(facts: Sequence[Facts], what: str, say: Callable[[Facts], str], cure: str) -> Finding:
    """Whether every node says the same."""
    said = {say(each) for each in facts}
    if len(said) == 1:
        return Finding(True, what, said.pop())
    return Finding(False, what, f"differ: {by_node(facts, say)}. {cure} on every node.")


def by_node(facts: Sequence[Facts], say: Callable[[Facts], str]) -> str:
    """What each node says, by number and host."""
    return "; ".join(f"node {each.node} ({each.host}): {say(each)}" for each in facts)


def judge_data(facts: Sequence[Facts]) -> Finding:
    """Whether every node reads the same data."""
    broken = [each for each in facts if not each.data_ok]
    if broken:
        return Finding(False, "data", by_node(broken, lambda each: each.manifest))
    return judge_same(facts, "data", lambda each: f"manifest {each.manifest}", "Copy the same files, or share them")


def judge_folder(facts: Sequence[Facts]) -> Finding:
    """Whether every node can write to the same folder."""
    broken = [each for each in facts if each.directory]
    if broken:
        return Finding(
            False,
            "run directory",
            f"{by_node(broken, lambda each: each.directory)}. It must be on a file system that all nodes share and "
            "may write to; set `run.directory`.",
        )
    return Finding(
        True, "run directory", f"shared and writable, {min(each.free_bytes for each in facts) // MEGABYTE:,} MB free"
    )


def judge_interface(facts: Sequence[Facts]) -> Finding:
    """Whether the network interface is set, exists and is the same everywhere."""
    what = "network interface"
    if len(facts) == 1:
        return Finding(True, what, facts[0].interface or "not needed on one node")
    unset = [each for each in facts if not each.interface]
    if unset:
        return Finding(
            False,
            what,
            f"{INTERFACE} is not set on {', '.join(f'node {each.node}' for each in unset)}: gloo would choose "
            f"127.0.0.1 and wait for minutes. Set `interface` to one of: "
            f"{by_node(unset, lambda each: ', '.join(each.interfaces))}.",
        )
    silent = [each for each in facts if not each.address]
    if silent:
        told = by_node(
            silent, lambda each: f"`{each.interface}` has no IPv4 address, there are {', '.join(each.interfaces)}"
        )
        return Finding(False, what, f"{told}. Set `interface` to the one that joins the nodes.")
    if len({each.interface for each in facts}) > 1:
        return judge_same(facts, what, lambda each: each.interface, "Use the interface of the same name")
    return Finding(True, what, f"{facts[0].interface}: {', '.join(each.address for each in facts)}")


def try_gloo(store: TCPStore, node: int, nodes: int) -> Finding:
    """Sum a number over the nodes, through the interface the run will use."""
    import torch
    import torch.distributed as dist

    what = "gloo between nodes"
    limit = timedelta(seconds=GLOO_SECONDS)
    try:
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("es/gloo/", store), rank=node, world_size=nodes, timeout=limit
        )
        began = time.perf_counter()
        total = torch.ones(1)
        dist.all_reduce(total)
        milliseconds = 1e3 * (time.perf_counter() - began)
        dist.destroy_process_group()
    except (dist.DistError, RuntimeError) as error:
        return Finding(
            False, what, f"node {node}: {str(error).splitlines()[0][:200]}. Check the firewall and `interface`."
        )
    return Finding(int(total) == nodes, what, f"a sum over {nodes} nodes took {milliseconds:.1f} ms")


def report(findings: Sequence[Finding], nodes: int) -> str:
    """The findings as lines."""
    lines = [f"pre-flight of {nodes} node{'s' if nodes > 1 else ''}"]
    lines += [f"  {'OK  ' if finding.ok else 'FAIL'}  {finding.what:20} {finding.said}" for finding in findings]
    failed = sum(not finding.ok for finding in findings)
    lines.append("  may start" if not failed else f"  {failed} of {len(findings)} checks failed: do not start")
    return "\n".join(lines)
