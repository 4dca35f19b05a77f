"""Leave rows or documents out of a run, from its next start on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from es_megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from es_megatron.data.manifest import Manifest
    from es_megatron.frameworks.megatron_data import OneEpochDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="`run.directory`, or the folder of `--save`")
    parser.add_argument("rows", nargs="*", metavar="COMPONENT:ROWS", help="such as books:17 or books:40-45")
    parser.add_argument(
        "--documents", nargs="+", default=[], metavar="COMPONENT:DOCUMENTS", help="every row with a token of these"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file of all rows to skip; default: RUN/skipped.json"
    )


def run_skip(arguments: argparse.Namespace) -> int:
    """Add rows to the file of those that the run leaves out; returns 0."""
    from es_megatron.core.skipped import SKIPPED, check_rows, read_skipped, told, write_skipped
    from es_megatron.spikes.run_files import RunFiles

    if not arguments.rows and not arguments.documents:
        raise ConfigError("Rows or `--documents` must be named, but none are. For example: books:17 books:40-45")
    run = RunFiles(arguments.run_directory)
    manifest = run.manifest(run.newest)
    output: Path = arguments.output or arguments.run_directory / SKIPPED
    named: dict[str, set[int]] = {}
    for each in arguments.rows:
        name, numbers = parse(each)
        named.setdefault(name, set()).update(numbers)
    for each in arguments.documents:
        name, numbers = parse(each)
        check_rows(name, [], manifest)
        named.setdefault(name, set()).update(*(rows_of(opened(manifest, name), document) for document in numbers))
    rows = {name: sorted(each) for name, each in named.items()}
    for name, each in rows.items():
        check_rows(name, each, manifest)
    before = read_skipped(output, manifest) if output.exists() else {}
    both = {name: sorted({*before.get(name, []), *rows.get(name, [])}) for name in {**before, **rows}}
    try:
        write_skipped(output, manifest, both)
    except OSError as error:
        raise ConfigError(
            f"`{output}` cannot be written ({error.strerror}). Name another file by `--output`."
        ) from error
    print(f"{output}: leaves out {told(both)} from the next start of the run on")
    if arguments.output is not None or run.settings is None:
        print(f"Start it with `evolved_sampling.order.skip={output}` (`--es-order-skip {output}` elsewhere).")
    return 0


def parse(word: str) -> tuple[str, range]:
    """Component and numbers of `books:17` or `books:40-45`, both ends included.

    Raises:
        ConfigError: it is of another form.
    """
    name, _, numbers = word.rpartition(":")
    first, _, last = numbers.partition("-")
    last = last or first
    if not (name and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(
            f"`{word}` must be COMPONENT:NUMBER or COMPONENT:FIRST-LAST, such as books:17 or books:40-45."
        )
    return name, range(int(first), int(last) + 1)


def opened(manifest: Manifest, name: str) -> OneEpochDataset:
    """The tokens of a component.

    Raises:
        DataError: they cannot be read, or are others than the run's.
    """
    from es_megatron.spikes.run_files import dataset_of

    dataset = dataset_of(manifest, name)
    if dataset is None:
        raise DataError(
            f"The files of `{name}` must be those of the run to tell the rows of its documents, but are missing or "
            "others. Restore them, or name rows."
        )
    return dataset


def rows_of(dataset: OneEpochDataset, document: int) -> range:
    """Rows whose T + 1 tokens have one of a document.

    Raises:
        DataError: there is no such document, or it has no token in any row.
    """
    file = dataset.file
    if document >= file.documents:
        raise DataError(
            f"Documents of `{dataset.name}` must be in [0, {file.documents}), but one is {document}. Correct it."
        )
    bounds: NDArray[np.int64] = file.document_bounds()[document : document + 2]
    starts = file.sequence_starts()
    first, end = (
        int(starts[each]) // file.dtype.itemsize if each < file.sequences else file.tokens for each in bounds.tolist()
    )
    length = dataset.seq_length  # the first token of a document may be the last label of the row before
    found = range(max(0, first - 1) // length, min(len(dataset), (end - 1) // length + 1))
    if first == end or not found:
        raise DataError(f"Document {document} of `{dataset.name}` has no token in any row. Leave it out.")
    return found
