"""The token files of a component, and the blend file of all."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from es_megatron.errors import DataError
from es_megatron.frameworks.token_hash import check_ids, take_hash, write_hash
from es_megatron.prepare import corpus as corpora
from es_megatron.prepare.corpus import Survey
from es_megatron.prepare.demo_corpus import SOURCES
from es_megatron.prepare.finding import Corpus
from es_megatron.prepare.settings import PrepareSettings
from es_megatron.prepare.tokenizer import tokenize


@dataclass(frozen=True)
class Selected:
    """A corpus with the fate of each document."""

    corpus: Corpus
    survey: Survey
    kept_N: NDArray[np.bool_]
    validation_N: NDArray[np.bool_]
    beyond_limit: int = 0
    """Documents that `--max-megabytes` has left out."""
    held_out_elsewhere: int = 0
    """Documents of a component of `--train-only` that a split would hold out."""

    @property
    def bytes_kept(self) -> int:
        """UTF-8 bytes of the documents that are kept."""
        return int(self.survey.bytes_N[self.kept_N].sum())

    def texts(self, chosen_N: NDArray[np.bool_]) -> Iterator[str]:
        """The documents where `chosen_N` is set."""
        for text, chosen in itertools.zip_longest(corpora.documents(self.corpus), chosen_N):
            if text is None or chosen is None:
                raise DataError(f"Files of component `{self.corpus.name}` changed while they were read: prepare again.")
            if chosen:
                yield text


def write_component(
    folder: Path, one: Selected, model: bytes, vocab_size: int, settings: PrepareSettings
) -> dict[str, Any]:
    """Tokenise one component into its training and validation files.

    Raises:
        DataError: Its files have changed since they were surveyed, or not every document has come out.
    """
    name = one.corpus.name
    sides = {"train": one.kept_N & ~one.validation_N, "validation": one.validation_N}
    prefixes = {"train": f"{name}.train", "validation": f"{name}.valid"}
    paths = {side: folder / prefixes[side] for side, chosen_N in sides.items() if chosen_N.any()}
    tokens = dict.fromkeys(sides, 0)
    held = iter(one.validation_N[one.kept_N])
    sizes = iter(one.survey.bytes_N[one.kept_N])
    with (
        _token_files(paths, vocab_size) as builders,
        progress_bar(f"{name}: tokenise", one.bytes_kept, settings) as bar,
    ):
        for ids, lengths in tokenize(one.texts(one.kept_N), model, settings.workers):
            for document in np.split(ids, np.cumsum(lengths)[:-1]):
                side = "validation" if next(held) else "train"
                builders[side].add_document(document, [len(document)])
                tokens[side] += len(document)
                bar.update(int(next(sizes)))
    written = {side: _seal(path, name, vocab_size) for side, path in paths.items()}
    counts = {
        side: {
            "prefix": prefixes[side] if side in paths else None,
            "documents": written.get(side, 0),
            "bytes": int(one.survey.bytes_N[chosen_N].sum()),
            "tokens": tokens[side],
        }
        for side, chosen_N in sides.items()
    }
    found = _account(one)
    if found["read"] != sum(written.values()) + left_out(found):
        raise DataError(
            f"{found['read']} entries of component `{name}` were read, but {sum(written.values())} documents were "
            f"written and {left_out(found)} left out: prepare again, and report this."
        )
    source = SOURCES[name] if settings.demo else [str(path) for path in one.corpus.files[:20]]
    return {"name": name, "source": source, "found": found, **counts}


def left_out(found: dict[str, Any]) -> int:
    """Entries that were read and are in no token file, by a component's account."""
    return (
        found["empty_documents"]
        + sum(found["bad_entries"].values())
        + found["beyond_limit"]
        + found["held_out_elsewhere"]
    )


def _seal(path: Path, name: str, vocab_size: int) -> int:
    """Write the hash of a pair of token files beside them; returns its documents, as the files say."""
    from es_megatron.frameworks.megatron_data import open_token_file  # imports torch

    file = open_token_file(path)
    known = take_hash(file)
    check_ids(name, file, known, vocab_size)
    write_hash(file, known)
    return file.documents


def _account(one: Selected) -> dict[str, Any]:
    """What became of all that stood in the files of a component."""
    survey, corpus = one.survey, one.corpus
    return {
        "files": len(corpus.files),
        "read": survey.tally.read,
        "documents": len(survey.bytes_N),
        "bytes": int(survey.bytes_N.sum()),
        "empty_documents": survey.tally.empty,
        "bad_entries": dict(survey.tally.bad),
        "bad_places": survey.tally.bad_places,
        "byte_order_marks": survey.tally.byte_order_marks,
        "beyond_limit": one.beyond_limit,
        "held_out_elsewhere": one.held_out_elsewhere,
        "duplicate_documents": survey.duplicates,
        "duplicates_by_file": survey.duplicates_by_file(corpus),
        "left_out": [each._asdict() for each in corpus.left_out],
    }


@contextmanager
def _token_files(paths: dict[str, Path], vocab_size: int) -> Generator[dict[str, Any]]:
    """One upstream builder for each path (without suffix); the indices are written when the block ends well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import megatron names optional packages that are of no use here
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)  # uint16 below 65,500 ids
    builders: dict[str, Any] = {}
    try:
        for side, path in paths.items():
            builders[side] = IndexedDatasetBuilder(f"{path}.bin", dtype)
        yield builders
        for side, path in paths.items():
            builders[side].finalize(f"{path}.idx")
    finally:
        for builder in builders.values():
            with suppress(OSError):  # a full disk has been told already
                builder.data_file.close()


def write_blend(path: Path, components: Sequence[dict[str, Any]], vocab_size: int) -> None:
    """Write the blend file of components, by size."""
    entries = [
        {
            "name": one["name"],
            "train": one["train"]["prefix"],
            "validation": one["validation"]["prefix"],
            "weight": None,
        }
        for one in components
    ]
    content = {"tokenizer": "tokenizer.model", "vocab_size": vocab_size, "components": entries}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def progress_bar(title: str, total: int | None, settings: PrepareSettings) -> Any:
    """A bar of bytes, on a terminal only."""
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None if settings.progress else True)
