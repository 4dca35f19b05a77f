"""Let an unmodified Megatron-DeepSpeed script be imported and run on gloo without CUDA; for trying things out."""

from __future__ import annotations

import atexit
import importlib.util
import os
import sys
from typing import Any

import torch

from es_megatron.frameworks import deepspeed_common
from es_megatron.testing.megatron_lm_cpu import StandInFinder, leave_groups

STAND_INS = ("megatron.model.vision.knn_monitor", "deepspeed.compression.compress")
"""Modules a stand-in is always imported for: they ask for CUDA at import, or are gone from newer DeepSpeed."""

OPTIONAL_STAND_INS = ("nltk", "transformers")
"""Modules a stand-in is imported for where they are not installed; pretraining a GPT does not use them."""


def install() -> bool:
    """Put the stand-ins in place, and have DeepSpeed choose the CPU; best before megatron and deepspeed are imported.

    Returns:
        Whether it did: False, and nothing is changed, where CUDA is available.
    """
    if torch.cuda.is_available():
        return False
    os.environ.setdefault(
        "LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")
    )  # which DeepSpeed's CPU device asks for
    deepspeed_common.prepare()
    missing = [name for name in OPTIONAL_STAND_INS if importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, StandInFinder([*STAND_INS, *missing]))
    _let_views_copy()
    atexit.register(leave_groups)
    return True


def _let_views_copy() -> None:
    """Have `Tensor.view` copy where it must: the attention of Megatron-DeepSpeed relies on strides that GPUs give."""
    tensor: Any = torch.Tensor
    original = tensor.view

    def view(self: Any, *shape: Any) -> Any:
        try:
            return original(self, *shape)
        except RuntimeError:
            return self.reshape(*shape)

    tensor.view = view
