"""What a run around Megatron-Core must not have, found before its first iteration. No megatron is imported."""

from __future__ import annotations

from typing import Any

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError
from es_megatron.frameworks.feed import Rows
from es_megatron.rank_grid import RankGrid
from es_megatron.refusals.model import MODEL
from es_megatron.refusals.table import refuse
from es_megatron.scoring import scorer_of


def check_model(model_config: Any, config: EvolvedSamplingConfig) -> None:
    """Refuse model settings that would score or train wrongly with these settings of Evolved Sampling.

    Args:
        model_config: Megatron-Core's `TransformerConfig`, or Megatron-LM's arguments.
        config: whose arm and scorer decide which rows of the table hold.

    Raises:
        ConfigError: names the setting, why, and the cure.
    """
    refuse(MODEL, lambda name: getattr(model_config, name, None), config)


def check_context(seq_length: int, size: int) -> None:
    """Refuse ranks that cannot share a sequence evenly: upstream cuts it into twice as many pieces, two for each rank.

    Raises:
        ConfigError: names the setting and the sizes that would do.
    """
    if size == 1 or seq_length % (2 * size) == 0:
        return
    fitting = [each for each in range(1, size) if seq_length % (2 * each) == 0] or [1]
    near = max(1, round(seq_length / (2 * size))) * 2 * size
    raise ConfigError(
        f"`context_parallel_size` must divide the sequence into {2 * size} equal pieces (two for each rank), but is "
        f"{size} with `seq_length` {seq_length} instead. Use `context_parallel_size` {fitting[-1]}, or `seq_length` "
        f"{near}."
    )


def check_packing(config: EvolvedSamplingConfig, rows: Rows | None, grid: RankGrid) -> None:
    """Refuse packed rows (with `cu_seqlens`, where their documents begin) where their losses cannot be told apart.

    Raises:
        ConfigError: names the setting and the cure.
    """
    scorer = scorer_of(config)
    if rows is None or not (scorer.shortens or scorer.merges or grid.cp_size > 1) or "cu_seqlens" not in rows[0]:
        return
    if scorer.merges:
        raise ConfigError(
            "`scorer.overlap` must be none with packed rows (`cu_seqlens`), which have not been tried with it."
        )
    if scorer.shortens:
        raise ConfigError(
            "`scorer` must be another one than `prefix` with packed rows (`cu_seqlens`), whose documents would be cut. "
            "Use `history` or `fresh`."
        )
    raise ConfigError(
        f"`context_parallel_size` must be 1 with packed rows (`cu_seqlens`), but is {grid.cp_size} instead: ranks "
        "would share a whole micro-batch, not each of its rows. Use 1, or rows without `cu_seqlens`."
    )


def check_scoring_size(config: EvolvedSamplingConfig, own: int, pipeline: int, virtual: int) -> None:
    """Refuse a scoring micro-batch that does not divide a rank's share or leaves too few for interleaved stages.

    Raises:
        ConfigError: names the sizes that would do.
    """
    size = config.scorer.micro_batch_size
    if size is None:
        return
    multiple = pipeline if virtual > 1 else 1
    if own % size or (own // size) % multiple:
        fitting = [s for s in range(1, own + 1) if own % s == 0 and (own // s) % multiple == 0]
        raise ConfigError(
            f"`scorer.micro_batch_size` must cut a rank's {own} sequences into a multiple of {multiple} "
            f"micro-batches, but is {size} instead. Use one of {fitting}."
        )
