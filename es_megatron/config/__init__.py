"""Settings of Evolved Sampling in groups, checked once at construction, and their readers."""

from __future__ import annotations

from es_megatron.config.fields import require, require_choice
from es_megatron.config.groups import (
    Correction,
    GuardSettings,
    Mixture,
    OrderSettings,
    PruningSettings,
    ReferenceSettings,
    ScorerSettings,
    ScoreSettings,
    SelectionSettings,
)
from es_megatron.config.reading import build
from es_megatron.config.settings import PRESET_NAMES, EvolvedSamplingConfig

__all__ = [
    "PRESET_NAMES",
    "Correction",
    "EvolvedSamplingConfig",
    "GuardSettings",
    "Mixture",
    "OrderSettings",
    "PruningSettings",
    "ReferenceSettings",
    "ScoreSettings",
    "ScorerSettings",
    "SelectionSettings",
    "build",
    "require",
    "require_choice",
]
