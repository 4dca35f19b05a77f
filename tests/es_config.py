"""Settings by flat names, for tests that change a few of them."""

from __future__ import annotations

from typing import Any

from es_megatron.config import EvolvedSamplingConfig


def es_config(**values: Any) -> EvolvedSamplingConfig:
    """Settings of the preset but for these, such as `es_config(preset="paper", keep_ratio=0.5)`."""
    return EvolvedSamplingConfig.from_mapping(values)
