"""Losses of every row of a blend from a checkpoint of `es-megatron pretrain` or `es-megatron reference train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from megatron.core.pipeline_parallel import get_forward_backward_func

from es_megatron.checkpoint.agreement import agreed, compute_on_first
from es_megatron.checkpoint.row_scoring import RowScoring, Scored, about_losses
from es_megatron.errors import ConfigError
from es_megatron.frameworks.megatron_core import rank_grid_of_parallel_state
from es_megatron.frameworks.megatron_data import load_blend
from es_megatron.trainer.alarm import Alarm
from es_megatron.trainer.backends import start
from es_megatron.trainer.model import build_model
from es_megatron.trainer.model_state import load_weights
from es_megatron.trainer.passes import SchedulePasses, losses_of_rows
from es_megatron.trainer.weights import find_model

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


def score_blend(
    path: Path,
    blend_file: Path,
    output: Path,
    *,
    tokens: int | None = None,
    micro_batch_size: int | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
    alarm: Alarm | None = None,
) -> Scored:
    """Score what of a blend has no loss of this model yet; collective.

    Args:
        path: see `find_model`.
        blend_file: the blend.
        output: folder to make, or one that this made before: rows of components that it has are not scored again.
        tokens: first tokens of a row that count; None: all.
        micro_batch_size: sequences in a pass; None: that of the model's run.
        overrides: settings over those of the model's run, such as its layout.
        say: is told of the progress, on world rank 0.
        alarm: of `ending_together`, so that ranks end together.

    Raises:
        EsError: on every rank, naming the thing and the cure.
    """
    own = [f"data.blend={blend_file}", *([f"training.micro_batch_size={micro_batch_size}"] if micro_batch_size else [])]
    model = find_model(path, [*own, *overrides])
    settings = model.settings
    length = settings.model.seq_length
    if tokens is not None and not 1 <= tokens <= length:
        raise ConfigError(f"`--tokens` must be in [1, {length}], the model's sequence length, but is {tokens} instead.")
    start(settings)
    if alarm is not None:
        alarm.connect()
    grid, source = rank_grid_of_parallel_state()
    with agreed(grid, "open the data"):
        blend = load_blend(blend_file, length)
    chunks = build_model(settings, blend.vocab_size)
    load_weights(model.checkpoint, chunks)
    about = compute_on_first(
        grid, f"read {model.checkpoint}", lambda: about_losses(path, model.checkpoint, tokens or length)
    )
    passes = SchedulePasses(settings, chunks, get_forward_backward_func(), grid, source)

    def losses_of(ids: Int64, share: int) -> Float32:
        return losses_of_rows(passes, blend.rows, ids, share, tokens)

    return RowScoring(grid, blend.manifest, losses_of, output, about, say).run()
