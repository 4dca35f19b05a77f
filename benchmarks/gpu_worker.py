"""One run of `benchmarks.gpu_check` under torchrun: `gpu_worker MODEL_JSON SETTINGS section.key=value ...`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from es_megatron.testing import cpu


def main() -> None:
    """Train to the end with a model whose config is changed; rank 0 writes the losses of what was trained."""
    changes, path, *overrides = sys.argv[1:]
    cpu.install()
    from es_megatron.trainer import megatron_backend, model
    from es_megatron.trainer.loop import Trainer, stop
    from es_megatron.trainer.settings import load_settings

    given: dict[str, Any] = json.loads(changes)
    original = model.transformer_config

    def changed(*args: Any, **named: Any) -> Any:
        return replace(original(*args, **named), **given)

    model.transformer_config = megatron_backend.transformer_config = changed
    settings = load_settings(path, overrides)
    try:
        trainer = Trainer(settings)
        losses, finish = list[float](), trainer.engine.finish

        def noting(succeeded: bool) -> None:
            record = trainer.engine.last
            losses.append(float("nan") if record is None else record.chosen_loss)
            finish(succeeded)

        trainer.engine.finish = noting
        trainer.run()
        if trainer.grid.world_rank == 0:
            (settings.run.directory / "losses.json").write_text(json.dumps(losses))
    finally:
        stop()


if __name__ == "__main__":
    main()
