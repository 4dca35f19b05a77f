"""Blends of a comparison: the documents of a recipe, written as JSON lines and prepared.

A blend stands in a folder named after what it is made from: several specs share it, and a changed recipe makes another.
"""

from __future__ import annotations

import fcntl
import json
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from es_megatron.bench.documents import ComponentTexts, derive, read_parts, set_aside
from es_megatron.bench.recipe import Recipe, digest, identity
from es_megatron.bench.runs import CaseBlend
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.blend_file import read_blend_file
from es_megatron.prepare.command import PrepareSettings, prepare, summarise
from es_megatron.prepare.demo_corpus import write_demo_corpora
from es_megatron.prepare.output_folder import appearing_folder


def make_blend(name: str, recipe: Recipe, data: Path, wikitext: Path | None) -> CaseBlend:
    """Find the blend of a recipe, or make it.

    Args:
        name: of the blend in its spec.
        recipe: of the blend.
        data: folder of all blends.
        wikitext: the file of `--wikitext`.

    Raises:
        EsError: sources are missing, cannot be downloaded, or do not fit the recipe.
    """
    told = identity(recipe, wikitext)
    if recipe.blend is not None:
        if not recipe.blend.is_file():
            raise DataError(f"Blend file `{recipe.blend}` of `{name}` does not exist: prepare it, or correct the path.")
        return CaseBlend(recipe.blend, told)
    folder = data / f"{name}-{digest(told)}"
    apart_folder = apart_of(folder / "blend.yaml").parent
    wanted = [folder, *([apart_folder] if recipe.set_aside else [])]
    if not all((each / "blend.yaml").is_file() for each in wanted):
        with _in_turn(data):
            if not all((each / "blend.yaml").is_file() for each in wanted):
                demo = demo_texts(data) if recipe.demo else data
                parts, apart = set_aside(read_parts(recipe, demo, wikitext), recipe)
                if not (folder / "blend.yaml").is_file():
                    _prepare(derive(parts, recipe), recipe, folder)
                if apart:
                    _prepare(apart, recipe, apart_folder, folder)
    return CaseBlend(folder / "blend.yaml", told)


def text_like(name: str, recipe: Recipe, like: Path, data: Path, wikitext: Path | None) -> Path:
    """Find the text of a recipe in the tokens of another blend, or make it; nothing of it is held out.

    Args:
        name: of the recipe's blend in its spec.
        recipe: where the text comes from.
        like: file of the blend whose tokenizer it takes.
        data: folder of all blends.
        wikitext: the file of `--wikitext`.

    Returns:
        Its blend file.

    Raises:
        EsError: sources are missing, or the recipe is a blend that is there already.
    """
    if recipe.blend is not None:
        raise ConfigError(f"Blend `{name}` is prepared already, so that its text is not known: name one with a recipe.")
    folder = data / f"{like.parent.name}-of-{name}-{digest(identity(recipe, wikitext))}"
    with _in_turn(data):
        if not (folder / "blend.yaml").is_file():
            parts, _ = set_aside(read_parts(recipe, demo_texts(data) if recipe.demo else data, wikitext), recipe)
            _prepare(derive(parts, recipe), recipe, folder, like.parent)
    return folder / "blend.yaml"


def apart_of(blend: Path) -> Path:
    """Blend file of the text that a recipe sets aside, given that of what is trained on."""
    return blend.parent.with_name(f"{blend.parent.name}-apart") / blend.name


@contextmanager
def _in_turn(data: Path) -> Generator[None]:
    """Wait until no other command makes blends here: it may be making this one."""
    data.mkdir(parents=True, exist_ok=True)
    with (data / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def demo_texts(data: Path) -> Path:
    """The folder of the demo's corpora, downloaded if it is not there."""
    folder = data / "demo-texts"
    if not folder.is_dir():
        print("download and read the texts of the demo", flush=True)
        with appearing_folder(folder, replace=False) as partial, tempfile.TemporaryDirectory(dir=data) as raw:
            for corpus in write_demo_corpora(Path(raw)):
                for file in corpus.files:
                    file.rename(partial / file.name)
    return folder


def tokenizer_of(blend: Path) -> Path:
    """The tokenizer of a blend that was prepared here."""
    return blend.parent / str(read_blend_file(blend).tokenizer)


def _prepare(parts: Sequence[ComponentTexts], recipe: Recipe, folder: Path, like: Path | None = None) -> None:
    """Prepare parts; with the tokenizer of the blend in folder `like`, and nothing held out, where one is given."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".texts-") as texts:
        for part in parts:
            with Path(texts, f"{part.name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in part.texts)
        settings = PrepareSettings(
            output=folder,
            components=tuple(f"{part.name}={texts}/{part.name}.jsonl" for part in parts),
            train_only=tuple(part.name for part in parts if not part.evaluated),
            vocab_size=recipe.vocab_size if like is None else None,
            tokenizer=None if like is None else tokenizer_of(like / "blend.yaml"),
            validation_share=recipe.validation_share if like is None else 0.0,
            workers=1,
            progress=False,
        )
        print(summarise(prepare(settings), folder), flush=True)
