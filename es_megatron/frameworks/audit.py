"""The ids that were trained, as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from es_megatron.core.line_file import LineFile
from es_megatron.core.step import StepRecord


class Audit:
    """A file with a line for each iteration: its number, sequences scored, ids chosen by position."""

    def __init__(self, path: Path, last: int) -> None:
        """Take the file; what is in it stays.

        Args:
            path: where it is; made with its folder if it does not exist.
            last: lines of iterations with higher numbers are dropped, since those are going to be run again.
        """
        self._file = LineFile(path, lambda line: int(line["iteration"]) <= last)

    def write(self, iteration: int, record: StepRecord) -> None:
        """Append the line of a finished iteration, under the caller's number."""
        line = {"iteration": iteration, "scored": record.scored, "chosen": record.chosen.tolist()}
        self._file.write(json.dumps(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
