"""What somebody may have meant who gives a setting that there is not."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping

from es_megatron.config.fields import facts_of


def hint_for(key: str, cls: type, root: type) -> str:
    """A sentence that names the nearest setting.

    What is right but for its section or its program goes before what is only spelt alike.

    Args:
        key: the one that is not known.
        cls: dataclass in whose mapping it stood.
        root: the dataclass of all settings, in whose other sections it may belong.
    """
    here, everywhere = dict(_names(cls)), list(_leaves(root))
    word = _plain(key)
    if word in here:
        return f"Did you mean `{here[word]}`?"
    there = list(dict.fromkeys(path for name, path in everywhere if name == word))
    if there:
        return f"Did you mean {' or '.join(f'`{path}`' for path in there)}?"
    for names in (here, dict(everywhere)):
        if near := difflib.get_close_matches(word, names, n=1, cutoff=0.7):
            return f"Did you mean `{names[near[0]]}`?"
    return f"Known keys: {', '.join(facts_of(cls))}."


def _plain(key: str) -> str:
    """A key as Python names are written: flags have dashes, some programs capitals."""
    return key.lstrip("-").replace("-", "_").lower()


def _names(cls: type) -> Iterator[tuple[str, str]]:
    """What a field is called here and elsewhere, and its name."""
    for name, fact in facts_of(cls).items():
        yield from ((each, name) for each in fact.spec.also)
    yield from ((name, name) for name in facts_of(cls))


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The same of all sections, with the section before the name."""
    for name, fact in facts_of(cls).items():
        if dataclasses.is_dataclass(fact.hint):
            yield from _leaves(fact.kind, f"{prefix}{name}.")
        else:
            yield from ((each, prefix + name) for each in (name, *fact.spec.also))


def misspelt(mapping: Mapping[str, object], name: str) -> str | None:
    """The key of a mapping that looks like `name`, if `name` itself is not there."""
    if name in mapping:
        return None
    near = difflib.get_close_matches(name, [_plain(str(key)) for key in mapping], n=1, cutoff=0.8)
    return next((str(key) for key in mapping if near and _plain(str(key)) == near[0]), None)
