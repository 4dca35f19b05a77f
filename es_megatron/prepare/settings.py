"""What `es-megatron prepare` is told, and its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from es_megatron.errors import ConfigError
from es_megatron.prepare.finding import OnBadLine
from es_megatron.prepare.tokenizer import SMALLEST

VOCAB_SIZE = 8_192


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and how."""

    output: Path
    """The folder to make."""

    components: tuple[str, ...] = ()
    """NAME=PATH each; a name may stand more than once."""

    demo: bool = False
    """Prepare the three demo corpora instead of `components`."""

    demo_wheels: Path | None = None
    """A folder that already holds the demo's wheels; None: download them."""

    train_only: tuple[str, ...] = ()
    """Names of components that are not evaluated. Their texts that would be held out are left out, so that no copy of
    another component's held-out text is trained on."""

    text_key: str = "text"
    """The field of JSON, or the column of Parquet, that holds the text."""

    on_bad_line: OnBadLine = "error"
    """What is done with an entry that is no document: an error, or left out and counted."""

    tokenizer: Path | None = None
    """A sentencepiece model; None: train one."""

    vocab_size: int | None = None
    """Ids of a trained tokenizer, at least 260; None: 8192."""

    tokenizer_megabytes: float = 10.0
    """Text a tokenizer is trained on at most, above 0."""

    validation_share: float = 0.02
    """Share of the documents held out, in [0, 1); above 0, at least one of two."""

    max_megabytes: float | None = None
    """Text kept of each component at most, above 0; None: all."""

    workers: int = 2
    """Processes that tokenise, at least 1."""

    overwrite: bool = False
    """Replace an output made before."""

    progress: bool = True
    """Show progress bars on a terminal."""

    def __post_init__(self) -> None:
        """Check the settings."""
        _require(
            bool(self.components) != self.demo, "--component", "given unless --demo is (not both)", self.components
        )
        size = self.vocab_size
        _require(size is None or size >= SMALLEST, "--vocab-size", f"at least {SMALLEST}", size)
        _require(size is None or self.tokenizer is None, "--vocab-size", "left out when --tokenizer is given", size)
        _require(self.tokenizer_megabytes > 0, "--tokenizer-megabytes", "above 0", self.tokenizer_megabytes)
        _require(0 <= self.validation_share < 1, "--validation-share", "in [0, 1)", self.validation_share)
        _require(self.max_megabytes is None or self.max_megabytes > 0, "--max-megabytes", "above 0", self.max_megabytes)
        _require(self.workers >= 1, "--workers", "at least 1", self.workers)
        _require(self.demo or self.demo_wheels is None, "--demo-wheels", "used with --demo", self.demo_wheels)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `es-megatron prepare`."""
    default = PrepareSettings  # its class attributes are the defaults
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add(
        "--component",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="file, folder or quoted pattern; repeatable",
    )
    add("--demo", action="store_true", help="prepare three public corpora instead of components of your own")
    add("--demo-wheels", type=Path, metavar="DIR", help="folder that already holds the wheels of --demo")
    add("--train-only", action="append", default=[], metavar="NAME", help="a component not evaluated; repeatable")
    add("--text-key", default=default.text_key, help="field or column that holds the text (%(default)s)")
    add(
        "--on-bad-line",
        choices=get_args(OnBadLine),
        default=default.on_bad_line,
        help="what to do with entries that are no documents: stop, or leave them out and count them (%(default)s)",
    )
    add("--tokenizer", type=Path, metavar="MODEL", help="a sentencepiece model; else one is trained")
    add("--vocab-size", type=int, metavar="N", help=f"ids of the trained tokenizer ({VOCAB_SIZE})")
    add(
        "--tokenizer-megabytes",
        type=float,
        default=default.tokenizer_megabytes,
        help="text to train it on (%(default)s)",
    )
    add("--validation-share", type=float, default=default.validation_share, help="documents held out (%(default)s)")
    add("--max-megabytes", type=float, help="text of each component, chosen evenly over its documents (all)")
    add("--workers", type=int, default=default.workers, help="processes that tokenise (%(default)s)")
    add("--overwrite", action="store_true", help="replace an output made by this command before")
    add("--no-progress", dest="progress", action="store_false", help="no progress bars")


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {rule}, but is {value!r} instead.")
