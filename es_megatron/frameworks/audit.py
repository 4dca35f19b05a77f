"""The ids that were trained, as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from es_megatron.step import StepRecord


class Audit:
    """A file with a line for each iteration: its number, sequences scored, ids chosen by position."""

    def __init__(self, path: Path, done: int) -> None:
        """Take the file; what is in it stays.

        Args:
            path: where it is; made if it does not exist.
            done: finished iterations; lines of later ones are dropped, since those are going to be run again.
        """
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            path.write_text("".join(line for line in whole if json.loads(line)["iteration"] <= done), encoding="utf-8")
        self._path = path

    def write(self, iteration: int, record: StepRecord) -> None:
        """Append the line of a finished iteration, counted from 1."""
        line = {"iteration": iteration, "scored": record.scored, "chosen": record.chosen.tolist()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
