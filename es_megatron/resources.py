"""Where the folders are that are shipped beside the package: patches, launch files, configs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from es_megatron.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def resource(name: Literal["patches", "launch", "configs"]) -> Path:
    """Find a shipped folder, in an installed package or in a checkout.

    Args:
        name: which folder.

    Returns:
        The folder's absolute path: `es_megatron/_shipped/NAME` of an installed wheel, else the top-level folder of the
        checkout the package is imported from.

    Raises:
        ConfigError: it is in neither place.
    """
    candidates = (PACKAGE / "_shipped" / name, PACKAGE.parent / name)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    places = " or ".join(str(candidate) for candidate in candidates)
    raise ConfigError(
        f"The folder `{name}` must be at {places}, but is not: reinstall es_megatron, or use a whole checkout."
    )
