"""Check every host of a run before it starts, and report at once what would go wrong.

One process per node, under the launcher the run will have. Nodes meet at a key-value store on the run's own master
address and port, which needs no network interface to be set: so a wrong interface is told rather than waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from es_megatron.checks.findings import Finding, blocking, report
from es_megatron.checks.gloo import try_between
from es_megatron.checks.nodes import Facts, judge, leave_token, observe
from es_megatron.errors import EsError, LayoutError
from es_megatron.trainer.launched import launched_ranks

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from es_megatron.trainer.settings import PretrainSettings

Stated = TypeVar("Stated", Facts, Finding)


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
    ranks = launched_ranks(os.environ)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    node, nodes = int(os.environ.get("RANK") or 0) // per_node, ranks // per_node
    store = meet(node, nodes, arguments.timeout) if nodes > 1 else None
    settings = read_settings(arguments)
    folder = Path() if isinstance(settings, EsError) else settings.run.directory
    token = broadcast(store, "token", node, lambda: leave_token(folder))
    findings = judge(gather(store, node, nodes, observe(settings, node, token)))
    if store is not None and not blocking(findings):
        finding = try_between(store, node, nodes)
        failed = blocking(gather(store, node, nodes, finding, "gloo"))
        findings.append(failed[0] if failed else finding)
    failed = len(blocking(findings))
    if node == 0:
        tail = f"{failed} of {len(findings)} checks failed: do not start" if failed else "may start"
        print(report(findings, [tail], f"pre-flight of {nodes} node{'s' if nodes > 1 else ''}"), flush=True)
        with contextlib.suppress(OSError):
            (folder / token).unlink()
    return int(failed > 0)


def read_settings(arguments: argparse.Namespace) -> PretrainSettings | EsError:
    """Settings of the run, or what is wrong with them on this node: the others must hear of it."""
    from es_megatron.trainer.settings import load_settings

    overrides = [*arguments.overrides, *([f"backend={arguments.backend}"] if arguments.backend else [])]
    try:
        return load_settings(arguments.config, overrides)
    except EsError as error:
        return error


def meet(node: int, nodes: int, timeout: float) -> TCPStore:
    """Open the store that all nodes use, on the port that the run will have.

    Args:
        node: number of this one, in [0, nodes).
        nodes: of the run.
        timeout: seconds to wait for the others.

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


def broadcast(store: TCPStore | None, key: str, node: int, make: Callable[[], str]) -> str:
    """What `make` gives on node 0, on every node; without a store there is one node."""
    if store is None:
        return make()
    if node == 0:
        store.set(f"es/{key}", make())
    return store.get(f"es/{key}").decode()


def gather(store: TCPStore | None, node: int, nodes: int, value: Stated, key: str = "facts") -> list[Stated]:
    """What all nodes state, by node; without a store there is one node.

    Node 0, which hosts the store, leaves last: it alone waits for the others, who ask for nothing any more by then.
    """
    if store is None:
        return [value]
    store.set(f"es/{key}/{node}", json.dumps(asdict(value)))
    found = [type(value)(**json.loads(store.get(f"es/{key}/{other}"))) for other in range(nodes)]
    store.set(f"es/{key}/read/{node}", "yes")
    if node == 0:
        store.wait([f"es/{key}/read/{other}" for other in range(nodes)])
    return found
