"""Whether gloo adds up: in a group of one for `doctor`, between the nodes of a run for `preflight`.

`python -m es_megatron.checks.gloo FILE` makes the group of one, which meets at FILE, and prints the sum.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from es_megatron.checks.findings import Finding, fail, ok

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SECONDS = 60
"""Limit for a group to meet and add up."""

CURE = "set GLOO_SOCKET_IFNAME to an interface that is up"


def add_up(rank: int, ranks: int, **meeting: Any) -> tuple[int, float]:
    """Sum a one of every rank over a gloo group, which becomes the default group of this process.

    Args:
        rank: of this process, in [0, ranks).
        ranks: processes in the group.
        meeting: where they meet, as `init_process_group` takes it: `init_method` or `store`.

    Returns:
        The sum, which is `ranks` if all is well, and the milliseconds that it took.

    Raises:
        RuntimeError: no interface can be used, or another rank does not answer; torch's `DistError` is one.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS), **meeting)
    began = time.perf_counter()
    total = torch.ones(1)
    dist.all_reduce(total)
    return int(total), 1e3 * (time.perf_counter() - began)


def try_alone(seconds: float = SECONDS) -> Finding:
    """Add up in a group of one.

    Args:
        seconds: limit. A group that hangs cannot be ended from within, so it is made in a process of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "es_megatron.checks.gloo", f"{folder}/meet"],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return fail("gloo", f"a group of one did not answer within {seconds:g} s", CURE)
    if ended.returncode or ended.stdout.split() != ["1"]:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        return fail("gloo", f"a group of one fails: {last.rstrip('.')}", CURE)
    return ok("gloo", "a group of one adds up")


def try_between(store: TCPStore, node: int, nodes: int) -> Finding:
    """Add up over the nodes, through the interface that the run will use.

    Args:
        store: that all nodes have met at.
        node: number of this one, in [0, nodes).
        nodes: of the run.
    """
    import torch.distributed as dist

    what, cure = "gloo between nodes", "check the firewall and `interface`"
    try:
        total, milliseconds = add_up(node, nodes, store=dist.PrefixStore("es/gloo/", store))
        dist.destroy_process_group()
    except RuntimeError as error:
        return fail(what, f"node {node}: {str(error).splitlines()[0][:200].rstrip('.')}", cure)
    if total != nodes:
        return fail(what, f"node {node}: a sum of ones over {nodes} nodes is {total}", cure)
    return ok(what, f"a sum over {nodes} nodes took {milliseconds:.1f} ms")


if __name__ == "__main__":
    print(add_up(0, 1, init_method=f"file://{sys.argv[1]}")[0], flush=True)
    os._exit(0)  # gloo's threads may still run, and ending them is not what is tried here
