"""Documents of a corpus: how they are read and counted, which are kept, and on which side they stand.

Everything here is a pure function of the files and the settings: no random numbers, no dependence on worker processes.

Shapes: N documents of one corpus, in file order, those without text left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from es_megatron.errors import DataError
from es_megatron.prepare.finding import Corpus
from es_megatron.prepare.reading import read_entries, refusal, text_of

_SHOWN = 20


@dataclass
class Tally:
    """What a pass over a corpus has left out or changed."""

    read: int = 0
    """Entries of all files: lines, elements of arrays, rows, plain texts; blank lines are none."""

    empty: int = 0
    """Entries left out because they hold no text or white space alone."""

    bad: Counter[str] = field(default_factory=Counter[str])
    """Entries left out because they are no documents, by what is wrong with them."""

    bad_places: list[str] = field(default_factory=list[str])
    """Where the first of those stand, and what is wrong with each."""

    byte_order_marks: int = 0
    """Marks dropped before an entry."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus has found."""

    bytes_N: NDArray[np.int64]
    """Size of each document in UTF-8."""

    hashes_N: NDArray[np.uint64]
    """Hash of each document's text; equal texts have equal hashes."""

    tally: Tally
    """What is not among them."""

    files_F: NDArray[np.int64]
    """Documents of each file."""

    @property
    def repeats(self) -> NDArray[np.bool_]:
        """Documents whose text stood before, bool [N]."""
        repeated_N = np.ones(len(self.hashes_N), np.bool_)
        repeated_N[np.unique(self.hashes_N, return_index=True)[1]] = False
        return repeated_N

    @property
    def duplicates(self) -> int:
        """How many documents' text stood before."""
        return int(self.repeats.sum())

    def duplicates_by_file(self, corpus: Corpus) -> dict[str, int]:
        """The same for each file of the corpus that has some, the most first."""
        file_N = np.repeat(np.arange(len(self.files_F)), self.files_F)
        counts_F = np.bincount(file_N[self.repeats], minlength=len(self.files_F))
        order = np.argsort(-counts_F, kind="stable")
        return {str(corpus.files[at]): int(counts_F[at]) for at in order if counts_F[at]}


def read_documents(corpus: Corpus, tally: Tally | None = None) -> Iterator[tuple[int, str]]:
    """Read the documents of a corpus that are more than white space.

    Args:
        corpus: What to read.
        tally: Counts what is left out.

    Yields:
        Number of the document's file, and its text.

    Raises:
        DataError: A file cannot be read or is damaged; or an entry is no document, and the corpus does not skip those.
        ConfigError: A library that a file needs is not installed.
    """
    tally = tally or Tally()
    key = corpus.text_key
    for number, path in enumerate(corpus.files):
        for found in read_entries(path, key):
            entry = text_of(found, key)
            tally.read += 1
            tally.byte_order_marks += entry.marked
            if entry.problem is None:
                text: str = entry.values[key]
                if text.strip():
                    yield number, text
                else:
                    tally.empty += 1
                continue
            if corpus.on_bad_line == "error":
                raise refusal(entry, key)
            tally.bad[entry.problem] += 1
            if len(tally.bad_places) < _SHOWN:
                tally.bad_places.append(f"{entry.where}: {entry.problem}")


def documents(corpus: Corpus) -> Iterator[str]:
    """Read the documents that a `Survey` counts: those that are more than white space."""
    return (text for _, text in read_documents(corpus))


def survey(corpus: Corpus, report: Callable[[int], object] = lambda _: None) -> Survey:
    """Read a corpus once, checking every line, before hours of work rest on it.

    Args:
        corpus: What to read.
        report: Called with the bytes of text of each document.

    Raises:
        DataError: As `read_documents` does; or the corpus has no text at all.
        ConfigError: As `read_documents` does.
    """
    sizes: list[int] = []
    hashes: list[int] = []
    files_F = np.zeros(len(corpus.files), np.int64)
    tally = Tally()
    for number, text in read_documents(corpus, tally):
        encoded = text.encode("utf-8")
        sizes.append(len(encoded))
        hashes.append(_hash(encoded))
        files_F[number] += 1
        report(len(encoded))
    if not sizes:
        bad = f" ({sum(tally.bad.values())} entries are no documents)" if tally.bad else ""
        raise DataError(
            f"Component `{corpus.name}` has no document with text in its {len(corpus.files)} file(s){bad}: leave it "
            "out."
        )
    return Survey(np.asarray(sizes, np.int64), np.asarray(hashes, np.uint64), tally, files_F)


def hash_text(text: str) -> int:
    """The hash by which a document is held out or not; equal texts have equal ones."""
    return _hash(text.encode("utf-8"))


def _hash(encoded: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def choose_evenly(bytes_N: NDArray[np.int64], limit: int | None) -> NDArray[np.bool_]:
    """Choose documents evenly over a corpus, whatever their sizes, of at most `limit` bytes together.

    Args:
        bytes_N: Size of each document.
        limit: In bytes; None keeps all.

    Returns:
        Which documents are kept, bool [N]; none if the first one tried is larger than the limit.
    """
    kept_N = np.ones(len(bytes_N), np.bool_)
    count, total = len(bytes_N), int(bytes_N.sum())
    while limit is not None and total > limit:
        count = min(count - 1, int(count * limit / total))
        kept_N[:] = False
        # Middles of `count` equal stretches of the corpus.
        kept_N[((2 * np.arange(count) + 1) * len(bytes_N)) // (2 * max(count, 1))] = True
        total = int(bytes_N[kept_N].sum())
    return kept_N


def choose_validation(
    corpora: Sequence[NDArray[np.uint64]], share: float, evaluated: Sequence[bool] | None = None
) -> list[NDArray[np.bool_]]:
    """Choose the documents held out for validation by their text.

    A text stands on the same side in every corpus, so that exact duplicates never straddle the split; and in every
    preparation with this share, where there are enough documents; a larger share only adds to the held-out texts. An
    evaluated corpus of at least two different texts has one on either side: if none falls below the share, that of the
    smallest hash is held out, and if all do, that of the largest is trained on.

    Args:
        corpora: Hash of each document, for each corpus [N].
        share: Of the documents, in [0, 1); 0 holds none out.
        evaluated: Whether each corpus must have both sides; None: all must.

    Returns:
        Which documents are held out, bool [N] for each corpus.
    """
    # 53 bits: exact in float64
    held = [(hashes_N >> np.uint64(11)).astype(np.float64) < share * 2.0**53 for hashes_N in corpora]
    added: list[np.uint64] = []
    dropped: list[np.uint64] = []
    for hashes_N, held_N, both in zip(corpora, held, evaluated or [True] * len(corpora), strict=True):
        if not both or share == 0 or not len(hashes_N) or hashes_N.min() == hashes_N.max():
            continue
        if not held_N.any():
            added.append(hashes_N.min())
        elif held_N.all():
            dropped.append(hashes_N.max())
    return [
        (held_N | np.isin(hashes_N, added)) & ~np.isin(hashes_N, dropped)
        for hashes_N, held_N in zip(corpora, held, strict=True)
    ]
