"""Evolved Sampling for language-model pretraining with Megatron-Core and DeepSpeed.

Importing this package changes nothing, and imports neither megatron nor deepspeed: the names below are imported when
they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from es_megatron.config import EvolvedSamplingConfig
    from es_megatron.data.manifest import Manifest
    from es_megatron.errors import CheckpointError, ConfigError, DataError, EsError, LayoutError, LossError, PatchError
    from es_megatron.frameworks.front_door import attach
    from es_megatron.frameworks.megatron_data import load_blend
    from es_megatron.frameworks.run_plan import plan_run
    from es_megatron.frameworks.samples import blend_of

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EsError",
    "EvolvedSamplingConfig",
    "LayoutError",
    "LossError",
    "Manifest",
    "PatchError",
    "__version__",
    "attach",
    "blend_of",
    "load_blend",
    "plan_run",
]

_HOMES = {
    "EvolvedSamplingConfig": "config",
    "Manifest": "data.manifest",
    "attach": "frameworks.front_door",
    "blend_of": "frameworks.samples",
    "load_blend": "frameworks.megatron_data",
    "plan_run": "frameworks.run_plan",
}
"""Modules of names that are not errors."""


def __getattr__(name: str) -> Any:
    """Import a name of the front door when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The front door's names, imported or not."""
    return sorted({*globals(), *__all__})
