"""Checkpoints of the ES state, and the directory of a run's checkpoints. No framework is needed to read them."""

from __future__ import annotations

from es_megatron.checkpoint.compatibility import check_manifest
from es_megatron.checkpoint.es_state import EsState, SaveReport, ScoreRange, load_es_state, save_es_state
from es_megatron.checkpoint.rotation import CheckpointDirectory

__all__ = [
    "CheckpointDirectory",
    "EsState",
    "SaveReport",
    "ScoreRange",
    "check_manifest",
    "load_es_state",
    "save_es_state",
]
