"""How the blend of a comparison is made: where the documents come from, and what is done to those trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from es_megatron.config import require, require_choice
from es_megatron.errors import ConfigError
from es_megatron.prepare.finding import find_corpus, parse_component

DamageKind = Literal["words", "characters", "boilerplate", "sentences"]


@dataclass(frozen=True)
class Damage:
    """Training documents replaced by damaged copies."""

    share: float = 0.3
    """Share of the training documents that are replaced, in (0, 1), in equal parts for each kind."""

    kinds: tuple[str, ...] = typing.get_args(DamageKind)
    """`words` shuffled, `characters` garbled, `boilerplate` repeated instead of the text, `sentences` shuffled."""

    inside: bool = False
    """Whether a copy stays in its document's component, as damage does in the world, or each kind is a component
    `damaged-KIND` of its own, which tells in the tables what was chosen."""

    def __post_init__(self) -> None:
        """Check every field."""
        require(0 < self.share < 1, "damage.share", "in (0, 1)", self.share)
        require(len(self.kinds) > 0, "damage.kinds", "a list with at least one kind", self.kinds)
        for kind in self.kinds:
            require_choice("damage.kinds", kind, DamageKind)


@dataclass(frozen=True)
class Duplicates:
    """Training documents replaced by near copies of a few of them, in the component `near-copies`."""

    share: float = 0.5
    """Share of the training documents that are replaced, in (0, 1)."""

    originals: int = 20
    """Documents that are copied, >= 1; they stay."""

    changed: float = 0.05
    """Share of a copy's words that are other words, in [0, 1]."""

    inside: bool = False
    """Whether a copy stays in the component of the document that it replaces; else they are `near-copies`."""

    def __post_init__(self) -> None:
        """Check every field."""
        require(0 < self.share < 1, "duplicates.share", "in (0, 1)", self.share)
        require(self.originals >= 1, "duplicates.originals", ">= 1", self.originals)
        require(0 <= self.changed <= 1, "duplicates.changed", "in [0, 1]", self.changed)


@dataclass(frozen=True)
class Easy:
    """One more component, `easy`, that a model soon knows by heart: counted lists of a few words."""

    share: float = 0.3
    """Its characters as a share of those of the other components together, above 0."""

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.share > 0, "easy.share", "above 0", self.share)


@dataclass(frozen=True)
class Recipe:
    """A blend."""

    blend: Path | None = None
    """A blend file that is there already; nothing else may be given then."""

    demo: bool = False
    """Take the three public corpora of `es-megatron prepare --demo`."""

    wikitext: bool = False
    """Take the articles of a WikiText-2 raw file, which the command line names by `--wikitext`."""

    components: tuple[str, ...] = ()
    """NAME=PATH each, as in `es-megatron prepare --component`."""

    text_key: str = "text"
    """Field of a JSON line that holds the text."""

    split_by: str | None = None
    """Field of a JSON line that splits a component into several, named by its values."""

    evaluated: tuple[str, ...] = ()
    """With `split_by`: the values that are also evaluated; of the others everything is trained on. None: all."""

    vocab_size: int = 1024
    """Ids of the tokenizer that is trained."""

    max_megabytes: float | None = None
    """Text kept of each component at most, above 0; None: all."""

    validation_share: float = 0.1
    """Share of the documents held out, in (0, 1)."""

    set_aside: float = 0.0
    """Share of the training documents that no arm trains on, in [0, 1): text for clean reference models."""

    seed: int = 0
    """Of what is done to the documents, >= 0."""

    damage: Damage | None = None
    """Damaged copies."""

    duplicates: Duplicates | None = None
    """Near copies."""

    easy: Easy | None = None
    """A component that is soon learnt."""

    def __post_init__(self) -> None:
        """Check every field and their combinations."""
        sources = sum([self.blend is not None, self.demo, self.wikitext, bool(self.components)])
        if sources != 1:
            raise ConfigError(
                f"Exactly one of `blend`, `demo`, `wikitext` and `components` must be given, but {sources} are. "
                "Give one."
            )
        for argument in self.components:
            parse_component(argument)
        require(0 < self.validation_share < 1, "validation_share", "in (0, 1)", self.validation_share)
        require(self.max_megabytes is None or self.max_megabytes > 0, "max_megabytes", "above 0", self.max_megabytes)
        require(0 <= self.set_aside < 1, "set_aside", "in [0, 1)", self.set_aside)
        require(self.seed >= 0, "seed", ">= 0", self.seed)
        others = [field for field in fields(self) if field.name != "blend"]
        if self.blend is not None and any(getattr(self, field.name) != field.default for field in others):
            raise ConfigError("Nothing else may be given with `blend`, which is there already. Leave the rest out.")
        if self.split_by is not None and not self.components:
            raise ConfigError("`split_by` must be left out without `components`: it names a field of their JSON lines.")
        if self.evaluated and self.split_by is None:
            raise ConfigError("`evaluated` must be left out without `split_by`, whose values it names.")


CORPORA = "{corpora}"
"""In a component's path: the folder that the command line names by `--corpora`."""


@dataclass(frozen=True)
class Sources:
    """Where texts stand that a spec does not bring, as the command line says."""

    wikitext: Path | None = None
    """The training file of WikiText-2 raw."""

    corpora: Path | None = None
    """Folder of the files that paths with `{corpora}` name."""

    def resolve(self, recipe: Recipe) -> Recipe:
        """A recipe whose paths are complete; `ConfigError` if the folder is not given."""
        if self.corpora is None and any(CORPORA in argument for argument in recipe.components):
            raise ConfigError(f"`--corpora DIR` must be given: the paths of {recipe.components} begin with it.")
        found = tuple(argument.replace(CORPORA, str(self.corpora)) for argument in recipe.components)
        return dataclasses.replace(recipe, components=found)


def identity(recipe: Recipe, wikitext: Path | None) -> dict[str, Any]:
    """What tells one blend from another, JSON-able: the recipe and the content of the files it reads.

    The tokens of a blend that is there already are told by their size and time: they may be too many to read.
    """
    told: dict[str, Any] = json.loads(json.dumps(asdict(recipe), default=str))
    files: list[Path] = []
    if recipe.blend is not None:
        files = [recipe.blend, *sorted(recipe.blend.parent.glob("*.idx")), *sorted(recipe.blend.parent.glob("*.bin"))]
    elif recipe.wikitext:
        files = [wikitext_file(wikitext)]
    for argument in recipe.components:
        files.extend(find_corpus(*_one(argument)).files)
    # not where the files stand
    told["components"] = [f"{name}={Path(path).name}" for name, path in map(parse_component, recipe.components)]
    told["files"] = [[path.name, content_of(path)] for path in files if path.is_file()]
    if recipe.demo:
        told["python"] = platform.python_version()  # one of its components is the standard library
    return told


def content_of(path: Path) -> str:
    """What tells a file's content: its hash, or of a `.bin` file its size and time."""
    if path.suffix == ".bin":
        return f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(identity: dict[str, Any]) -> str:
    """Eight hexadecimal digits of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def wikitext_file(path: Path | None) -> Path:
    """Check the file that `--wikitext` names; `ConfigError` if there is none."""
    if path is None or not path.is_file():
        raise ConfigError(
            f"`--wikitext` must name the training file of WikiText-2 raw (wiki.train.raw or wiki.train.tokens, may be "
            f"gzip), but is {path} instead."
        )
    return path


def _one(argument: str) -> tuple[str, list[str]]:
    name, path = parse_component(argument)
    return name, [path]
