"""Evolved Sampling in a run of Megatron-DeepSpeed; its patches call these functions beside those of `megatron_lm`.

Its training loop is that of an old Megatron-LM with a DeepSpeed engine in the model's place. Without DeepSpeed's
pipeline (`--no-pipeline-parallel`) the schedule is Megatron's, and the hook for Megatron-Core serves; with it
`train_batch` of the `PipelineEngine` is what trains, and the hook for that one serves.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from es_megatron.algorithm.policies import POLICIES
from es_megatron.checkpoint.sealed import parse_json
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.data.manifest import Manifest
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.frameworks import megatron_lm
from es_megatron.frameworks.megatron_lm_data import (
    ComponentRows,
    Sources,
    SplitRows,
    check_parts,
    upstream_parts,
    weigh_sources,
)
from es_megatron.frameworks.megatron_lm_settings import StartingPoint, check_pruner, refuse_arguments
from es_megatron.refusals.megatron_deepspeed import MEGATRON_DEEPSPEED
from es_megatron.refusals.megatron_lm import MEGATRON_LM
from es_megatron.scoring import scorer_of


def check_settings(args: Namespace, config: EvolvedSamplingConfig) -> None:
    """Refuse what cannot work, or has not been tried.

    Raises:
        ConfigError: names the flag, why, and the cure.
    """
    if getattr(args, "es_score_reference", None) is not None:
        raise ConfigError(
            "`--es-score-reference` must be left out with Megatron-DeepSpeed. Make the losses with Megatron-LM, or "
            "with `es-megatron reference score`."
        )
    refuse_arguments(args, (*MEGATRON_LM, *MEGATRON_DEEPSPEED), config)
    check_pruner(config)
    if scorer_of(config).merges:
        raise ConfigError(
            "`--es-scorer-overlap` must be none on Megatron-DeepSpeed, but is merged instead: it has not been tried. "
            "Leave it out."
        )
    if scorer_of(config).shortens or POLICIES.make(config.selection.policy, config.policy_options).needs_norm:
        raise ConfigError(
            "`--es-scorer prefix` and `--es-selection-policy grad-norm` have not been tried on Megatron-DeepSpeed. "
            "Use others."
        )
    if not args.deepspeed:
        raise ConfigError(
            "`--deepspeed` must be given with Evolved Sampling on Megatron-DeepSpeed. Give it, or use Megatron-LM."
        )
    count_tokens(args)


def count_tokens(args: Namespace) -> None:
    """Turn a length in tokens into one in samples, as the plan and upstream's learning-rate schedule need it.

    Raises:
        ConfigError: less than one sample.
    """
    tokens = getattr(args, "train_tokens", None)
    if not tokens:
        return
    if tokens < args.seq_length:
        raise ConfigError(
            f"`--train-tokens` must be at least a sequence of {args.seq_length} tokens, but is {tokens} instead. "
            "Raise it."
        )
    args.train_samples, args.train_tokens = tokens // args.seq_length, None


def read_sources(args: Namespace) -> Sources:
    """Find the training files, their weights, and the part of each that is for training.

    Raises:
        ConfigError: no files, or the same file twice.
    """
    given: list[str] | None = args.data_path or args.train_data_path
    if not given:
        raise ConfigError("`--data-path` or `--train-data-path` must be given with Evolved Sampling, but neither is.")
    weights = [float(weight) for weight in given[::2]] if len(given) > 1 else None
    files = weigh_sources(given[1::2] if weights else given, weights)
    return Sources(files, (lambda n: training_documents(args.split, n)) if args.data_path else (lambda n: n))


def training_documents(split: str, documents: int) -> int:
    """Documents of the training split; what rounding leaves over is taken off it, as upstream does."""
    parts = [float(part) for part in split.replace("/", ",").split(",")]
    parts = [*parts, 0.0, 0.0][:3]
    counts = [round(part / sum(parts) * documents) for part in parts]
    return counts[0] - (sum(counts) - documents)


class TextRows:
    """Samples of a component: the tokens alone, from which Megatron-DeepSpeed makes the rest."""

    def __init__(self, rows: SplitRows) -> None:
        """Take the rows of the component."""
        self._rows = rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Read `text`, int64 [T + 1]."""
        return {"text": torch.from_numpy(self._rows.window(row))}


def make_samples(manifest: Manifest, rows: list[SplitRows], dataset: Any) -> ComponentRows:
    """Check that upstream's training split has the documents of ours, and give samples of those.

    Raises:
        ConfigError: another kind of dataset.
        DataError: upstream takes other documents.
    """
    theirs = [(int(part.doc_idx.min()), int(part.doc_idx.max()) + 1) for part in upstream_parts(dataset)]
    check_parts([(0, each.sequences) for each in rows], theirs)
    return ComponentRows(manifest, [TextRows(each) for each in rows])


def find_start(args: Namespace) -> StartingPoint:
    """Find the tag that DeepSpeed is going to load, and the scores in it.

    Raises:
        CheckpointError: its name does not tell the iteration.
    """
    latest = Path(args.load or ".") / "latest"
    if not args.load or args.finetune or not (args.load_tag or latest.is_file()):
        return StartingPoint(0, None, 0)
    tag = args.load_tag or latest.read_text(encoding="utf-8").strip()
    found = re.fullmatch(r"global_step(\d+)", tag)
    if found is None:
        raise CheckpointError(
            f"The tag to load must be `global_step` and a number, but is {tag!r} instead. Use another."
        )
    folder = Path(args.load) / tag / "es_state"
    if not (folder / "manifest.json").is_file():
        return StartingPoint(int(found[1]), None, int(found[1]))
    state = parse_json((folder / "state.json").read_bytes(), folder / "state.json")
    return StartingPoint(int(found[1]), str(folder), int(state["started_at"]))


def model_settings(args: Namespace) -> Any:
    """What of the model's settings scoring depends on."""
    return SimpleNamespace(context_parallel_size=args.ds_sequence_parallel_size)


DIALECT = megatron_lm.Dialect(
    home="megatron.global_vars",
    check=check_settings,
    read_sources=read_sources,
    make_samples=make_samples,
    find_start=find_start,
    model_config=model_settings,
    state_folder=lambda args, iteration: Path(args.save) / f"global_step{iteration}" / "es_state",
)


def wrap_schedule(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Put scoring and choosing around Megatron's schedule; the engine accumulates over what is trained."""
    from es_megatron.frameworks.deepspeed_accumulation import accumulating

    def accumulated(**call: Any) -> Any:
        if call.get("forward_only", False):
            return schedule(**call)
        with accumulating(call["model"][0], call["num_microbatches"]):
            return schedule(**call)

    return megatron_lm.wrap_schedule(accumulated) if megatron_lm.active() is not None else schedule


@contextmanager
def pipeline_taken(deepspeed: Any) -> Generator[None]:
    """Have a `PipelineEngine` train on the chosen sequences when the training loop calls its `train_batch`."""
    run = megatron_lm.active()
    if run is None or not hasattr(deepspeed, "grid"):
        yield
        return
    from es_megatron.frameworks.megatron_deepspeed_pipe import pipeline_of

    engine, feed = run.sampling.engine, run.sampling.feed
    pipeline = pipeline_of(engine, feed, deepspeed)

    def train_batch(data_iter: Any = None) -> Any:
        del deepspeed.train_batch  # the engine's own is called below this
        batch = engine.draw()
        if feed is not None:
            feed.fetch(batch)
        engine.step(batch, pipeline)
        return deepspeed.agg_train_loss

    deepspeed.train_batch = train_batch
    try:
        yield
    finally:
        vars(deepspeed).pop("train_batch", None)
