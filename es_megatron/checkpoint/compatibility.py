"""Does a checkpoint belong to the data this run reads?

Scores, masks and positions speak of samples by number; with other data they would silently speak of other samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from es_megatron.config.names import path_of
from es_megatron.errors import CheckpointError

_SHOWN = 5
_IDENTITY = ("samples", "fingerprint", "weight")
"""Fields of a component that decide which sample stands where; its path may change freely."""

_TERMS = {
    "decay": "scores.beta2",
    "correction": "scores.correction",
    "reference": "fingerprint of reference.folder",
    "ramp": "batch-size ramp-up",
}
"""Terms that are called otherwise than their settings."""


def check_manifest(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another data manifest.

    Args:
        saved: data manifest in the checkpoint, as `Manifest.to_json` gives it.
        current: data manifest of this run.

    Raises:
        CheckpointError: naming what differs and the cure.
    """
    differences = list_differences(saved, current)
    if not differences:
        return
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    raise CheckpointError(
        f"The checkpoint belongs to other data than this run reads: {'; '.join(differences[:_SHOWN])}{more}. "
        "Go on with the blend file and data the checkpoint was made with, start a new run in another folder, or have "
        "`es-megatron pretrain` go on with the scores of what did not change (`run.on_blend_change=keep_scores`)."
    )


def check_terms(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse the state of a run whose settings decide another order of samples, or another meaning of scores.

    Args:
        saved: those settings in the checkpoint.
        current: those of this run.

    Raises:
        CheckpointError: naming what differs and the cure.
    """
    changed = {key: (saved.get(key), value) for key, value in current.items() if saved.get(key) != value}
    if changed:
        told = ", ".join(
            f"`{_TERMS.get(key) or '.'.join(path_of(key))}` was {old!r} and is {new!r}"
            for key, (old, new) in changed.items()
        )
        raise CheckpointError(
            f"The checkpoint belongs to another run: {told}. Restore these settings, or start a new run directory."
        )


def list_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Everything that makes two data manifests number or order their samples differently; empty if nothing does."""
    found: list[str] = []
    if saved.get("seq_length") != current.get("seq_length"):
        found.append(f"`seq_length` was {saved.get('seq_length')} and is {current.get('seq_length')}")
    before, now = _by_name(saved), _by_name(current)
    found += [f"component `{name}` was removed" for name in before if name not in now]
    found += [f"component `{name}` was added" for name in now if name not in before]
    for name in before:
        if name in now:
            found += _list_component_differences(name, before[name], now[name])
    if not found and list(before) != list(now):
        found.append(f"the order of components was {', '.join(before)} and is {', '.join(now)}")
    return found


def _list_component_differences(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"component `{name}` changed: `{key}` was {before.get(key)} and is {now.get(key)}"
        for key in (*_IDENTITY, *(("content",) if before.get("content") and now.get("content") else ()))
        if before.get(key) != now.get(key)
    ]


def _by_name(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    components: list[Mapping[str, Any]] = manifest.get("components", [])
    return {str(component.get("name")): component for component in components}
