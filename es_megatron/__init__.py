"""Evolved Sampling for language-model pretraining with Megatron-Core and DeepSpeed.

Importing this package changes nothing: frameworks are only touched by what you call.
"""

from __future__ import annotations

from es_megatron.config import EvolvedSamplingConfig

__version__ = "0.1.0"

__all__ = ["EvolvedSamplingConfig", "__version__"]
