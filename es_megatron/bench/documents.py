"""The documents of a blend: read from their sources, then changed as a recipe says.

Only documents that will be trained on are changed or copied: which ones those are is known from their text alone
(`es_megatron.prepare.corpus.choose_validation`), so what is evaluated stays clean and has no copy in the training data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from es_megatron.bench.damage import KINDS, change_words, easy_text
from es_megatron.bench.recipe import Damage, DamageKind, Duplicates, Easy, Recipe, wikitext_file
from es_megatron.errors import DataError
from es_megatron.prepare import corpus as corpora
from es_megatron.prepare.finding import find_corpus, parse_component
from es_megatron.prepare.reading import read_entries, refusal, text_of
from es_megatron.prepare.unpacking import unpacked

MEGABYTE = 10**6
_HEADING = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)


class ComponentTexts(NamedTuple):
    """The documents of one component to be."""

    name: str
    texts: list[str]
    evaluated: bool = True
    """Whether some documents are held out; otherwise all are trained on that nobody else holds out."""


def read_parts(recipe: Recipe, demo: Path, wikitext: Path | None) -> list[ComponentTexts]:
    """Read the documents of all components, each at most `max_megabytes` chosen evenly.

    Args:
        recipe: of the blend; not one with `blend`.
        demo: folder of the demo's corpora, used where the recipe says so.
        wikitext: file of WikiText-2 raw, the same.

    Raises:
        DataError: a file is missing or damaged.
    """
    if recipe.demo:
        parts = [ComponentTexts(path.stem, _read(path, path.stem, "text")) for path in sorted(demo.glob("*.jsonl"))]
    elif recipe.wikitext:
        parts = [ComponentTexts("wikitext", list(articles(wikitext_file(wikitext))))]
    else:
        named: dict[str, list[str]] = {}
        for argument in recipe.components:
            name, path = parse_component(argument)
            if recipe.split_by is None:
                named.setdefault(name, []).extend(_read(path, name, recipe.text_key))
            else:
                for value, texts in split(path, name, recipe.text_key, recipe.split_by).items():
                    named.setdefault(f"{name}-{value}", []).extend(texts)
        parts = [ComponentTexts(name, texts, _evaluated(name, recipe)) for name, texts in named.items()]
    return [_limited(part, recipe.max_megabytes) for part in parts]


def _read(path: str | Path, name: str, key: str) -> list[str]:
    return list(corpora.documents(find_corpus(name, [str(path)], key)))


def _evaluated(name: str, recipe: Recipe) -> bool:
    return not recipe.evaluated or any(name.endswith(f"-{value}") for value in recipe.evaluated)


def _limited(part: ComponentTexts, megabytes: float | None) -> ComponentTexts:
    if megabytes is None:
        return part
    sizes_N = np.asarray([len(text.encode("utf-8", "replace")) for text in part.texts], np.int64)
    kept_N = corpora.choose_evenly(sizes_N, int(megabytes * MEGABYTE))
    return part._replace(texts=[text for text, kept in zip(part.texts, kept_N, strict=True) if kept])


def split(path: str, name: str, key: str, field: str) -> dict[str, list[str]]:
    """Documents of JSON lines by the value of a field.

    Raises:
        DataError: a line has no such field.
    """
    found: dict[str, list[str]] = {}
    for file in find_corpus(name, [path], key).files:
        for read in read_entries(file, key, [field]):
            entry = text_of(read, key)
            if entry.problem is not None:
                raise refusal(entry, key)
            if field not in entry.values:
                raise DataError(f"{entry.where} must have `{field}` beside `{key}`, but has not: correct it.")
            value = re.sub(r"[^A-Za-z0-9_.-]", "_", str(entry.values[field]))
            if entry.values[key].strip():
                found.setdefault(value, []).append(entry.values[key])
    return found


def articles(path: Path) -> Iterator[str]:
    """Cut a WikiText file at its headings of the first level, ` = Title = `."""
    with unpacked(path) as file:
        text = file.read().decode("utf-8").replace("\r\n", "\n")
    starts = [match.start() for match in _HEADING.finditer(text)]
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        if text[start:end].strip():
            yield text[start:end]


def set_aside(parts: Sequence[ComponentTexts], recipe: Recipe) -> tuple[list[ComponentTexts], list[ComponentTexts]]:
    """Split a recipe's share of the training documents off, as they are: what is left, and what is apart."""
    random = np.random.default_rng([recipe.seed, 4])
    places = _training(parts, recipe.validation_share)
    order = random.permutation(len(places))[: round(recipe.set_aside * len(places))]
    gone = {places[chosen] for chosen in order.tolist()}
    apart = [
        part._replace(texts=[text for at, text in enumerate(part.texts) if DocumentPlace(number, at) in gone])
        for number, part in enumerate(parts)
    ]
    return _without(parts, gone), [part for part in apart if part.texts]


def derive(parts: Sequence[ComponentTexts], recipe: Recipe) -> list[ComponentTexts]:
    """Apply what a recipe asks for; the same documents and recipe give the same parts."""
    found = list(parts)
    if recipe.damage is not None:
        found = damage(found, recipe.damage, recipe)
    if recipe.duplicates is not None:
        found = duplicate(found, recipe.duplicates, recipe)
    if recipe.easy is not None:
        found = add_easy(found, recipe.easy, recipe)
    return found


class DocumentPlace(NamedTuple):
    """Where a document stands among the components."""

    part: int
    number: int


def damage(parts: list[ComponentTexts], settings: Damage, recipe: Recipe) -> list[ComponentTexts]:
    """Replace a share of the training documents by damaged copies, in equal numbers for each kind."""
    random = np.random.default_rng([recipe.seed, 1])
    places = _training(parts, recipe.validation_share)
    order = random.permutation(len(places))[: round(settings.share * len(places))]
    kinds: list[DamageKind] = list(settings.kinds)  # pyright: ignore[reportAssignmentType] - the recipe has checked them
    copies: list[list[str]] = [[] for _ in kinds]
    replaced: dict[DocumentPlace, str] = {}
    for turn, chosen in enumerate(order.tolist()):
        kind = turn % len(kinds)
        place = places[chosen]
        copies[kind].append(KINDS[kinds[kind]](parts[place.part].texts[place.number], random))
        replaced[place] = copies[kind][-1]
    if settings.inside:
        return _with(parts, replaced, recipe.validation_share)
    rest = _without(parts, {places[chosen] for chosen in order.tolist()})
    made = [ComponentTexts(f"damaged-{kind}", texts, False) for kind, texts in zip(kinds, copies, strict=True)]
    return rest + [part for part in made if part.texts]


def duplicate(parts: list[ComponentTexts], settings: Duplicates, recipe: Recipe) -> list[ComponentTexts]:
    """Replace a share of the training documents by near copies of a few others."""
    random = np.random.default_rng([recipe.seed, 2])
    places = _training(parts, recipe.validation_share)
    order: list[int] = random.permutation(len(places)).tolist()
    count = min(round(settings.share * len(places)), len(places) - settings.originals)
    if count < 1:
        raise DataError(
            f"`duplicates.originals` must be below the {len(places)} training documents, but is {settings.originals}."
        )
    originals = [parts[places[at].part].texts[places[at].number] for at in order[: settings.originals]]
    words = [word for text in originals for word in text.split()]
    replaced = order[settings.originals : settings.originals + count]
    copies = [
        change_words(originals[turn % len(originals)], words, settings.changed, random) for turn in range(len(replaced))
    ]
    if settings.inside:
        found = {places[at]: copy for at, copy in zip(replaced, copies, strict=True)}
        return _with(parts, found, recipe.validation_share)
    return [*_without(parts, {places[at] for at in replaced}), ComponentTexts("near-copies", copies, False)]


def add_easy(parts: list[ComponentTexts], settings: Easy, recipe: Recipe) -> list[ComponentTexts]:
    """Add the easy component."""
    random = np.random.default_rng([recipe.seed, 3])
    wanted = settings.share * sum(len(text) for part in parts for text in part.texts)
    texts: list[str] = []
    while wanted > 0:
        texts.append(easy_text(random))
        wanted -= len(texts[-1])
    return [*parts, ComponentTexts("easy", texts)]


def _training(parts: Sequence[ComponentTexts], share: float) -> list[DocumentPlace]:
    """Documents of evaluated parts that are not held out."""
    held = held_out(parts, share)
    return [
        DocumentPlace(number, int(at))
        for number, part in enumerate(parts)
        if part.evaluated
        for at in np.flatnonzero(~held[number])
    ]


def held_out(parts: Sequence[ComponentTexts], share: float) -> list[NDArray[np.bool_]]:
    """Which documents of each part `es-megatron prepare` will hold out of these parts."""
    return corpora.choose_validation(_hashes(parts), share, [part.evaluated for part in parts])


def _hashes(parts: Sequence[ComponentTexts]) -> list[NDArray[np.uint64]]:
    return [np.asarray([corpora.hash_text(text) for text in part.texts], np.uint64) for part in parts]


def _with(parts: Sequence[ComponentTexts], new: Mapping[DocumentPlace, str], share: float) -> list[ComponentTexts]:
    """Parts with other texts at some places, none of which will be held out: a line break more moves a text's hash."""
    held = zip(_hashes(parts), held_out(parts, share), strict=True)
    largest = max((int(hashes_N[held_N].max()) for hashes_N, held_N in held if held_N.any()), default=-1)

    def falls_out(text: str) -> bool:
        alone = corpora.choose_validation([np.asarray([corpora.hash_text(text)], np.uint64)], share)[0]
        return bool(alone[0]) or corpora.hash_text(text) <= largest

    found: list[ComponentTexts] = []
    for number, part in enumerate(parts):
        texts = [new.get(DocumentPlace(number, at), text) for at, text in enumerate(part.texts)]
        for at in range(len(texts)):
            while DocumentPlace(number, at) in new and falls_out(texts[at]):
                texts[at] += "\n"
        found.append(part._replace(texts=texts))
    return found


def _without(parts: Sequence[ComponentTexts], gone: set[DocumentPlace]) -> list[ComponentTexts]:
    """Parts less some documents; a part that is left empty goes too."""
    rest = [
        part._replace(texts=[text for at, text in enumerate(part.texts) if DocumentPlace(number, at) not in gone])
        for number, part in enumerate(parts)
    ]
    return [part for part in rest if part.texts]
