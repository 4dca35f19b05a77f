"""`es-megatron prepare`: text files to Megatron's `.bin` and `.idx`, a tokenizer, a split, and a blend file.

The output folder appears at once and whole: everything is written into a hidden folder beside it, which is renamed.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import platform
import shutil
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from es_megatron.errors import ConfigError, DataError
from es_megatron.prepare import corpus as corpora
from es_megatron.prepare.corpus import Corpus, Survey
from es_megatron.prepare.demo_corpus import SOURCES, write_demo_corpora
from es_megatron.prepare.output_folder import appearing_folder, check_output
from es_megatron.prepare.tokenizer import SMALLEST, load_tokenizer, read_tokenizer, tokenize, train_tokenizer

MEGABYTE = 10**6
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
    """The field of a JSON line that holds the text."""

    tokenizer: Path | None = None
    """A sentencepiece model; None: train one."""

    vocab_size: int | None = None
    """Ids of a trained tokenizer, at least 260; None: 8192."""

    tokenizer_megabytes: float = 10.0
    """Text a tokenizer is trained on at most, above 0."""

    validation_share: float = 0.02
    """Share of the documents held out, in [0, 1)."""

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


@dataclass(frozen=True)
class _Selected:
    """A corpus with the fate of each document."""

    corpus: Corpus
    survey: Survey
    kept_N: NDArray[np.bool_]
    validation_N: NDArray[np.bool_]

    @property
    def bytes_kept(self) -> int:
        return int(self.survey.bytes_N[self.kept_N].sum())

    def texts(self, chosen_N: NDArray[np.bool_]) -> Iterator[str]:
        """The documents where `chosen_N` is set."""
        for text, chosen in itertools.zip_longest(corpora.documents(self.corpus), chosen_N):
            if text is None or chosen is None:
                raise DataError(f"Files of component `{self.corpus.name}` changed while they were read: prepare again.")
            if chosen:
                yield text


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
    add("--text-key", default=default.text_key, help="field of a JSON line that holds the text (%(default)s)")
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


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare what the command line asks for; prints a summary.

    Raises:
        ConfigError: See `prepare`.
        DataError: See `prepare`.
    """
    values = {name: value for name, value in vars(args).items() if name in PrepareSettings.__dataclass_fields__}
    values["train_only"] = tuple(args.train_only)
    settings = PrepareSettings(components=tuple(args.component), **values)
    print(summarise(prepare(settings), settings.output))
    return 0


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


def summarise(report: dict[str, Any], output: Path) -> str:
    """Put a report into a table."""
    lines = [f"{'component':<16}{'documents':>11}{'megabytes':>11}{'tokens':>13}{'validation':>12}"]
    for entry in report["components"]:
        train, validation = entry["train"], entry["validation"]
        megabytes = (train["bytes"] + validation["bytes"]) / MEGABYTE
        counts = f"{train['documents'] + validation['documents']:>11,}{megabytes:>11.2f}"
        lines.append(f"{entry['name']:<16}{counts}{train['tokens']:>13,}{validation['tokens']:>12,}")
    lines.append(f"vocabulary {report['vocab_size']:,}, {report['seconds']:.1f} s, blend file {output / 'blend.yaml'}")
    return "\n".join(lines)


def _prepare_into(folder: Path, settings: PrepareSettings) -> dict[str, Any]:
    raw = folder / "raw"
    raw.mkdir()
    selected = [_select(corpus, settings) for corpus in _find_corpora(raw, settings)]
    if settings.tokenizer is None:
        model = train_tokenizer(_tokenizer_sample(selected, settings), settings.vocab_size or VOCAB_SIZE)
    else:
        model = read_tokenizer(settings.tokenizer)
    tokenizer = load_tokenizer(model, str(settings.tokenizer or "tokenizer.model"))
    (folder / "tokenizer.model").write_bytes(model)
    vocab_size = int(tokenizer.vocab_size())
    components = [_write_component(folder, one, model, vocab_size, settings) for one in selected]
    shutil.rmtree(raw)
    _write_blend(folder / "blend.yaml", components, vocab_size)
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
        name, path = corpora.parse_component(argument)
        paths.setdefault(name, []).append(path)
    found = [corpora.find_corpus(name, places, settings.text_key) for name, places in paths.items()]
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


def _select(corpus: Corpus, settings: PrepareSettings) -> _Selected:
    """Decide for each document whether it is kept, and on which side."""
    total = sum(path.stat().st_size for path in corpus.files if not path.name.endswith(".gz")) or None
    with _bar(f"{corpus.name}: read", total, settings) as bar:
        survey = corpora.survey(corpus, bar.update)
    limit = None if settings.max_megabytes is None else int(settings.max_megabytes * MEGABYTE)
    kept_N = corpora.choose_evenly(survey.bytes_N, limit)
    validation_N = kept_N & corpora.choose_validation(survey.hashes_N, settings.validation_share)
    if not kept_N.any():
        raise DataError(
            f"No document of component `{corpus.name}` fits into `--max-megabytes` {settings.max_megabytes} (the "
            f"mean is {survey.bytes_N.mean() / MEGABYTE:.3f}): raise it, or cut the documents."
        )
    if corpus.name in settings.train_only:
        kept_N, validation_N = kept_N & ~validation_N, np.zeros_like(validation_N)
    elif settings.validation_share > 0 and not validation_N.any():
        raise DataError(
            f"None of the {kept_N.sum()} documents of component `{corpus.name}` falls into the validation share of "
            f"{settings.validation_share}: raise `--validation-share` (0 goes without), or give more documents."
        )
    if validation_N.sum() == kept_N.sum():
        raise DataError(
            f"All {kept_N.sum()} documents of component `{corpus.name}` fall into the validation share of "
            f"{settings.validation_share}: lower `--validation-share`, or give more documents."
        )
    return _Selected(corpus, survey, kept_N, validation_N)


def _tokenizer_sample(selected: Sequence[_Selected], settings: PrepareSettings) -> Iterator[str]:
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


def _write_component(
    folder: Path, one: _Selected, model: bytes, vocab_size: int, settings: PrepareSettings
) -> dict[str, Any]:
    """Tokenise one component into its training and validation files."""
    name = one.corpus.name
    sides = {"train": one.kept_N & ~one.validation_N, "validation": one.validation_N}
    prefixes = {"train": f"{name}.train", "validation": f"{name}.valid"}
    paths = {side: folder / prefixes[side] for side, chosen_N in sides.items() if chosen_N.any()}
    tokens = dict.fromkeys(sides, 0)
    held = iter(one.validation_N[one.kept_N])
    sizes = iter(one.survey.bytes_N[one.kept_N])
    with _token_files(paths, vocab_size) as builders, _bar(f"{name}: tokenise", one.bytes_kept, settings) as bar:
        for ids, lengths in tokenize(one.texts(one.kept_N), model, settings.workers):
            for document in np.split(ids, np.cumsum(lengths)[:-1]):
                side = "validation" if next(held) else "train"
                builders[side].add_document(document, [len(document)])
                tokens[side] += len(document)
                bar.update(int(next(sizes)))
    counts = {
        side: {
            "prefix": prefixes[side] if side in paths else None,
            "documents": int(chosen_N.sum()),
            "bytes": int(one.survey.bytes_N[chosen_N].sum()),
            "tokens": tokens[side],
        }
        for side, chosen_N in sides.items()
    }
    found = {
        "files": len(one.corpus.files),
        "documents": len(one.survey.bytes_N),
        "bytes": int(one.survey.bytes_N.sum()),
        "empty_documents": one.survey.empty,
        "duplicate_documents": one.survey.duplicates,
    }
    source = SOURCES[name] if settings.demo else [str(path) for path in one.corpus.files[:20]]
    return {"name": name, "source": source, "found": found, **counts}


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


def _write_blend(path: Path, components: Sequence[dict[str, Any]], vocab_size: int) -> None:
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _bar(title: str, total: int | None, settings: PrepareSettings) -> Any:
    # disable=None: only on a terminal
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None if settings.progress else True)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {rule}, but is {value!r} instead.")
