"""Ranks that have a model and load any checkpoint into it: built once, since that is what takes seconds."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from es_megatron.core.metrics import RunTotals
from es_megatron.errors import EsError
from es_megatron.frameworks.data_check import check_behind
from es_megatron.frameworks.megatron_data import load_blend
from es_megatron.trainer.checkpoints import RunCheckpoints
from es_megatron.trainer.loop import Trainer
from es_megatron.trainer.model import unwrap
from tests.faults.job import free_port
from tests.faults.setups import Bench

ANSWER = 120.0
"""Seconds for a load."""


class Verdict(NamedTuple):
    """What became of one load, on all ranks."""

    kind: str
    """`loaded`, `empty` (no checkpoint), `refused` (a typed error), `error` (any other), `hung`."""
    iteration: int
    """Of what was loaded."""
    digest: str
    """Of weights, optimizer, scores, masks, position and totals; of the rows, too, where data were given."""
    said: str


class Judge:
    """Loads checkpoints of one setup; after a load that went wrong in an unforeseen way its ranks are made anew."""

    def __init__(self, bench: Bench, ranks: int) -> None:
        """Nothing is started yet."""
        self.bench, self.ranks = bench, ranks
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def ask(self, directory: Path, *, data: Path | None = None, save: bool = False) -> Verdict:
        """Load the newest checkpoint of a run's folder.

        Args:
            directory: of the run.
            data: folder of the blend, if it is another one; its rows are read, too.
            save: whether to save the same iteration again.
        """
        if not self._processes:
            self._begin()
        try:
            for pipe in self._pipes:
                pipe.send((directory, data, save))
            waiting, answers = list(self._pipes), []
            while waiting:
                ready = wait(waiting, ANSWER)
                if not ready:
                    raise TimeoutError
                for pipe in ready:
                    assert isinstance(pipe, Connection)
                    answers.append(Verdict(*pipe.recv()))
                    waiting.remove(pipe)
        except (TimeoutError, EOFError, OSError) as error:
            self.end()
            return Verdict("hung", -1, "", f"a load did not end: {error!r}")
        worst = next((each for each in answers if each.kind in ("error", "refused")), answers[0])
        if worst.kind == "error" or len({each.kind for each in answers}) > 1:
            self.end()
        return worst._replace(digest=" ".join(sorted(each.digest for each in answers)))

    def end(self) -> None:
        """End the ranks; the next load makes new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _begin(self) -> None:
        context = multiprocessing.get_context("fork")
        environment = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            each = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.ranks)}
            process = context.Process(target=self._serve, args=(theirs, each, rank), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _serve(self, pipe: Connection, environment: dict[str, str], rank: int) -> None:
        output = os.open(self.bench.folder / f"judge-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        trainer = Trainer(self.bench.settings(self.bench.folder / f"judge-{self.ranks}", "run.resume=false"))
        while True:
            try:
                directory, data, save = pipe.recv()
            except EOFError:
                return
            try:
                answer = _load(trainer, self.bench, directory, data, save)
            except EsError as error:
                answer = Verdict("refused", -1, "", str(error))
            except BaseException:  # noqa: BLE001 - handed to who asked
                answer = Verdict("error", -1, "", traceback.format_exc())
            pipe.send(tuple(answer))


def _load(trainer: Trainer, bench: Bench, directory: Path, data: Path | None, save: bool) -> Verdict:
    settings = bench.settings(directory, data=data)
    blend = trainer.blend if data is None else load_blend(settings.data.blend, settings.model.seq_length)
    if data is not None:  # as a run does behind its first iteration
        check_behind(blend, trainer.grid, wanted=True).agree(ANSWER)
    checkpoints = RunCheckpoints(settings, blend, trainer.grid, trainer.alarm.tell)
    totals = RunTotals(len(blend.manifest.components), settings.training.global_batch_size)
    evaluations = checkpoints.restore(trainer.backend, totals)
    if evaluations is None:
        return Verdict("empty", -1, "", "")
    digest = hashlib.blake2b(digest_size=12)
    for piece in pieces(state_of(trainer, totals)):
        digest.update(piece)
    if data is not None:
        for row in range(len(blend.rows)):
            for piece in pieces(blend.rows[row]):
                digest.update(piece)
    if save:
        checkpoints.save(trainer.backend, totals, evaluations)
        checkpoints.advance(wait=True)
    return Verdict("loaded", trainer.engine.iteration, digest.hexdigest(), "")


def state_of(trainer: Trainer, totals: RunTotals) -> Any:
    """Everything that a run goes on from, but for times."""
    backend: Any = trainer.backend
    engine, store = trainer.engine, trainer.engine.store
    if hasattr(backend, "chunks"):
        weights = [dict(unwrap(chunk).named_parameters()) for chunk in backend.chunks]
    else:
        weights = [dict(backend.deepspeed.module.named_parameters())]
    return [
        weights,
        backend.optimizer.state_dict() if hasattr(backend, "optimizer") else backend.deepspeed.optimizer.state_dict(),
        backend.scheduler.state_dict(),
        engine.state_dict(),
        store.score,
        store.visits,
        {str(key): mask.packed for key, mask in engine.sampler.masks.items()},
        {name: value for name, value in totals.state_dict().items() if name != "seconds"},
    ]


def pieces(value: Any) -> Iterator[bytes]:
    """The bytes of nested values, in an order of their own."""
    if isinstance(value, torch.Tensor):
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from pieces(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from pieces(each)
    elif isinstance(value, str | int | float | bool | None | bytes):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()
