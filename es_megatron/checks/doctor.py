"""Look at this machine before a run: versions, patch targets, settings, data, checkpoint folder, communication."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from es_megatron.checks.communication import check_communication
from es_megatron.checks.config_report import Wishes, examine
from es_megatron.checks.findings import Finding, blocking, fail, note, ok, report
from es_megatron.checks.gloo import try_alone
from es_megatron.checks.storage import check_checkpoint, check_data, check_hashes
from es_megatron.checks.targets import check_targets
from es_megatron.checks.versions import check_versions
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.reading import Hints, read
from es_megatron.errors import EsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="launch script or settings of the run, as `patch --check` takes them",
    )
    parser.add_argument("--blend", type=Path, help="blend file of the run, to be opened")
    parser.add_argument(
        "--hash", action="store_true", help="read the blend's files from end to end: about a second for each GB"
    )
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
        check_device(),
        *check_targets(checkouts),
        *check_config(arguments.config),
        *data,
        *check_hashes(blend, read=arguments.hash),
        *check_checkpoint(arguments.checkpoint, blend),
        *check_communication(os.environ),
        try_alone(),
    ]
    failed = len(blocking(findings))
    print(report(findings, [f"{failed} thing{'' if failed == 1 else 's'} to cure" if failed else "nothing to cure"]))
    return int(failed > 0)


def check_device() -> Finding:
    """GPUs."""
    import torch

    if torch.cuda.is_available():
        return ok("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return note("GPU", "none: runs go over the CPU layer, which is for trying things out")


def check_config(path: Path | None) -> Iterator[Finding]:
    """What `patch --check` finds in the settings of a run; what it refuses, the run itself would end on."""
    if path is None:
        yield note("config", "not checked", "give `--config FILE`")
        return
    what = f"config {path.name}"
    try:
        found = examine(path.name, read(path, Hints()), Wishes(EvolvedSamplingConfig(), frozenset())).findings
    except EsError as error:
        yield fail(what, str(error).rstrip("."), "correct it, or try `patch --check`")
        return
    for each in found:
        yield replace(each, severity="FAIL" if each.blocks else each.severity, what=f"{what}: {each.what}")
