"""What a run tells: log lines, metrics, progress bar, TensorBoard, audit log of chosen ids, summary. Rank 0 speaks."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from es_megatron.checkpoint import disk
from es_megatron.core.line_file import LineFile
from es_megatron.core.metrics import LogEntry, plan_facts
from es_megatron.core.plan import Layout, Plan
from es_megatron.core.step import StepRecord
from es_megatron.errors import ConfigError
from es_megatron.frameworks.audit import Audit
from es_megatron.trainer.backend import Iteration
from es_megatron.trainer.boards import WandbBoard, check_clients
from es_megatron.trainer.metrics_file import MetricsFile
from es_megatron.trainer.settings import SETTINGS, PretrainSettings, write_settings

LOGGER = logging.getLogger(__name__)

LOG = "log.txt"
"""File of a run's folder with all that is printed."""


class Journal:
    """The outputs of a run; on other ranks than 0 every method does nothing."""

    def __init__(self, settings: PretrainSettings, speaks: bool, plan: Plan, layout: Layout, start: int) -> None:
        """Open what the settings ask for.

        Args:
            settings: of the run.
            speaks: whether this is rank 0.
            plan: of the run.
            layout: what its passes cost, as measured.
            start: iteration the run begins or resumes at.

        Raises:
            ConfigError: TensorBoard or Weights & Biases is asked for and not installed, or cannot begin.
        """
        check_clients(settings.run)
        self._speaks, self._silent = speaks, False
        self._directory = settings.run.directory
        self._audit: Audit | None = None
        self._board: Any = None
        self._wandb: WandbBoard | None = None
        self._bar: tqdm[Any] | None = None
        self._log: LineFile | None = None
        self._metrics: MetricsFile | None = None
        if not speaks:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        write_settings(settings, self._directory / SETTINGS)
        self._log = LineFile(self._directory / LOG)
        facts = plan_facts(plan, layout, settings.model.seq_length)
        self._metrics = MetricsFile(self._directory, plan, facts, start)
        if settings.run.audit:
            self._audit = Audit(self._directory / "audit.jsonl", 0, start - 1)
        if settings.run.tensorboard:
            self._board = open_board(self._directory / "tensorboard", start)
        if settings.run.wandb:
            self._wandb = WandbBoard(settings)
        if settings.run.progress and sys.stderr.isatty():
            self._bar = tqdm(total=plan.schedule.iterations, initial=start, unit="it", dynamic_ncols=True)

    def __enter__(self) -> Journal:
        """Nothing more to open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close everything, also after an error."""
        for output in (self._metrics, self._audit, self._log, self._board, self._wandb, self._bar):
            if output is not None:
                output.close()

    def say(self, text: str) -> None:
        """Print to standard output and to the log file."""
        if not self._speaks:
            return
        self._print(text)
        if self._log is not None:
            self._log.write(text)

    def _print(self, text: str) -> None:
        """Print what standard output can spell; once it is closed, nothing more."""
        try:
            if self._bar is not None:
                with suppress(OSError):
                    self._bar.clear()
            try:
                print(text, flush=True)
            except UnicodeEncodeError:  # of a terminal without these letters
                print(text.encode("ascii", "backslashreplace").decode(), flush=True)
        except (OSError, ValueError) as error:  # the latter of a file that is closed
            if not self._silent:
                LOGGER.warning("standard output is closed (%s); %s has what the run says", error, self._directory / LOG)
                self._silent = True
            discard_output()

    def advance(self, record: StepRecord, iteration: Iteration, elapsed: float) -> None:
        """Note one finished iteration, which took `elapsed` seconds."""
        if self._metrics is not None:
            self._metrics.add(record, iteration, elapsed)
        if self._bar is not None:
            with suppress(OSError):  # a terminal that is gone
                self._bar.update(1)
        if self._audit is not None:
            self._audit.write(record.iteration, record, iteration.norm)

    def log(self, entry: LogEntry, record: StepRecord | None, shares: Mapping[str, tuple[float, float]]) -> None:
        """Write the log line and the scalars.

        Args:
            entry: the line.
            record: of the last iteration.
            shares: drawn and trained share of each component so far.
        """
        self.say(entry.line())
        if self._metrics is not None:
            self._metrics.end(entry.lm_loss)
        if record is None:
            return
        scalars = {
            "lm loss": entry.lm_loss,
            "learning-rate": entry.learning_rate,
            "grad-norm": entry.grad_norm,
            "es/kept": entry.kept,
            "es/score_ms": entry.score_ms,
            "es/train_ms": entry.train_ms,
            "es/other_ms": entry.other_ms,
            "es/meta_loss": record.meta_loss,
            "es/chosen_loss": record.chosen_loss,
            **{f"es/chosen_{c}": n for c, n in enumerate(np.bincount(record.components).tolist())},
            **{f"es/drawn_share/{name}": drawn for name, (drawn, _) in shares.items()},
            **{f"es/trained_share/{name}": trained for name, (_, trained) in shares.items()},
        }
        self._plot(scalars, entry.iteration)

    def _plot(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write what is known to the boards."""
        found = {name: value for name, value in scalars.items() if math.isfinite(value)}
        if self._board is not None:
            for name, value in found.items():
                self._board.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.write(found, iteration)

    def saving(self) -> None:
        """Write the metrics up to here, where a resumed run would begin."""
        if self._metrics is not None:
            self._metrics.end()

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Tell validation losses, in nats per token."""
        told = " | ".join(f"{name}: {loss:.4f}" for name, loss in losses.items())
        self.say(f"validation loss at iteration {iteration} | {told} |")
        if self._metrics is not None:
            self._metrics.evaluated(iteration, losses)
        self._plot({f"validation/{name}": loss for name, loss in losses.items()}, iteration)

    def summarize(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, whole or not at all."""
        if self._speaks:
            disk.replace_file(self._directory / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")


def discard_output() -> None:
    """Send standard output nowhere, so that neither a library's words nor the end of the process fail."""
    with suppress(OSError, ValueError):
        output = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)


def open_board(path: Path, start: int) -> Any:
    """Open a TensorBoard writer that hides what a resume runs again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "`run.tensorboard` must be off without TensorBoard. Install `es_megatron[report]`."
        ) from error
    return SummaryWriter(str(path), purge_step=start)  # pyright: ignore[reportUnknownVariableType]
