"""Scores of all samples, partitioned across data-parallel ranks."""

from __future__ import annotations

from es_megatron.scores.store import ScoreStore

__all__ = ["ScoreStore"]
