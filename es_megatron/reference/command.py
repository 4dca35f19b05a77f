"""Train a reference model, and score every row of a blend with it, for policy `reducible`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from es_megatron.errors import ConfigError
from es_megatron.trainer.command import STOPPED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    actions = parser.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="train a small model on named texts, or on the blend itself")
    train.add_argument("--blend", type=Path, required=True, help="blend file of the run that the reference is for")
    train.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="train on this; repeatable")
    train.add_argument("--train-blend", type=Path, metavar="FILE", help="train on this prepared blend instead")
    train.add_argument("--seq-length", type=int, required=True, help="tokens of a row in that run")
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the reference's run")
    train.add_argument("--config", type=Path, help="YAML file with sections `model` and `training` of the reference")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as model.num_layers=1")
    train.set_defaults(act=_train)
    score = actions.add_parser("score", help="give every row of a blend the loss that a model has of it")
    score.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a run, or of its checkpoint")
    score.add_argument("--blend", type=Path, required=True, help="blend file to score")
    score.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make, or to complete")
    score.add_argument("--tokens", type=int, help="first tokens of a row that count, as scorer `prefix` reads (all)")
    score.add_argument("--micro-batch-size", type=int, help="sequences in a pass (that of the model's run)")
    score.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as parallel.tensor=2")
    score.set_defaults(act=_score)


def run_reference(arguments: argparse.Namespace) -> int:
    """Do what is asked; returns 0."""
    from es_megatron.testing import cpu

    cpu.install()
    from es_megatron.trainer.alarm import ending_soon

    with ending_soon():
        return int(arguments.act(arguments))


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _train(arguments: argparse.Namespace) -> int:
    from es_megatron.reference.overlap import held_out_and_trained
    from es_megatron.reference.training import prepare_texts, reference_settings
    from es_megatron.trainer.loop import Trainer, ending_together

    if arguments.text and arguments.train_blend is not None:
        raise ConfigError("One of `--text` and `--train-blend` must be left out: the reference trains on one of them.")
    blend = arguments.train_blend or arguments.blend
    if arguments.text:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "`--text` must be left out on several ranks. Prepare the texts first (`es-megatron prepare "
                "--tokenizer` with the blend's), and give `--train-blend`."
            )
        blend = prepare_texts(arguments.text, arguments.blend, arguments.output, _say)
    if os.environ.get("RANK", "0") == "0":
        for name, (shared, documents) in held_out_and_trained(arguments.blend, blend).items():
            _say(
                f"WARNING: {shared} of {documents} validation documents of `{name}` stand in the text of the "
                "reference, too, so a choice by it will look better in validation than it is. Leave them out of it."
            )
    settings = reference_settings(blend, arguments.output, arguments.seq_length, arguments.config, arguments.overrides)
    with ending_together() as alarm:
        trainer = Trainer(settings, alarm)
        _say(trainer.size_and_time())
        finished = trainer.run()["finished"]
    if not finished:
        return STOPPED
    _say(
        f"Score a blend with it: es-megatron reference score --model {arguments.output} --blend {arguments.blend} "
        f"--output {arguments.output}-losses"
    )
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from es_megatron.checkpoint.row_scoring import told
    from es_megatron.reference.scoring import score_blend
    from es_megatron.trainer.loop import ending_together

    with ending_together() as alarm:
        done = score_blend(
            arguments.model,
            arguments.blend,
            arguments.output,
            tokens=arguments.tokens,
            micro_batch_size=arguments.micro_batch_size,
            overrides=arguments.overrides,
            say=_say,
            alarm=alarm,
        )
    _say(told(arguments.output, done))
    _say(
        f"Choose by it: evolved_sampling.reference={arguments.output} evolved_sampling.selection.policy=reducible "
        f"(`--es-reference {arguments.output} --es-selection-policy reducible` elsewhere)"
    )
    return 0
