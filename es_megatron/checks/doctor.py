"""Look at this machine before a run: versions, patch targets, data, checkpoint folder, communication."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from es_megatron.checkpoint.compatibility import list_differences
from es_megatron.checkpoint.es_state import read_manifest
from es_megatron.checks.config_report import Wishes, examine
from es_megatron.checks.findings import Severity
from es_megatron.checks.versions import Finding, State, check_versions
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.reading import Hints, read
from es_megatron.errors import EsError
from es_megatron.frameworks.megatron_data import LoadedBlend, load_blend
from es_megatron.patching import PatchList, read_patches, upstreams

GLOO_SECONDS, IMPORT_SECONDS = 60, 180
SPARE_BYTES = 1 << 30
BYTES_PER_SAMPLE = 5

GLOO_TEST = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
value = torch.ones(3)
dist.all_reduce(value)
print(int(value.sum()), flush=True)
os._exit(0)  # gloo's threads may still run, and ending them is not what is tried here
"""

PATCH_TEST = """
import json, sys
from es_megatron.errors import EsError
from es_megatron.run import prepare_cpu
from es_megatron.patching import check, read_patches, untested, upstream_version
try:
    prepare_cpu(sys.argv[1])
except ModuleNotFoundError:
    pass  # what is missing there is told below, target by target
patches = read_patches(sys.argv[1])
try:
    told = [[upstream_version(patches), untested(patches)]]
    told += [[each.patch.target, each.state, each.detail] for each in check(patches)]
except EsError as error:
    told = [str(error)]
print("DOCTOR" + json.dumps(told))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="launch script or settings of the run, as `patch --check` takes them",
    )
    parser.add_argument("--blend", type=Path, help="blend file of the run, to be opened")
    parser.add_argument("--seq-length", type=int, default=2048, metavar="T", help="tokens in a sample (default: 2048)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="folder that checkpoints go to")
    parser.add_argument(
        "--megatron-lm", type=Path, metavar="DIR", help="checkout of Megatron-LM, to look for patch targets"
    )
    parser.add_argument("--megatron-deepspeed", type=Path, metavar="DIR", help="the same of Megatron-DeepSpeed")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Report; returns 1 if something would keep a run from working."""
    blend, data = check_data(arguments.blend, arguments.seq_length)
    checkouts = {"megatron-lm": arguments.megatron_lm, "megatron-deepspeed": arguments.megatron_deepspeed}
    findings = [
        *check_versions(),
        *check_device(),
        *check_patches(checkouts),
        *check_config(arguments.config),
        *data,
        *check_checkpoint(arguments.checkpoint, blend),
        *check_communication(os.environ),
    ]
    failed = sum(finding.state == "FAIL" for finding in findings)
    lines = [finding.line() for finding in findings]
    lines.append(f"{failed} thing{'' if failed == 1 else 's'} to cure" if failed else "nothing to cure")
    print("\n".join(lines))
    return int(failed > 0)


def check_device() -> Iterator[Finding]:
    """GPUs."""
    import torch

    if torch.cuda.is_available():
        yield Finding("OK", "GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    else:
        yield Finding("NOTE", "GPU", "none: runs go over the CPU layer, which is for trying things out")


def check_patches(checkouts: Mapping[str, Path | None]) -> Iterator[Finding]:
    """Whether the names that patches wrap are there, per upstream; each is imported in a process of its own."""
    for upstream in upstreams():
        patches, folder = read_patches(upstream), checkouts.get(upstream)
        what = f"patches {upstream}"
        if folder is None:
            yield Finding(
                "NOTE", what, f"{len(patches.patches)} declared, not checked", f"give `--{upstream} CHECKOUT`"
            )
        elif not (folder / "megatron").is_dir():
            yield Finding(
                "FAIL", what, f"`{folder}` is no checkout: it has no folder `megatron`", "give the checkout's folder"
            )
        else:
            yield judge_patches(what, patches, look_for_targets(upstream, folder))


def look_for_targets(upstream: str, folder: Path) -> list[Any]:
    """[version, what to say if untested], and [target, state, detail] of every patch; or one text: what is wrong."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    try:
        ended = subprocess.run(
            [sys.executable, "-c", PATCH_TEST, upstream],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"importing it took over {IMPORT_SECONDS} s"]
    told = [line for line in ended.stdout.splitlines() if line.startswith("DOCTOR")]
    if not told:
        return ["it cannot be imported: " + (ended.stderr.strip().splitlines() or ["no message"])[-1]]
    return list(json.loads(told[-1].removeprefix("DOCTOR")))


def judge_patches(what: str, patches: PatchList, told: Sequence[Any]) -> Finding:
    """What the targets of an upstream amount to."""
    if len(told) < 2:
        return Finding(
            "FAIL", what, str(told[0]).rstrip("."), "run from the checkout, with its own requirements installed"
        )
    (version, line), bad = told[0], [each for each in told[1:] if each[1] not in ("ready", "applied")]
    if not bad and line is None:
        return Finding("OK", what, f"all {len(told) - 1} targets found in version {version}")
    if not bad:
        found = f"all {len(told) - 1} targets are as declared, but {line}"
        return Finding("NOTE", what, found, "compare a short run with one of `--es-arm plain`")
    shown = bad[:1] if bad[0][1] == "refused" else bad
    details = "; ".join(f"{state}: {detail}" for _, state, detail in shown)
    tested = ", ".join(patches.tested)
    return Finding("FAIL", what, f"version {version}: {details}", f"use a version that was tested ({tested})")


def check_config(path: Path | None) -> Iterator[Finding]:
    """What `patch --check` finds in the settings of a run, and the run itself would refuse."""
    if path is None:
        yield Finding("NOTE", "config", "not checked", "give `--config FILE`")
        return
    try:
        report = examine(path.name, read(path, Hints()), Wishes(EvolvedSamplingConfig(), frozenset()))
    except EsError as error:
        yield Finding("FAIL", f"config {path.name}", str(error).rstrip("."), "correct it, or try `patch --check`")
        return
    states: dict[Severity, State] = {"REFUSE": "FAIL", "NOTE": "NOTE", "OK": "OK"}
    for each in report.findings:
        yield Finding(states[each.severity], f"config {path.name}", f"{each.what}: {each.why}", each.cure)


def check_data(path: Path | None, seq_length: int) -> tuple[LoadedBlend | None, list[Finding]]:
    """Open a blend with every file of it."""
    if path is None:
        return None, [Finding("NOTE", "data", "not checked", "give `--blend FILE`")]
    try:
        blend = load_blend(path, seq_length)
    except EsError as error:
        told, _, cure = str(error).partition(": ")
        return None, [Finding("FAIL", "data", told, cure.rstrip(".") or "correct the blend file")]
    findings = [
        Finding(
            "OK",
            f"data {each.name}",
            f"{each.samples:,} samples of {seq_length} tokens, fingerprint {each.fingerprint[:16]}",
        )
        for each in blend.manifest.components
    ]
    return blend, findings


def check_checkpoint(folder: Path | None, blend: LoadedBlend | None) -> Iterator[Finding]:
    """Whether checkpoints can be written, how much fits, and whether the newest scores belong to the data."""
    if folder is None:
        yield Finding("NOTE", "checkpoint", "not checked", "give `--checkpoint DIR`")
        return
    place = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor.") as file:
            file.write(b"es_megatron")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(
            "FAIL",
            "checkpoint",
            f"`{place}` cannot be written ({error.strerror})",
            "choose another folder, or its owner",
        )
        return
    newest = newest_checkpoint(folder)
    yield judge_space(folder, shutil.disk_usage(place).free, newest, blend)
    if newest is not None:
        yield judge_scores(newest, blend)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest `iter_*` folder with scores in it."""
    found = sorted(folder.glob("iter_*/es_state/manifest.json")) if folder.is_dir() else []
    return found[-1].parents[1] if found else None


def judge_space(folder: Path, free: int, newest: Path | None, blend: LoadedBlend | None) -> Finding:
    """Whether the next checkpoint fits, beside the ones that are there."""
    samples = blend.manifest.total if blend is not None else 0
    needed = (
        sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        if newest
        else BYTES_PER_SAMPLE * samples
    )
    told = f"`{folder}` can be written, {free / 1e9:.1f} GB free"
    told += f", one checkpoint takes {needed / 1e9:.3f} GB" if newest else ""
    if free < needed + SPARE_BYTES:
        return Finding("FAIL", "checkpoint", told, "make room, or choose another disk")
    return Finding("OK", "checkpoint", told)


def judge_scores(newest: Path, blend: LoadedBlend | None) -> Finding:
    """Whether scores that are there are whole, and belong to the blend."""
    what = f"scores {newest.name}"
    try:
        document = read_manifest(newest / "es_state")
    except EsError as error:
        return Finding("FAIL", what, str(error).rstrip("."), "remove this checkpoint; the one before it is used")
    if blend is None:
        return Finding("OK", what, f"{document['samples']:,} samples; not compared with data")
    differences = list_differences(document["data_manifest"], blend.manifest.to_json())
    if differences:
        return Finding(
            "FAIL", what, "; ".join(differences), "go on with the data they were made with, or in another folder"
        )
    return Finding("OK", what, f"{document['samples']:,} samples, of this data")


def check_communication(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Addresses and interfaces that launchers set or need, and a gloo group of one."""
    several = nodes_told(environment) > 1
    yield judge_address(environment.get("MASTER_ADDR"), several)
    names = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        yield judge_interface(variable, environment.get(variable), names, several)
    yield try_gloo()


def nodes_told(environment: Mapping[str, str]) -> int:
    """Number of nodes, as far as the environment tells."""
    for name in ("NNODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "GROUP_WORLD_SIZE"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    world, local = environment.get("WORLD_SIZE", ""), environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(world) // int(local)) if world.isdigit() and local.isdigit() and int(local) else 1


def judge_address(address: str | None, several: bool) -> Finding:
    """Whether MASTER_ADDR leads somewhere other nodes can reach."""
    what = "MASTER_ADDR"
    if address is None:
        if several:
            return Finding(
                "FAIL", what, "not set, but there are several nodes", "set it to the first node's name or address"
            )
        return Finding("OK", what, "not set; one node needs none under `torchrun --standalone`")
    try:
        found = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return Finding(
            "FAIL", what, f"`{address}` cannot be resolved here", "use an address, or correct the name service"
        )
    if several and ipaddress.ip_address(found.partition("%")[0]).is_loopback:
        return Finding(
            "FAIL", what, f"`{address}` is {found}, which other nodes cannot reach", "give the address they see"
        )
    return Finding("OK", what, f"{address} ({found})")


def judge_interface(variable: str, given: str | None, names: Sequence[str], several: bool) -> Finding:
    """Whether the network interface is told where it must be, and exists."""
    usable = [name for name in names if name != "lo"]
    listed = ", ".join(usable) or "none but lo"
    if given is None:
        if several:
            cure = f"set it to the interface between the nodes ({listed})"
            if variable.startswith("NCCL"):
                return Finding("NOTE", variable, "not set: NCCL chooses among the interfaces by itself", cure)
            return Finding("FAIL", variable, "not set: gloo may try 127.0.0.1, and fail after minutes", cure)
        return Finding("OK", variable, "not set; needed with several nodes only")
    # NCCL takes lists and prefixes, and `=`, `^` in front of them; gloo a list of names
    wanted = [name for name in given.lstrip("=^").split(",") if name]
    prefix = variable.startswith("NCCL") and not given.startswith("=")
    if given.startswith("^") or all(any(n.startswith(w) if prefix else n == w for n in names) for w in wanted):
        return Finding("OK", variable, given)
    return Finding("FAIL", variable, f"`{given}` is no interface of this machine", f"use one of: {listed}")


def try_gloo(seconds: float = GLOO_SECONDS) -> Finding:
    """Make a gloo group of one in a process of its own, and reduce over it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = subprocess.run(
                [sys.executable, "-c", GLOO_TEST, f"{folder}/meet"],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Finding(
                "FAIL", "gloo", f"a group of one did not answer within {seconds:g} s", "set GLOO_SOCKET_IFNAME"
            )
    if ended.returncode or ended.stdout.split() != ["3"]:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(
            "FAIL", "gloo", f"a group of one fails: {last}", "set GLOO_SOCKET_IFNAME to an interface that is up"
        )
    return Finding("OK", "gloo", "a group of one adds up")
