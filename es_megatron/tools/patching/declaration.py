"""What a list of patches says, and the reading of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from es_megatron.config import build, require
from es_megatron.errors import ConfigError
from es_megatron.tools.resources import resource

FILE = "patches.yaml"

Version = tuple[int, ...]

_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_RANGE = re.compile(r">=(\d+(?:\.\d+)*),<(\d+(?:\.\d+)*)")


@dataclass(frozen=True)
class Patch:
    """One name of an upstream that is replaced by a wrapper around what it was."""

    name: str
    """Unique within its list and version, for messages."""

    target: str
    """`module:attribute`: the name as the code that is to be reached looks it up."""

    glue: str
    """`module:function`: takes the original and returns its replacement."""

    versions: str
    """Upstream versions the entry is for, `>=LOW,<HIGH`."""

    parameters: list[str]
    """Parameters of the original that the glue, or what it passes on, relies on."""

    why: str
    """What the patch is for, in a line."""

    def __post_init__(self) -> None:
        """Check the forms."""
        for field in ("target", "glue"):
            value = getattr(self, field)
            require(_PLACE.fullmatch(value) is not None, field, "of the form `module:attribute`", value)
        require(_RANGE.fullmatch(self.versions) is not None, "versions", "of the form `>=LOW,<HIGH`", self.versions)

    def covers(self, version: Version) -> bool:
        """Whether the entry is for a version."""
        found = _RANGE.fullmatch(self.versions)
        assert found is not None
        return parse_version(found[1]) <= version < parse_version(found[2])


@dataclass(frozen=True)
class PatchList:
    """All patches of one upstream."""

    upstream: str
    """Its name, for messages."""

    version: str
    """`module:attribute` that tells its version."""

    supported: list[str]
    """`major.minor` of the versions that the patches have been run with."""

    patches: list[Patch]

    def __post_init__(self) -> None:
        """Check the forms."""
        require(_PLACE.fullmatch(self.version) is not None, "version", "of the form `module:attribute`", self.version)
        require(bool(self.supported), "supported", "a list with at least one version", self.supported)
        for version in self.supported:
            require(len(parse_version(version)) == 2, "supported", "a list of `major.minor`", version)

    def supports(self, version: Version) -> bool:
        """Whether a version is one of those."""
        return version[:2] in [parse_version(each) for each in self.supported]

    def nearest(self, version: Version) -> str:
        """The supported version nearest to another one; of two as near the older one."""

        def place(version: Version) -> int:
            major, minor = (*version, 0)[:2]
            return 1000 * major + minor

        at = place(version)
        return min(self.supported, key=lambda each: (abs(place(parse_version(each)) - at), parse_version(each)))


def parse_version(text: str) -> Version:
    """The leading numbers of a version: `0.16.1rc2+abc` is (0, 16, 1).

    Raises:
        ConfigError: it does not begin with a number.
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    if found is None:
        raise ConfigError(f"A version must begin with a number, but is {text!r} instead.")
    return tuple(int(part) for part in found[0].split("."))


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
