"""The ids that were trained and their losses, as lines of JSON."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from es_megatron.core.line_file import LineFile
from es_megatron.core.step import StepRecord

LOGGER = logging.getLogger(__name__)


class Audit:
    """A file with a line for each iteration: its number, sequences scored, ids chosen by position, and their losses."""

    def __init__(self, path: Path, first: int, last: int) -> None:
        """Take the file; what is in it stays. A warning says how many lines of iterations that were run are missing.

        Args:
            path: where it is; made with its folder if it does not exist.
            first: number of the run's first iteration.
            last: number of the last iteration that was run; lines with higher numbers are dropped, since those are
                going to be run again.
        """
        found: set[int] = set()

        def keep(line: dict[str, Any]) -> bool:
            iteration = int(line["iteration"])
            if iteration <= last:
                found.add(iteration)
            return iteration <= last

        self._file = LineFile(path, keep)
        missing = last - first + 1 - len(found.intersection(range(first, last + 1)))
        if missing > 0:
            LOGGER.warning(
                "%s lacks the lines of %d of the %d iterations that were run so far, the first of them %d: what was "
                "trained then is not told",
                path,
                missing,
                last - first + 1,
                next(each for each in range(first, last + 1) if each not in found),
            )

    def write(self, iteration: int, record: StepRecord, norm: float = math.nan) -> None:
        """Append the line of a finished iteration.

        Args:
            iteration: its number, as the caller counts.
            record: what it did. Where no loss of a chosen sequence is known the line has no `loss`; null in it is one
                that is not finite.
            norm: of the gradients before clipping; without one that is finite the line has no `norm`.
        """
        line = {"iteration": iteration, "scored": record.scored, "chosen": record.chosen.tolist()}
        if np.isfinite(record.losses).any():
            line["loss"] = [round(each, 4) if math.isfinite(each) else None for each in record.losses.tolist()]
        if math.isfinite(norm):
            line["norm"] = norm
        self._file.write(json.dumps(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
