"""Errors that a user can act on: each message names the thing that is wrong and the cure."""

from __future__ import annotations


class EsError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(EsError):
    """A setting is unknown, out of range, or cannot work together with another one."""


class DataError(EsError):
    """A data file is missing, truncated, or not what it says it is."""


class CheckpointError(EsError):
    """A checkpoint cannot be written, is damaged, or belongs to another run."""


class LossError(EsError):
    """Too many losses or gradients are not finite to go on."""


class LayoutError(EsError):
    """The parallel layout cannot hold the run: world size, stages, micro-batches."""


class PatchError(EsError):
    """An upstream is not as the patches of it rely on: version, missing name, changed signature."""


class PeerError(EsError):
    """Another rank of the job has failed, or cannot be reached any more."""
