"""The backends there are, by the name that the settings give; DeepSpeed's is imported late, for it is optional."""

from __future__ import annotations

from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.frameworks.megatron_data import LoadedBlend
from es_megatron.trainer import model
from es_megatron.trainer.backend import Backend
from es_megatron.trainer.megatron_backend import MegatronBackend
from es_megatron.trainer.settings import PretrainSettings


def start(settings: PretrainSettings) -> None:
    """Join the process groups that the backend of a run needs; collective.

    Raises:
        LayoutError: the world cannot hold the layout.
        ConfigError: the backend is not installed, or cannot do what is asked of it.
    """
    if settings.backend == "deepspeed":
        from es_megatron.trainer import deepspeed_backend

        deepspeed_backend.initialize(settings)
    else:
        model.initialize(settings)


def build_backend(
    settings: PretrainSettings, blend: LoadedBlend, train_samples: int, warm_start: WarmStart = start_with_scores
) -> Backend:
    """Build the model of a run in its framework, and attach; collective, after `start`.

    Args:
        settings: of the run.
        blend: where samples come from.
        train_samples: draws of the plain run.
        warm_start: see `EvolvedSampling`.

    Raises:
        EsError: what cannot work.
    """
    if settings.backend == "deepspeed":
        from es_megatron.trainer.deepspeed_backend import DeepSpeedBackend

        return DeepSpeedBackend(settings, blend, train_samples, warm_start)
    return MegatronBackend(settings, blend, train_samples, warm_start)


def stop() -> None:
    """Leave the process groups."""
    model.shutdown()
