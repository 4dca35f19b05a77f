"""One worker process of a comparison: imports torch and megatron once, then trains one run after the other.

Asked on standard input and answering on standard output, a JSON line each. Started by `crew`; ends at once when
standard input does, so that no run outlives a command that was killed.
"""

from __future__ import annotations

import json
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


def serve(settings: dict[str, Any], answers: TextIO) -> None:
    """Train one run and answer what went wrong, or nothing, and the seconds of wall-clock and of processor."""
    error, began, worked = "", time.perf_counter(), time.process_time()
    try:
        train(settings)
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


if __name__ == "__main__":
    main()
