"""Evolved Sampling for Megatron-Bridge: `pretrain(config, forward_step, callbacks=[evolve(...)])`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.frameworks import megatron_bridge
from es_megatron.patching import patch_and_report


def evolve(config: EvolvedSamplingConfig | None = None, audit: Path | None = None) -> Any:
    """Patch Megatron-Bridge, and make the callback that the next `pretrain` of this process is to be given.

    Args:
        config: settings; None: the defaults.
        audit: file for the chosen ids of each iteration, as lines of JSON.

    Returns:
        A Megatron-Bridge `Callback`.

    Raises:
        PatchError: Bridge is not as the patches rely on; nothing is changed then.
    """
    patch_and_report("megatron-bridge")
    megatron_bridge.prepare(config or EvolvedSamplingConfig(), audit)
    callbacks: Any = importlib.import_module("megatron.bridge.training.callbacks")

    class EvolvedSamplingCallback(callbacks.Callback):
        """Bridge finds its events by the names of the methods."""

        def on_train_start(self, context: Any) -> None:
            megatron_bridge.on_train_start(context)

        def on_train_step_end(self, context: Any) -> None:
            megatron_bridge.on_train_step_end(context)

    return EvolvedSamplingCallback()
