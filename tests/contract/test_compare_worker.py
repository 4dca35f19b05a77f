"""What a worker of a comparison says of the time that runs will take."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from es_megatron.bench.worker import estimate
from es_megatron.core.plan import Layout
from es_megatron.trainer import megatron_backend
from tests.ranks_helper import run_on_ranks
from tests.small_run import settings_of, write_blend


def test_an_estimate_is_of_what_each_run_passes(tmp_path: Path) -> None:
    blend = write_blend(tmp_path / "data")

    def settings(*overrides: str) -> dict[str, Any]:
        made = settings_of(blend, tmp_path / "run", "training.eval_samples=0", *overrides)
        return json.loads(json.dumps(dataclasses.asdict(made), default=str))

    def told() -> list[float]:
        # a second for a forward pass of a micro-batch, two for its backward pass
        megatron_backend.MegatronBackend.calibrate = lambda self: Layout(16, 16)  # pyright: ignore[reportAttributeAccessIssue]
        plain = settings("evolved_sampling.arm=plain", "evolved_sampling.pruning_ratio=0")
        half = settings(
            "evolved_sampling.arm=uniform", "evolved_sampling.selection.keep_ratio=0.5", "evolved_sampling.anneal=0"
        )
        broken = {**plain, "training": {**plain["training"], "global_batch_size": 7}}
        return [*estimate([plain, half]), *estimate([broken])]

    ((whole, part, none),) = run_on_ranks(1, told)
    assert whole > 0
    assert 0.3 * whole < part < 0.7 * whole
    assert math.isnan(none)
