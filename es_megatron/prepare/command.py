"""`es-megatron prepare`: text files to Megatron's `.bin` and `.idx`, a tokenizer, a split, and a blend file.

The output folder appears at once and whole: everything is written into a hidden folder beside it, which is renamed.
"""

from __future__ import annotations

import argparse
import errno
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from es_megatron.errors import ConfigError, DataError
from es_megatron.prepare import corpus as corpora
from es_megatron.prepare.corpus import Survey
from es_megatron.prepare.demo_corpus import write_demo_corpora
from es_megatron.prepare.finding import Corpus, find_corpus, parse_component
from es_megatron.prepare.output_folder import appearing_folder, check_output
from es_megatron.prepare.settings import VOCAB_SIZE, PrepareSettings, add_arguments
from es_megatron.prepare.summary import lost, summarise
from es_megatron.prepare.tokenizer import load_tokenizer, read_tokenizer, train_tokenizer
from es_megatron.prepare.writing import Selected, progress_bar, write_blend, write_component

__all__ = ["PrepareSettings", "add_arguments", "prepare", "run_prepare", "summarise"]

MEGABYTE = 10**6
SOMETHING_UNREAD = 3
"""Exit code where the output is made, but something that was found could not be read."""


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare what the command line asks for; prints a summary.

    Returns:
        0, or 3 where something in a folder or a pattern was not read: the summary names it.

    Raises:
        ConfigError: See `prepare`.
        DataError: See `prepare`.
    """
    values = {name: value for name, value in vars(args).items() if name in PrepareSettings.__dataclass_fields__}
    values["train_only"] = tuple(args.train_only)
    settings = PrepareSettings(components=tuple(args.component), **values)
    report = prepare(settings)
    print(summarise(report, settings.output))
    return SOMETHING_UNREAD if lost(report) else 0


def prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Prepare a folder; returns what its `prepare.json` says.

    Raises:
        ConfigError: A setting is out of range, the output exists, or the vocabulary does not fit the text.
        DataError: Input is missing or damaged, a side of the split is empty, or the disk is full.
    """
    start = time.monotonic()
    output = settings.output
    check_output(output, overwrite=settings.overwrite)
    try:
        with appearing_folder(output, replace=settings.overwrite) as folder:
            report = _prepare_into(folder, settings)
            report["seconds"] = round(time.monotonic() - start, 2)
            _write_json(folder / "prepare.json", report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"The disk of `{output}` is full: free some space, or choose another `--output`."
            ) from error
        raise DataError(f"`{output}` cannot be written ({error}): check `--output` and its permissions.") from error
    return report


def _prepare_into(folder: Path, settings: PrepareSettings) -> dict[str, Any]:
    raw = folder / "raw"
    raw.mkdir()
    selected = _select(_find_corpora(raw, settings), settings)
    if settings.tokenizer is None:
        model = train_tokenizer(_tokenizer_sample(selected, settings), settings.vocab_size or VOCAB_SIZE)
    else:
        model = read_tokenizer(settings.tokenizer)
    tokenizer = load_tokenizer(model, str(settings.tokenizer or "tokenizer.model"))
    (folder / "tokenizer.model").write_bytes(model)
    vocab_size = int(tokenizer.vocab_size())
    components = [write_component(folder, one, model, vocab_size, settings) for one in selected]
    shutil.rmtree(raw)
    write_blend(folder / "blend.yaml", components, vocab_size)
    return {
        "components": components,
        "vocab_size": vocab_size,
        "end_of_document": int(tokenizer.eos_id()),
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("megatron-core", "numpy", "sentencepiece")},
        },
    }


def _find_corpora(raw: Path, settings: PrepareSettings) -> list[Corpus]:
    if settings.demo:
        return write_demo_corpora(raw, settings.demo_wheels)
    paths: dict[str, list[str]] = {}
    for argument in settings.components:
        name, path = parse_component(argument)
        paths.setdefault(name, []).append(path)
    found = [find_corpus(name, places, settings.text_key, settings.on_bad_line) for name, places in paths.items()]
    unknown = [name for name in settings.train_only if name not in paths]
    if unknown:
        raise ConfigError(f"`--train-only` must name components, but `{unknown[0]}` is not among {', '.join(paths)}.")
    output = settings.output.resolve()
    for corpus in found:
        inside = [path for path in corpus.files if output in path.resolve().parents]
        if inside:
            raise ConfigError(
                f"`--output` must not hold the input, but `{inside[0]}` is inside: choose another folder."
            )
    return found


def _select(found: Sequence[Corpus], settings: PrepareSettings) -> list[Selected]:
    """Decide for each document whether it is kept, and on which side."""
    limit = None if settings.max_megabytes is None else int(settings.max_megabytes * MEGABYTE)
    surveys = [_survey(corpus, settings) for corpus in found]
    kept = [corpora.choose_evenly(survey.bytes_N, limit) for survey in surveys]
    held = corpora.choose_validation(
        [survey.hashes_N[kept_N] for survey, kept_N in zip(surveys, kept, strict=True)],
        settings.validation_share,
        [corpus.name not in settings.train_only for corpus in found],
    )
    return [_fate(*each, settings) for each in zip(found, surveys, kept, held, strict=True)]


def _survey(corpus: Corpus, settings: PrepareSettings) -> Survey:
    total = sum(path.stat().st_size for path in corpus.files)
    with progress_bar(f"{corpus.name}: read", total, settings) as bar:  # compressed files hold more than their size
        return corpora.survey(corpus, bar.update)


def _fate(
    corpus: Corpus,
    survey: Survey,
    kept_N: NDArray[np.bool_],
    held_K: NDArray[np.bool_],
    settings: PrepareSettings,
) -> Selected:
    """Put a corpus together with what was decided; `held_K` is of the kept documents."""
    beyond = int((~kept_N).sum())
    if not kept_N.any():
        raise DataError(
            f"No document of component `{corpus.name}` fits into `--max-megabytes` {settings.max_megabytes} (the "
            f"mean is {survey.bytes_N.mean() / MEGABYTE:.3f}): raise it, or cut the documents."
        )
    validation_N = np.zeros_like(kept_N)
    validation_N[kept_N] = held_K
    if corpus.name in settings.train_only:
        kept_N = kept_N & ~validation_N
        if not kept_N.any():
            raise _one_sided(corpus, len(held_K), "All", "lower", settings)
        return Selected(corpus, survey, kept_N, np.zeros_like(kept_N), beyond, int(held_K.sum()))
    if settings.validation_share > 0 and not held_K.any():
        raise _one_sided(corpus, len(held_K), "None", "raise", settings)
    if held_K.all():
        raise _one_sided(corpus, len(held_K), "All", "lower", settings)
    return Selected(corpus, survey, kept_N, validation_N, beyond)


def _one_sided(corpus: Corpus, count: int, which: str, do: str, settings: PrepareSettings) -> DataError:
    """What keeps a corpus from being split: at most one text, or others' held-out texts alone."""
    return DataError(
        f"{which} of the {count} documents of component `{corpus.name}` fall{'s' if which == 'None' else ''} into the "
        f"validation share of {settings.validation_share}: {do} `--validation-share` (0 goes without), or give more "
        "documents."
    )


def _tokenizer_sample(selected: Sequence[Selected], settings: PrepareSettings) -> Iterator[str]:
    """Training documents, evenly from all components, with the same limit for each."""
    limit = int(settings.tokenizer_megabytes * MEGABYTE / len(selected))
    for one in selected:
        train_N = one.kept_N & ~one.validation_N
        chosen_N = np.zeros_like(train_N)
        chosen_N[train_N] = corpora.choose_evenly(one.survey.bytes_N[train_N], limit)
        if chosen_N.any():
            yield from one.texts(chosen_N)
        else:  # one document is larger than the limit
            yield next(one.texts(train_N))[:limit]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
