"""The ids that were trained, as lines of JSON."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from es_megatron.core.line_file import LineFile
from es_megatron.core.step import StepRecord

LOGGER = logging.getLogger(__name__)


class Audit:
    """A file with a line for each iteration: its number, sequences scored, ids chosen by position."""

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

    def write(self, iteration: int, record: StepRecord) -> None:
        """Append the line of a finished iteration, under the caller's number."""
        line = {"iteration": iteration, "scored": record.scored, "chosen": record.chosen.tolist()}
        self._file.write(json.dumps(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
