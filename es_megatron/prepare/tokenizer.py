"""The sentencepiece tokenizer of a preparation: trained on a sample of the text, or given; and its worker processes."""

from __future__ import annotations

import io
import multiprocessing
import re
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from es_megatron.errors import ConfigError, DataError

SMALLEST = 260
"""Byte pieces (256), unknown, end of document, and two characters."""

SPACE_SIGN = "\u2581"
"""What sentencepiece writes for a space: in a text of its own it would come back as a space."""

_SENTENCE = 2_000  # characters; the trainer's time grows faster than the length of its sentences
_BATCH = 1 << 20  # characters sent to a worker at once

Batch = list[str]
Tokens = tuple[NDArray[np.int32], NDArray[np.int64]]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE model: the same texts in the same order give the same model.

    Bytes stand in for unseen characters, and text is not normalised, so that decoding gives the text back. Id 0 is
    unknown, id 1 the end of a document.

    Args:
        texts: The sample.
        vocab_size: Number of ids.

    Raises:
        ConfigError: `vocab_size` is too small for the characters, or too large for the amount, of text.
    """
    model = io.BytesIO()
    failures: list[Exception] = []
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_guarded(texts, failures),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _SENTENCE,
            num_threads=1,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise _training_error(str(error), vocab_size) from error
    return model.getvalue()


def _training_error(message: str, vocab_size: int) -> ConfigError:
    """Turn sentencepiece's message into a cure."""
    last = message.strip().splitlines()[-1]
    if "too high" in last:
        limit = last.rstrip(". ").rpartition("<=")[2].strip()
        return ConfigError(
            f"`--vocab-size` must be at most {limit} for this much text, but is {vocab_size} instead: lower "
            "it, or add text."
        )
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", last):
        return ConfigError(
            f"`--vocab-size` must be at least {needed[1]} for the characters of this text, but is {vocab_size} "
            "instead: raise it."
        )
    return ConfigError(
        f"No tokenizer can be trained with `--vocab-size` {vocab_size}: {last}. Change the size or the text."
    )


def _guarded(texts: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """Sentences of all texts; keeps what goes wrong in `texts`, which sentencepiece would tell in its own words."""
    try:
        for text in texts:
            yield from _sentences(text)
    except Exception as error:
        failures.append(error)
        raise


def _sentences(text: str) -> Iterator[str]:
    """Cut a text into what the trainer takes at once, at line ends where possible."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _SENTENCE) + 1 if len(text) - start > _SENTENCE else len(text)
        end = end or start + _SENTENCE
        yield text[start:end]
        start = end


def load_tokenizer(model: bytes, where: str) -> SentencePieceProcessor:
    """Load a model.

    Raises:
        DataError: It is not a sentencepiece model.
        ConfigError: It has no id for the end of a document.
    """
    try:
        tokenizer = SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(model)
        end = int(tokenizer.eos_id())
    except RuntimeError as error:
        raise DataError(f"`{where}` must be a sentencepiece model, but is not: give another `--tokenizer`.") from error
    if end < 0:
        raise ConfigError(
            f"`{where}` has no end-of-sentence id, which ends documents here: give another `--tokenizer`, or train one."
        )
    return tokenizer


def read_tokenizer(path: Path) -> bytes:
    """Read a model's bytes.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Tokenizer `{path}` cannot be read ({error.strerror}): correct `--tokenizer`.") from error


class _Encoder:
    """Texts to ids; its instance in a worker process is made once, by `_start_worker`."""

    def __init__(self, model: bytes) -> None:
        self.tokenizer = SentencePieceProcessor(model_proto=model)
        self.end = self.tokenizer.eos_id()
        self.space_sign = self._space_sign_ids()

    def _space_sign_ids(self) -> list[int]:
        """Ids of the bytes of U+2581, if the tokenizer gives it back from them; none otherwise."""
        ids = [int(self.tokenizer.piece_to_id(f"<0x{byte:02X}>")) for byte in SPACE_SIGN.encode()]
        around = [self.tokenizer.encode(text, out_type=int) for text in "ab"]
        return ids if self.tokenizer.decode([*around[0], *ids, *around[1]]) == f"a{SPACE_SIGN}b" else []

    def _encode(self, text: str) -> list[int]:
        if not self.space_sign or SPACE_SIGN not in text:
            return self.tokenizer.encode(text, out_type=int)
        ids: list[int] = []
        for part in text.split(SPACE_SIGN):
            ids += [*self.tokenizer.encode(part, out_type=int), *self.space_sign]
        return ids[: -len(self.space_sign)]

    def encode(self, texts: Batch) -> Tokens:
        ids = [self._encode(text) for text in texts]
        lengths = np.asarray([len(document) + 1 for document in ids], np.int64)
        tokens = np.empty(int(lengths.sum()), np.int32)
        start = 0
        for document in ids:
            tokens[start : start + len(document)] = document
            tokens[start + len(document)] = self.end
            start += len(document) + 1
        return tokens, lengths


_worker: list[_Encoder] = []


def _start_worker(model: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _worker[:] = [_Encoder(model)]


def _work(texts: Batch) -> Tokens:
    return _worker[0].encode(texts)


def tokenize(texts: Iterable[str], model: bytes, workers: int) -> Iterator[Tokens]:
    """Turn texts into ids, each text ended by the end-of-document id; the order is that of the texts for any `workers`.

    Args:
        texts: One a document.
        model: A sentencepiece model that `load_tokenizer` took.
        workers: Processes, at least 1; 1 works in this process.

    Yields:
        For some documents: their ids one after the other, int32, and the length of each, int64.

    Raises:
        DataError: A worker process died.
    """
    if workers == 1:
        encoder = _Encoder(model)
        yield from map(encoder.encode, _batches(texts))
        return
    # fork: nothing is imported again, and this process runs no thread that holds a lock when the pool starts.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (model,))
    waiting: deque[Future[Tokens]] = deque()
    try:
        for batch in _batches(texts):
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * workers:  # bounds memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that tokenises died, most likely for want of memory: use fewer `--workers`, or cut "
            "huge documents."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(texts: Iterable[str]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
