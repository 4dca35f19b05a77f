"""Patches of upstream frameworks: declared in `patches/UPSTREAM/patches.yaml`, checked before anything is changed."""

from __future__ import annotations

from es_megatron.patching.declaration import Patch, PatchList, read_patches, upstreams
from es_megatron.patching.registry import (
    Status,
    apply,
    check,
    list_patches,
    patch_and_report,
    report,
    undo,
    untested,
    upstream_version,
)

__all__ = [
    "Patch",
    "PatchList",
    "Status",
    "apply",
    "check",
    "list_patches",
    "patch_and_report",
    "read_patches",
    "report",
    "undo",
    "untested",
    "upstream_version",
    "upstreams",
]
