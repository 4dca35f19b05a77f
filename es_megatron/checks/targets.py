"""Whether a checkout of an upstream has the names that run-time patches wrap.

Each upstream is imported in a process of its own, with the checkout first on its path:
`python -m es_megatron.checks.targets UPSTREAM` prints what it finds as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from es_megatron.checks.findings import Finding, fail, note, ok
from es_megatron.errors import EsError
from es_megatron.patching import PatchList, check, read_patches, untested, upstream_version, upstreams
from es_megatron.testing import prepare_cpu

IMPORT_SECONDS = 180
MARK = "es_megatron.checks.targets: "
"""Begins the line of JSON: an upstream that is imported may print, too."""


class Target(NamedTuple):
    """One name that a patch wraps."""

    name: str
    state: str
    """`ready` and `applied` are as they must be."""
    detail: str
    """What is wrong, or nothing."""


@dataclass(frozen=True)
class Targets:
    """What a checkout has."""

    version: str = ""
    untested: str | None = None
    """What to say of a version that the tests do not run with."""
    found: tuple[Target, ...] = ()
    trouble: str = ""
    """Why nothing could be looked up, or nothing."""


def check_targets(checkouts: Mapping[str, Path | None]) -> Iterator[Finding]:
    """Whether the names that patches wrap are there, one finding per upstream.

    Args:
        checkouts: folders by upstream; those without one are not looked at.
    """
    for upstream in upstreams():
        patches, folder = read_patches(upstream), checkouts.get(upstream)
        what = f"patches {upstream}"
        if folder is None:
            yield note(what, f"{len(patches.patches)} declared, not checked", f"give `--{upstream} CHECKOUT`")
        elif not (folder / "megatron").is_dir():
            yield fail(what, f"`{folder}` is no checkout: it has no folder `megatron`", "give the checkout's folder")
        else:
            yield judge_targets(what, patches, look_for_targets(upstream, folder))


def look_for_targets(upstream: str, folder: Path) -> Targets:
    """Import a checkout in a process of its own, and look for every target in it."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "es_megatron.checks.targets", upstream],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Targets(trouble=f"importing it took over {IMPORT_SECONDS} s")
    lines = [line for line in ended.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        return Targets(trouble=f"it cannot be imported: {last.rstrip('.')}")
    document: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    found = tuple(Target(*each) for each in document.pop("found"))
    return Targets(found=found, **document)


def judge_targets(what: str, patches: PatchList, targets: Targets) -> Finding:
    """What the targets of an upstream amount to."""
    if targets.trouble:
        return fail(what, targets.trouble, "run from the checkout, with its own requirements installed")
    bad = [target for target in targets.found if target.state not in ("ready", "applied")]
    count = len(targets.found)
    if bad:
        shown = bad[:1] if bad[0].state == "refused" else bad  # a refused version is so for every target alike
        details = "; ".join(f"{target.state}: {target.detail}" for target in shown)
        tested = ", ".join(patches.tested)
        return fail(what, f"version {targets.version}: {details}", f"use a version that was tested ({tested})")
    if targets.untested is not None:
        told = f"all {count} targets are as declared, but {targets.untested}"
        return note(what, told, "compare a short run with one of `--es-arm plain`")
    return ok(what, f"all {count} targets found in version {targets.version}")


def find_here(upstream: str) -> Targets:
    """Look for every target in the upstream that this process can import."""
    patches = read_patches(upstream)
    try:
        with contextlib.suppress(ModuleNotFoundError):  # what is missing there is told target by target
            prepare_cpu(upstream)
        found = tuple(Target(each.patch.target, each.state, each.detail) for each in check(patches))
        return Targets(upstream_version(patches), untested(patches), found)
    except EsError as error:
        return Targets(trouble=str(error).rstrip("."))


if __name__ == "__main__":
    print(MARK + json.dumps(asdict(find_here(sys.argv[1]))))
