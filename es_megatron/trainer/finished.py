"""What a run that is finished already left, so that it is not begun or ended a second time."""

from __future__ import annotations

import json
from typing import Any

import yaml

from es_megatron.trainer.changes import comparable
from es_megatron.trainer.settings import SETTINGS, PretrainSettings

SUMMARY = "summary.json"


def finished_summary(settings: PretrainSettings, *, resumed: bool) -> dict[str, Any] | None:
    """The summary of the finished run in a run's folder, None if there is none to go by.

    Args:
        settings: of the run that is being started.
        resumed: whether it goes on from a checkpoint, which then says how far it is. Without one, as a finished run
            with `save_interval: null` leaves none, its model and training must be those of the finished run.
    """
    directory = settings.run.directory
    try:
        summary: dict[str, Any] = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        written: dict[str, Any] = yaml.safe_load((directory / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    own = comparable(settings)
    ours = json.loads(json.dumps(settings.evolved_sampling.to_mapping()))
    same = {name: written.get(name) for name in own} == own and written.get("evolved_sampling") == ours
    return summary if summary.get("finished") and (resumed or (settings.run.resume and same)) else None


def told(settings: PretrainSettings, summary: dict[str, Any]) -> str:
    """A line for who starts a finished run."""
    return (
        f"`{settings.run.directory}` holds a finished run ({summary['iterations']} of "
        f"{summary['planned_iterations']} iterations): nothing is left to do. Name another `run.directory` for a new "
        "run; `run.resume=false` trains this one again"
    )
