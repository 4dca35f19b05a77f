"""Tell what a run will cost and save, before it is launched."""

from __future__ import annotations

import argparse
import json

from es_megatron.forecast.request import read_request
from es_megatron.frameworks import arguments as flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, shares of 1")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="print what scoring saves over pipeline sizes and micro-batches instead, whatever the run (--pipeline, "
        "--virtual, --recompute, --backward-over-forward and --es-selection-keep-ratio count)",
    )
    run = parser.add_argument_group("the run", "From a settings file, whose values the flags win over, or flags alone.")
    run.add_argument("--config", metavar="FILE", help="YAML settings of `es-megatron pretrain`")
    run.add_argument("--samples", type=_count, metavar="N", help="samples of the data, if the blend is not there")
    run.add_argument(
        "--component",
        action="append",
        metavar="NAME:SAMPLES[:WEIGHT]",
        help="a component of the blend and its share of draws (default: by size); may be given several times",
    )
    length = run.add_mutually_exclusive_group()
    length.add_argument("--passes", type=float, metavar="N", help="how often the samples are drawn (default: 1)")
    length.add_argument("--train-samples", type=_count, metavar="N", help="draws of the plain run")
    run.add_argument("--lr", type=float, help="highest learning rate of the plain run")
    layout = parser.add_argument_group("batch and layout")
    layout.add_argument("--seq-length", type=int, metavar="T", help="tokens of a sample")
    layout.add_argument("--global-batch-size", type=int, metavar="B", help="samples of a meta-batch")
    layout.add_argument("--micro-batch-size", type=int, metavar="N", help="samples of a training micro-batch")
    layout.add_argument("--world-size", type=int, metavar="N", help="ranks of the run")
    layout.add_argument("--data-parallel", type=int, metavar="N", help="data-parallel ranks, instead of --world-size")
    layout.add_argument("--tensor", type=int, metavar="N", help="ranks that share each layer")
    layout.add_argument("--pipeline", type=int, metavar="N", help="pipeline stages")
    layout.add_argument("--virtual", type=int, metavar="N", help="model chunks of each stage, interleaved")
    layout.add_argument("--recompute", choices=("none", "full"), help="full: layers run again in the backward pass")
    layout.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="ranks of a node (default: 8)")
    speed = parser.add_argument_group("speed", "What is measured wins over what is estimated.")
    speed.add_argument("--parameters", type=float, metavar="N", help="of the model, such as 7e9")
    speed.add_argument(
        "--flops-per-gpu", type=float, metavar="N", help="operations a second that a GPU reaches, such as 4e14"
    )
    speed.add_argument(
        "--backward-over-forward", type=float, metavar="R", help="measured ratio, as in the trainer's calibrated line"
    )
    speed.add_argument(
        "--forward-seconds", type=float, metavar="S", help="measured forward of a training micro-batch on one stage"
    )
    speed.add_argument(
        "--scoring-forward-seconds", type=float, metavar="S", help="measured forward of a scoring micro-batch"
    )
    flags.add_arguments(parser)


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the forecast; returns 0."""
    if arguments.sweep:
        from es_megatron.forecast.sweep import run_sweep

        text, found_cells = run_sweep(arguments)
        print(json.dumps(found_cells, indent=1) if arguments.json else text)
        return 0
    request = read_request(arguments)
    from es_megatron.forecast.forecast import forecast
    from es_megatron.forecast.text import document, told

    found = forecast(request)
    print(json.dumps(document(request, found), indent=1) if arguments.json else told(request, found))
    return 0


def _count(text: str) -> int:
    """A whole number that may be written as 3.7e9."""
    number = float(text)
    if number != int(number) or number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, but is {text!r}")
    return int(number)
