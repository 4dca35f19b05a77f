"""The `es-megatron` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from es_megatron.errors import EsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; a user's mistake prints one line and returns 2."""
    parser = argparse.ArgumentParser(prog="es-megatron", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    from es_megatron import run
    from es_megatron.bench import command as compare
    from es_megatron.bench import demo
    from es_megatron.checks import doctor, preflight
    from es_megatron.config_patch import command as patch
    from es_megatron.config_patch import undo
    from es_megatron.forecast import command as plan
    from es_megatron.launch import command as launch
    from es_megatron.prepare import command as prepare
    from es_megatron.reference import command as reference
    from es_megatron.report import command as report
    from es_megatron.score_files import command as scores
    from es_megatron.trainer import command as pretrain

    for name, module, function in (
        ("prepare", prepare, prepare.run_prepare),
        ("pretrain", pretrain, pretrain.run_pretrain),
        ("demo", demo, demo.run_demo),
        ("compare", compare, compare.run_compare),
        ("plan", plan, plan.run_plan),
        ("report", report, report.run_report),
        ("run", run, run.run_script),
        ("launch", launch, launch.run_launch),
        ("preflight", preflight, preflight.run_preflight),
        ("patch", patch, patch.run_patch),
        ("unpatch", undo, undo.run_unpatch),
        ("doctor", doctor, doctor.run_doctor),
        ("scores", scores, scores.run_scores),
        ("reference", reference, reference.run_reference),
    ):
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=function)
    parsed = parser.parse_args(arguments)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(parsed.run(parsed))
    except EsError as error:
        print(f"es-megatron {parsed.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
