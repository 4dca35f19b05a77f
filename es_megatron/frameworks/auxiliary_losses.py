"""Megatron-Core's running sums of auxiliary losses: experts' balancing and z-losses, multi-token prediction, indexers.

The layers add to them at every training forward pass; Megatron-LM's log divides them by the plain run's number of
micro-batches, whatever number was trained. Scoring passes do not add to them, being in evaluation mode.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

# Module, and what to call or look up there. Experts' sums moved in 0.13 and again in 0.18.
OF_EXPERTS = (
    ("megatron.core.transformer.moe.moe_logging", "get_moe_metrics_tracker"),
    ("megatron.core.transformer.moe.moe_utils", "get_moe_layer_wise_logging_tracker"),
    ("megatron.core.parallel_state", "get_moe_layer_wise_logging_tracker"),
)
HELPERS = (
    ("megatron.core.transformer.multi_token_prediction", "MTPLossLoggingHelper"),
    ("megatron.core.transformer.experimental_attention_variant.dsa", "DSAIndexerLossLoggingHelper"),
)
SUMS = ("values", "loss_values")
"""Names under which the helpers keep sums of losses; they also keep counts, whose ratios are right as they are."""


def sums() -> Iterator[Tensor]:
    """The tensors that hold the sums of this iteration so far, one number for each layer; none for what is not used."""
    for module, name in OF_EXPERTS:
        tracker = _loaded(module, name)
        if tracker is not None:
            found: Any = tracker()
            entries = getattr(found, "metrics", found).values()
            yield from (entry["values"] if isinstance(entry, dict) else entry.values for entry in entries)
            break
    for module, name in HELPERS:
        kept: dict[str, Any] = getattr(_loaded(module, name), "tracker", {})
        yield from (kept[each] for each in SUMS if each in kept)


def rescale(factor: float) -> None:
    """Multiply the sums, so that upstream's division by its own number of micro-batches gives their means."""
    for each in sums():
        each.mul_(factor)


def _loaded(module: str, name: str) -> Any:
    """An attribute of a module that upstream has imported, else None."""
    return getattr(sys.modules.get(module), name, None)
