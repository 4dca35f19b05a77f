"""What a list of patches says, and the reading of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from es_megatron.config import build, require
from es_megatron.errors import ConfigError
from es_megatron.resources import resource

FILE = "patches.yaml"

_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Patch:
    """One name of an upstream that is replaced by a wrapper around what it was."""

    name: str
    """Unique within its list and version, for messages."""

    target: str
    """`module:attribute`: the name as the code that is to be reached looks it up."""

    glue: str
    """`module:function`: takes the original and returns its replacement."""

    parameters: list[str]
    """Parameters of the original that the glue, or what it passes on, relies on."""

    why: str
    """What the patch is for, in a line."""

    versions: str = ""
    """Upstream versions the entry is for, such as `>=0.14,<0.16`; empty: all."""

    def __post_init__(self) -> None:
        """Check the forms."""
        for name in ("target", "glue"):
            value = getattr(self, name)
            require(_PLACE.fullmatch(value) is not None, name, "of the form `module:attribute`", value)
        check_range(self.versions)

    def covers(self, version: Version) -> bool:
        """Whether the entry is for a version."""
        return is_within(version, self.versions)


@dataclass(frozen=True)
class Broken:
    """Versions that are known not to work, though their targets may be as declared."""

    versions: str
    """Such as `<0.12`, or `==0.15.1`."""

    why: str
    """What goes wrong there, in a line."""

    def __post_init__(self) -> None:
        """Check the form."""
        require(bool(self.versions), "versions", "a range of versions", self.versions)
        check_range(self.versions)


@dataclass(frozen=True)
class PatchList:
    """All patches of one upstream."""

    upstream: str
    """Its name, for messages."""

    version: str
    """`module:attribute` that reports its version."""

    tested: list[str]
    """`major.minor` of the versions that the patches have been run with."""

    patches: list[Patch]

    broken: list[Broken] = field(default_factory=list[Broken])
    """Versions that are refused."""

    def __post_init__(self) -> None:
        """Check the forms."""
        require(_PLACE.fullmatch(self.version) is not None, "version", "of the form `module:attribute`", self.version)
        require(bool(self.tested), "tested", "a list with at least one version", self.tested)
        for version in self.tested:
            require(len(parse_version(version).release) == 2, "tested", "a list of `major.minor`", version)

    def is_tested(self, version: Version) -> bool:
        """Whether the patches have been run with a version, or another patch release of it."""
        return (version.major, version.minor) in [parse_version(each).release for each in self.tested]

    def why_broken(self, version: Version) -> str | None:
        """What is known to go wrong with a version; None for nothing."""
        return next((each.why for each in self.broken if is_within(version, each.versions)), None)


def parse_version(text: str) -> Version:
    """Read a version.

    Raises:
        ConfigError: it is none (PEP 440).
    """
    try:
        return Version(text)
    except InvalidVersion as error:
        raise ConfigError(f"A version must be of the form `0.16.1`, but is {text!r} instead.") from error


def is_within(version: Version, versions: str) -> bool:
    """Whether a version is in a range; a release candidate counts as its release."""
    return SpecifierSet(versions).contains(version.base_version)


def check_range(versions: str) -> None:
    """Refuse what is no range of versions (PEP 440).

    Raises:
        ConfigError: names it.
    """
    try:
        SpecifierSet(versions)
    except InvalidSpecifier as error:
        raise ConfigError(f"`versions` must be a range such as `>=0.12,<0.14`, but is {versions!r} instead.") from error


def upstreams() -> list[str]:
    """Names of the upstreams that there are patches for."""
    return sorted(path.parent.name for path in resource("patches").glob(f"*/{FILE}"))


def read_patches(upstream: str | Path) -> PatchList:
    """Read the list of an upstream.

    Args:
        upstream: its name, one of `upstreams()`, or the path of a `patches.yaml`.

    Raises:
        ConfigError: there is none, or it does not say what it must.
    """
    path = upstream if isinstance(upstream, Path) else resource("patches") / upstream / FILE
    if not path.is_file():
        raise ConfigError(f"There are no patches for `{upstream}`. Use one of: {', '.join(upstreams())}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"`{path}` must be YAML, but is not: {error}") from error
    return build(PatchList, content, str(path))
