"""Sizes of a pass that trains a meta-batch and scores the next one."""

from __future__ import annotations

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError
from es_megatron.scoring import scorer_of


def merged_size(config: EvolvedSamplingConfig, seq_length: int, micro_batch: int) -> int:
    """Sequences of a scoring micro-batch where scoring is merged: as many tokens as a training micro-batch has.

    Args:
        config: whose scorer merges.
        seq_length: tokens of a sequence.
        micro_batch: sequences of a training micro-batch.

    Raises:
        ConfigError: the scorer's tokens do not divide the sequence, or another size is asked for.
    """
    tokens, size = scorer_of(config).tokens(seq_length), config.scorer.micro_batch_size
    if seq_length % tokens:
        raise ConfigError(
            f"`scorer.prefix_share` must cut sequences of {seq_length} tokens evenly with `scorer.overlap: merged`, "
            f"but makes {tokens} tokens of them instead. Use a share such as 1/4 or 1/8, or leave `overlap` out."
        )
    if size is not None:
        raise ConfigError(
            "`scorer.micro_batch_size` must be left out with `scorer.overlap: merged`, since a scoring micro-batch "
            f"has as many tokens there as a training one, but is {size} instead. Leave it out."
        )
    return micro_batch * (seq_length // tokens)


def check_merged(config: EvolvedSamplingConfig, seq_length: int, own: int, micro_batch: int, multiple: int) -> None:
    """Refuse a merged scorer whose micro-batches do not fit into the training schedule.

    Args:
        config: of the run.
        seq_length: tokens of a sequence.
        own: sequences of a meta-batch on one data-parallel rank.
        micro_batch: sequences of a training micro-batch.
        multiple: what micro-batches of a rank must be a multiple of.

    Raises:
        ConfigError: names the setting and the cure.
    """
    if not scorer_of(config).merges:
        return
    size = merged_size(config, seq_length, micro_batch)
    if own % (size * multiple):
        raise ConfigError(
            f"`scorer.overlap` must be `none` here: scoring micro-batches of {size} sequences do not cut a rank's "
            f"{own} into a multiple of {multiple}. Use a larger `prefix_share` or meta-batch, or leave `overlap` out."
        )
