"""Versions of Python and packages: what is asked for, and what the tests run with."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping

from packaging.requirements import Requirement
from packaging.version import Version

from es_megatron.checks.findings import Finding, fail, note, ok

TESTED: tuple[Mapping[str, str], ...] = (
    {"python": "3.11", "torch": "2.13.0", "megatron-core": "0.16.1", "deepspeed": "0.19.8"},
    {"python": "3.12", "torch": "2.13.0", "megatron-core": "0.19.2", "deepspeed": "0.19.8"},
)
"""The environments of `make test` and `make test-newest`."""


def installed_version(name: str) -> str | None:
    """Version of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """What this package's own metadata asks for."""
    return [Requirement(text) for text in importlib.metadata.requires("es_megatron") or []]


def check_versions(version_of: Callable[[str], str | None] = installed_version) -> Iterator[Finding]:
    """Python and the packages against this package's metadata, and against what the tests run with.

    Args:
        version_of: gives a package's version, None if it is not installed.
    """
    python = platform.python_version()
    yield judge_tested("python", python, python)
    for requirement in requirements():
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": "deepspeed"})
        if applies and not (optional and requirement.name != "deepspeed"):
            yield judge_version(requirement, version_of(requirement.name), optional, python)


def judge_version(requirement: Requirement, version: str | None, optional: bool, python: str) -> Finding:
    """One package against what is asked for."""
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    cure = f"`pip install '{wanted}'`"
    if version is None:
        if optional:
            return note(name, "not installed; only runs under DeepSpeed need it", cure)
        return fail(name, "not installed", cure)
    if Version(version) not in requirement.specifier and not requirement.specifier.contains(version, prereleases=True):
        return fail(name, f"{version}, but {requirement.specifier} is needed", cure)
    return judge_tested(name, version, python)


def judge_tested(name: str, version: str, python: str) -> Finding:
    """OK where the tests run with this version on this Python; a note where it only meets what is asked for.

    Args:
        name: `python`, or a package; packages that are in no environment of the tests by name are OK.
        version: of it.
        python: version of Python.
    """
    here = [each for each in TESTED if is_version(python, each["python"])]
    known = [each[name] for each in here or TESTED if name in each]
    if not known or any(is_version(version, each) for each in known):
        return ok(name, version)
    where = f" on Python {here[0]['python']}" if here and name != "python" else ""
    return note(
        name,
        f"{version} is within what is asked for, but the tests run with {' and '.join(dict.fromkeys(known))}{where}",
        "none needed; if something looks wrong, try that version",
    )


def is_version(version: str, tested: str) -> bool:
    """Whether a version is a tested one, or a build or patch release of it: 2.13.0+cpu is 2.13.0, 3.11.7 is 3.11."""
    return (
        not Version(version).is_prerelease
        and Version(version).release[: len(Version(tested).release)] == Version(tested).release
    )
