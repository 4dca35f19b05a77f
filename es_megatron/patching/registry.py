"""Apply and undo patches; fail-closed: unless every target is as declared, nothing at all is changed."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from packaging.version import Version

from es_megatron.errors import PatchError
from es_megatron.frameworks.arguments import STRICT_VERSIONS
from es_megatron.patching.declaration import Patch, PatchList, parse_version, read_patches

MARK = "__es_megatron_patch__"
"""Attribute of a replacement that holds (name of the patch, original)."""

State = Literal["ready", "applied", "missing", "changed", "refused"]
CURE = (
    "Use a version of {upstream} that was tested ({tested}), or run without es_megatron; if this version should work, "
    "the declaration is in patches/{upstream}/patches.yaml."
)


class Status(NamedTuple):
    """How one patch stands."""

    patch: Patch
    state: State
    detail: str
    """Why, where the state is neither `ready` nor `applied`."""


class TargetAttribute(NamedTuple):
    """The attribute that a target names."""

    owner: Any
    name: str
    value: Any


def upstream_version(patches: PatchList) -> str:
    """Version of the upstream that is importable here.

    Raises:
        PatchError: it is not importable.
    """
    try:
        return str(_find(patches.version).value)
    except _Missing as error:
        raise PatchError(
            f"{patches.upstream} cannot be found: {error}. Start the script from its checkout (`es-megatron run "
            "CHECKOUT/pretrain_gpt.py ...`), or put the checkout on PYTHONPATH."
        ) from error


def list_patches(upstream: str) -> list[Patch]:
    """Every entry declared for an upstream; nothing of it is imported."""
    return read_patches(upstream).patches


def check(patches: PatchList) -> list[Status]:
    """How every patch for the importable version stands; imports the targets, changes nothing.

    A version is judged by what it offers: unless it is known to break, it does not matter whether it was tested.

    Raises:
        PatchError: the upstream is not importable. A version that is known to break is a status `refused`.
    """
    told = upstream_version(patches)
    version = parse_version(told)
    why = patches.why_broken(version)
    if why is not None:
        detail = f"{patches.upstream} {told} is known not to work: {why}"
        return [Status(patch, "refused", detail) for patch in patches.patches]
    return [_status(patch) for patch in _for_version(patches, version)]


def untested(patches: PatchList) -> str | None:
    """A line that says so where the importable version has not been tested; None where it has."""
    told = upstream_version(patches)
    if patches.is_tested(parse_version(told)):
        return None
    return f"{patches.upstream} {told} has not been tested with these patches ({', '.join(patches.tested)} have)"


def apply(patches: PatchList, *, strict: bool = False) -> list[Status]:
    """Apply all patches, or none; those applied already are left as they are.

    Args:
        patches: of the upstream.
        strict: refuse a version that has not been tested, though all its targets are as declared.

    Returns:
        How each one stands now: `applied`.

    Raises:
        PatchError: a version that is known to break, or a target that is missing or has changed.
    """
    cure = CURE.format(upstream=patches.upstream, tested=", ".join(patches.tested))
    if strict and (line := untested(patches)) is not None:
        raise PatchError(f"Nothing was patched: {line}, and `{STRICT_VERSIONS}` is given. {cure}")
    statuses = check(patches)
    problems = [status for status in statuses if status.state not in ("ready", "applied")]
    if problems:
        told = list(dict.fromkeys(status.detail for status in problems))
        raise PatchError(f"Nothing was patched: {'; '.join(told)}. {cure}")
    replacements = [(status.patch, _load_glue(status.patch)) for status in statuses if status.state == "ready"]
    for patch, glue in replacements:
        target = _find(patch.target)
        replacement = functools.wraps(target.value)(glue(target.value))
        setattr(replacement, MARK, (patch.name, target.value))
        setattr(target.owner, target.name, replacement)
    return [Status(status.patch, "applied", "") for status in statuses]


def undo(patches: PatchList) -> list[str]:
    """Put back what `apply` replaced, in reverse order.

    Returns:
        Names of the patches undone.

    Raises:
        PatchError: something else wrapped a target after us; nothing is undone then.
    """
    version = parse_version(upstream_version(patches))
    targets = [(patch, _find(patch.target)) for patch in reversed(_for_version(patches, version))]
    for patch, target in targets:
        if _own_mark(target.value) is None and _is_wrapped_below(target.value):
            raise PatchError(
                f"`{patch.target}` was wrapped by something else after es_megatron patched it. Undo that first; "
                "nothing was undone."
            )
    undone: list[str] = []
    for patch, target in targets:
        mark = _own_mark(target.value)
        if mark is not None:
            setattr(target.owner, target.name, mark[1])
            undone.append(patch.name)
    return undone


def report(patches: PatchList, statuses: Sequence[Status]) -> list[str]:
    """Lines to print at start-up."""
    head = f"es_megatron patches {patches.upstream} {upstream_version(patches)}:"
    return [head, *(f"  {each.state:8s} {each.patch.target}: {each.patch.why}" for each in statuses)]


def patch_and_report(upstream: str) -> None:
    """Apply all patches of an upstream, and list them on rank 0.

    `--es-strict-versions` is looked for on the command line itself, which the script has not parsed yet.

    Raises:
        PatchError: it is not as the patches rely on; nothing is changed then.
    """
    patches = read_patches(upstream)
    statuses = apply(patches, strict=STRICT_VERSIONS in sys.argv)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(report(patches, statuses)), flush=True)
        if (line := untested(patches)) is not None:
            print(
                f"es_megatron: {line}; every target is as declared, so it runs ({STRICT_VERSIONS} refuses it)",
                flush=True,
            )


def _for_version(patches: PatchList, version: Version) -> list[Patch]:
    return [patch for patch in patches.patches if patch.covers(version)]


def _status(patch: Patch) -> Status:
    try:
        value = _find(patch.target).value
    except _Missing as error:
        return Status(patch, "missing", str(error))
    if _own_mark(value) is not None:
        return Status(patch, "applied", "")
    if _is_wrapped_below(value):
        return Status(patch, "applied", "something else wrapped it after es_megatron")
    if not callable(value):
        return Status(patch, "changed", f"`{patch.target}` must be a function, but is {type(value).__name__} instead")
    taken = list(inspect.signature(value).parameters)
    lacking = [name for name in patch.parameters if name not in taken]
    if lacking:
        wanted = ", ".join(f"`{name}`" for name in lacking)
        return Status(patch, "changed", f"`{patch.target}` must take {wanted}, but takes ({', '.join(taken)}) instead")
    return Status(patch, "ready", "")


class _Missing(Exception):  # noqa: N818 - never leaves this module
    """A target is not there."""


def _find(target: str) -> TargetAttribute:
    """Import a module and look an attribute up."""
    module, _, path = target.partition(":")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise _Missing(f"module `{error.name}` does not exist") from error
        raise PatchError(f"`{module}` cannot be imported: {error}. Install what it needs.") from error
    *parents, name = path.split(".")
    for parent in parents:
        owner = _attribute(owner, parent, target)
    return TargetAttribute(owner, name, _attribute(owner, name, target))


def _attribute(owner: Any, name: str, target: str) -> Any:
    if not hasattr(owner, name):
        raise _Missing(f"`{target}` does not exist")
    return getattr(owner, name)


def _load_glue(patch: Patch) -> Callable[[Any], Any]:
    module, _, name = patch.glue.partition(":")
    return getattr(importlib.import_module(module), name)


def _own_mark(value: Any) -> tuple[str, Any] | None:
    """The mark of a replacement itself; wrappers of it made with functools.wraps carry a copy, but are not it."""
    mark = getattr(value, "__dict__", {}).get(MARK)
    return mark if mark is not None and getattr(value, "__wrapped__", None) is mark[1] else None


def _is_wrapped_below(value: Any) -> bool:
    """Whether one of our replacements is inside a wrapper of somebody else."""
    while (value := getattr(value, "__wrapped__", None)) is not None:
        if _own_mark(value) is not None:
            return True
    return False
