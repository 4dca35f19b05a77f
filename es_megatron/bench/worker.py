"""One worker process of a comparison: imports torch and megatron once, then trains one run after the other.

Asked on standard input and answering on standard output, a JSON line each. Started by `crew`; ends at once when
standard input does, so that no run outlives a command that was killed.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
import traceback
from typing import Any, TextIO


def main() -> None:
    """Train what is asked for until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the runs print goes where errors go: the worker's log
    asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(asked,), daemon=True).start()

    import torch

    torch.set_num_threads(1)
    from es_megatron.testing import cpu

    cpu.install()
    import es_megatron.trainer.megatron_backend  # noqa: F401  # pyright: ignore[reportUnusedImport] - the slow part

    while True:
        serve(asked.get(), answers)


def listen(asked: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Hand on what is asked, and end the process when nobody is there to ask any more."""
    for line in sys.stdin:
        asked.put(json.loads(line))
    os._exit(0)


def serve(request: dict[str, Any], answers: TextIO) -> None:
    """Train one run and answer what went wrong, or nothing, and the seconds of wall-clock and of processor.

    Asked for an estimate, answer the seconds that several runs will take.
    """
    if "estimate" in request:
        answers.write(json.dumps({"seconds": estimate(request["estimate"])}) + "\n")
        answers.flush()
        return
    error, began, worked = "", time.perf_counter(), time.process_time()
    try:
        train(request["train"])
    except Exception as failure:  # noqa: BLE001 - whatever goes wrong is this run's alone
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    told = {"error": error, "seconds": time.perf_counter() - began, "processor": time.process_time() - worked}
    answers.write(json.dumps(told) + "\n")
    answers.flush()


def train(settings: dict[str, Any]) -> None:
    """Train one run in this process."""
    from es_megatron.config import build
    from es_megatron.trainer.loop import pretrain
    from es_megatron.trainer.settings import PretrainSettings

    pretrain(build(PretrainSettings, settings, "run"))


def estimate(runs: list[dict[str, Any]]) -> list[float]:
    """Seconds of runs with one model on one blend, from what the passes of the first take; nan where it fails."""
    from es_megatron.config import build
    from es_megatron.core.plan import plan_run, predict
    from es_megatron.trainer.backends import stop
    from es_megatron.trainer.loop import Trainer
    from es_megatron.trainer.settings import PretrainSettings

    try:
        made = [build(PretrainSettings, settings, "run") for settings in runs]
        trainer = Trainer(made[0])
        manifest, layout = trainer.blend.manifest, trainer.layout
        evaluated = sum(min(made[0].training.eval_samples, len(rows)) for rows in trainer.blend.validation.values())
        found: list[float] = []
        for settings in made:
            training = settings.training
            sizes = training.global_batch_size, training.micro_batch_size, training.draws(manifest.total)
            plan = plan_run(settings.evolved_sampling, manifest, *sizes)
            evaluation = layout.scoring() * evaluated / training.global_batch_size
            found.append(predict(plan, layout).run + evaluation)
        return found
    except Exception:  # noqa: BLE001 - the runs themselves will tell
        traceback.print_exc()
        return [math.nan] * len(runs)
    finally:
        stop()


if __name__ == "__main__":
    main()
