"""`docs/settings.md`."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from es_megatron.settings_page.entries import Entry, Section, sections

WIDTH = 118

HEAD = """\
# Settings

Written by `es-megatron settings > docs/settings.md` from the dataclasses that hold the settings; a test fails where
the two differ. `es-megatron settings training.lr` prints the part of one setting.

| where | how |
|---|---|
| YAML of `es-megatron pretrain` | by section: `training: {lr: 0.001}` |
| its command line | `training.lr=0.001`, `evolved_sampling.selection.keep_ratio=0.25`; these win over the file |
| Megatron-LM's command line | those of `evolved_sampling` as flags: `--es-selection-keep-ratio 0.25` |
| DeepSpeed's JSON | those of `evolved_sampling` in a block: `"evolved_sampling": {"scorer": {"kind": "fresh"}}` |

`evolved_sampling.preset` (`default` or `paper`; flag `--es-preset`) says what is taken where nothing is given: what
paid for language models ([results.md](results.md)), or the paper's. `scorer: history` is short for
`scorer: {kind: history}`, as are `guard: uniform` for its `fallback` and `reference: DIR` for its `folder`.

`es-megatron pretrain --config FILE --print-config` prints every value of a run and where it comes from. Under
"elsewhere" stand names that Megatron, DeepSpeed or Hugging Face have: they are not read, but an error that meets one
names the setting here.

An editor with yaml-language-server checks a file as you type, after

    es-megatron settings --schema > settings.schema.json

if the file begins with `# yaml-language-server: $schema=settings.schema.json`.
"""


def page() -> str:
    """The whole page, Markdown."""
    parts = [HEAD]
    for section in sections():
        parts += ["", *_section(section)]
    return "\n".join(parts).rstrip() + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## `{section.name}`" if section.name else "## In no section"
    if section.help:
        yield from ("", section.help)
    for entry in section.entries:
        yield from ("", *entry_lines(entry))


def entry_lines(entry: Entry) -> list[str]:
    """What the page says of one setting."""
    spec = entry.fact.spec
    limits, unit = spec.limits and f", {spec.limits}", spec.unit and f"; unit: {spec.unit}"
    facts = [f"{entry.type_words}{limits}{unit}."]
    if entry.default is dataclasses.MISSING:
        facts.append("Must be given.")
    else:
        paper = "" if entry.paper is dataclasses.MISSING else f" (preset `paper`: `{value_text(entry.paper)}`)"
        facts.append(f"Default: `{value_text(entry.default)}`{paper}.")
    if entry.flag is not None:
        facts.append(f"Flag: `{entry.flag}`.")
    for title, names in (("Before", entry.before), ("Elsewhere", spec.also)):
        if names:
            facts.append(f"{title}: {_quoted(names)}.")
    first = " ".join(facts)
    return [f"### `{entry.name}`", "", *_wrapped(first[0].upper() + first[1:]), "", *_wrapped(entry.help)]


def value_text(value: Any) -> str:
    """A value as YAML has it."""
    return str(value) if isinstance(value, Path) else json.dumps(value, default=dict)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
