"""The sentencepiece tokenizer of a preparation: trained on a sample of the text, or given; and its worker processes."""

from __future__ import annotations

import io
import multiprocessing
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

SMALLEST = 300
"""Byte pieces (256), unknown, end of document, and room for some characters."""

_SENTENCE = 2_000  # characters; the trainer's time grows faster than the length of its sentences
_BATCH = 1 << 20  # characters sent to a worker at once

Batch = list[str]
Tokens = tuple[NDArray[np.int32], NDArray[np.int64]]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE model: the same texts in the same order give the same model.

    Bytes stand in for unseen characters, and text is not normalised, so that decoding gives the text back (but U+2581,
    which is sentencepiece's own sign for a space). Id 0 is unknown, id 1 the end of a document.

    Args:
        texts: The sample.
        vocab_size: Number of ids.

    Raises:
        ConfigError: `vocab_size` is too small for the characters, or too large for the amount, of text.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(sentence for text in texts for sentence in _sentences(text)),
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
    if "required_chars" in last or "smaller" in last:
        return ConfigError(
            f"`--vocab-size` {vocab_size} cannot hold the characters of this text ({last}): raise it (2000 fits "
            "most text)."
        )
    return ConfigError(
        f"No tokenizer can be trained with `--vocab-size` {vocab_size}: {last}. Change the size or the text."
    )


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
        tokenizer = SentencePieceProcessor(model_proto=model)
        end = tokenizer.eos_id()
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

    def encode(self, texts: Batch) -> Tokens:
        ids = [self.tokenizer.encode(text, out_type=int) for text in texts]
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
