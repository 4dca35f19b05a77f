"""Documents of a comparison's blends: damaged, copied and easy ones, and what stays clean."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from es_megatron.bench import blends
from es_megatron.bench.damage import (
    BOILERPLATE,
    change_words,
    easy_text,
    garble_characters,
    repeat_boilerplate,
    shuffle_sentences,
    shuffle_words,
)
from es_megatron.bench.documents import ComponentTexts, articles, derive, held_out, read_parts, set_aside, split
from es_megatron.bench.recipe import Damage, Duplicates, Easy, Recipe, digest, identity
from es_megatron.errors import ConfigError, DataError
from es_megatron.prepare.command import PrepareSettings, prepare
from tests.unit.test_prepare import make_texts, read_back, write_lines

TEXT = "One is first. Two comes next!\nThree is a line\nFour? Five follows; six ends."
RANDOM = 7


def generator():
    return np.random.default_rng(RANDOM)


def test_words_and_sentences_are_only_moved():
    words, sentences = shuffle_words(TEXT, generator()), shuffle_sentences(TEXT, generator())
    assert sorted(words.split()) == sorted(sentences.split()) == sorted(TEXT.split())
    assert words != " ".join(TEXT.split()) != sentences
    assert "Three is a line" in sentences


def test_characters_are_garbled_in_place():
    text = "abcdefghij klmnopqrst " * 50
    garbled = garble_characters(text, generator())
    changed = sum(one != other for one, other in zip(text, garbled, strict=True))
    assert 0.1 < changed / 1000 <= 0.15
    assert [at for at, character in enumerate(garbled) if character == " "] == list(range(10, 1100, 11))
    assert garble_characters(" \n", generator()) == " \n"


def test_boilerplate_is_as_long_as_the_text():
    made = repeat_boilerplate("x" * 1000, generator())
    assert len(made) == 1000
    assert sum(phrase in made for phrase in BOILERPLATE) == 2


def test_a_near_copy_differs_in_the_share_of_words_asked_for():
    text = " ".join(str(number) for number in range(200))
    copy = change_words(text, ["other"], 0.05, generator())
    assert copy.split().count("other") == 10
    assert sum(one != other for one, other in zip(text.split(), copy.split(), strict=True)) == 10
    assert change_words("", ["other"], 0.5, generator()) == ""


def test_easy_texts_follow_their_rule():
    lines = easy_text(generator(), 3).splitlines()
    first = int(lines[0].partition(".")[0])
    assert [line.partition(".")[0] for line in lines] == [str(first + at) for at in range(3)]
    assert len({line.partition(".")[2] for line in lines}) == 1


@pytest.fixture
def parts():
    return [ComponentTexts("a", make_texts(200, 1)), ComponentTexts("b", make_texts(100, 2))]


def count(parts):
    return {part.name: len(part.texts) for part in parts}


def test_damage_replaces_training_documents_in_equal_numbers_and_leaves_the_others(parts):
    recipe = Recipe(demo=True, damage=Damage(share=0.4))
    found = derive(parts, recipe)
    training = sum(int((~held).sum()) for held in held_out(parts, 0.1))
    damaged = {name: number for name, number in count(found).items() if name.startswith("damaged-")}
    assert set(damaged) == {"damaged-words", "damaged-characters", "damaged-boilerplate", "damaged-sentences"}
    assert sum(damaged.values()) == round(0.4 * training)
    assert max(damaged.values()) - min(damaged.values()) <= 1
    assert sum(count(found).values()) == 300
    assert [part.evaluated for part in found] == [True, True, False, False, False, False]
    for before, after, held_N in zip(parts, found[:2], held_out(parts, 0.1), strict=True):
        held = [text for text, out in zip(before.texts, held_N, strict=True) if out]
        assert set(held) <= set(after.texts) <= set(before.texts)
    assert derive(parts, recipe) == found
    assert derive(parts, Recipe(demo=True, damage=Damage(share=0.4), seed=1)) != found


def test_damage_and_copies_inside_stay_in_their_component_and_are_trained_on(parts):
    for changes in ({"damage": Damage(share=0.4, inside=True)}, {"duplicates": Duplicates(share=0.4, inside=True)}):
        found = derive(parts, Recipe(demo=True, **changes))
        assert count(found) == count(parts)
        assert all(part.evaluated for part in found)
        moved = 0
        held_before, held_after = held_out(parts, 0.1), held_out(found, 0.1)
        for before, after, held, now in zip(parts, found, held_before, held_after, strict=True):
            assert (now == held).all(), "none of the new texts is held out"
            pairs = list(zip(before.texts, after.texts, held, strict=True))
            assert all(one == other for one, other, out in pairs if out)
            moved += sum(one != other for one, other, _ in pairs)
        training = sum(int((~held).sum()) for held in held_out(parts, 0.1))
        assert moved == pytest.approx(0.4 * training, abs=3)  # shuffling may leave a text as it is


def test_text_set_aside_is_trained_on_by_nobody_and_held_out_by_nobody(parts):
    recipe = Recipe(demo=True, set_aside=0.25)
    rest, apart = set_aside(parts, recipe)
    for before, left, gone, held_N in zip(parts, rest, apart, held_out(parts, 0.1), strict=True):
        assert sorted(left.texts + gone.texts) == sorted(before.texts)
        assert not set(gone.texts) & {text for text, out in zip(before.texts, held_N, strict=True) if out}
    training = sum(int((~held).sum()) for held in held_out(parts, 0.1))
    assert sum(len(part.texts) for part in apart) == round(0.25 * training)
    assert set_aside(parts, recipe) == (rest, apart)
    assert set_aside(parts, Recipe(demo=True)) == (parts, [])


def test_near_copies_are_of_training_documents_that_stay(parts):
    found = derive(parts, Recipe(demo=True, duplicates=Duplicates(share=0.5, originals=5, changed=0)))
    copies = found[-1]
    assert (copies.name, copies.evaluated) == ("near-copies", False)
    rest = [text for part in found[:2] for text in part.texts]
    sides = zip(parts, held_out(parts, 0.1), strict=True)
    held = {text for part, held_N in sides for text, out in zip(part.texts, held_N, strict=True) if out}
    assert len(set(copies.texts)) == 5
    assert set(copies.texts) <= set(rest) - held
    assert len(copies.texts) + len(rest) == 300


def test_more_originals_than_documents(parts):
    with pytest.raises(DataError, match="documents, but is 400"):
        derive(parts, Recipe(demo=True, duplicates=Duplicates(originals=400)))


def test_the_easy_component_has_its_share(parts):
    found = derive(parts, Recipe(demo=True, easy=Easy(share=0.5)))
    size = sum(len(text) for part in parts for text in part.texts)
    assert sum(map(len, found[-1].texts)) == pytest.approx(0.5 * size, abs=3000)
    assert found[-1].evaluated


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_articles_of_wikitext(tmp_path, suffix):
    text = " \n = One = \n \n text one \n = = Part = = \n more \n = Two @-@ b = \n \n text two \n"
    path = tmp_path / f"wiki.train.raw{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    assert [article.strip().split(" \n")[0] for article in articles(path)] == ["= One =", "= Two @-@ b ="]
    assert read_parts(Recipe(wikitext=True), tmp_path, path)[0].name == "wikitext"


def test_wikitext_that_is_not_named(tmp_path):
    with pytest.raises(ConfigError, match="`--wikitext` must name"):
        blends.make_blend("w", Recipe(wikitext=True), tmp_path, None)


def write_labelled(path, labels):
    entries = [{"text": text, "noise": labels[at % len(labels)]} for at, text in enumerate(make_texts(90))]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_corpus_is_split_by_a_field(tmp_path):
    path = write_labelled(tmp_path / "text.jsonl", ["clean", "near dup"])
    assert {value: len(texts) for value, texts in split(str(path), "text", "text", "noise").items()} == {
        "clean": 45,
        "near_dup": 45,
    }
    with pytest.raises(DataError, match="must have `label`"):
        split(str(path), "text", "text", "label")


def test_a_blend_is_made_once_and_evaluates_what_is_clean(tmp_path, monkeypatch):
    path = write_labelled(tmp_path / "text.jsonl", ["clean", "garbage", "clean"])
    recipe = Recipe(components=(f"text={path}",), split_by="noise", evaluated=("clean",), vocab_size=400)
    made = blends.make_blend("noisy", recipe, tmp_path / "data", None)
    report = json.loads((made.file.parent / "prepare.json").read_text())
    documents = {one["name"]: one["validation"]["documents"] for one in report["components"]}
    assert documents["text-garbage"] == 0 < documents["text-clean"]
    monkeypatch.setattr(blends, "_prepare", lambda *_: pytest.fail("made again"))
    assert blends.make_blend("noisy", recipe, tmp_path / "data", None) == made
    text = path.read_text()
    path.write_text(text[:-3] + ("x" if text[-3] != "x" else "y") + text[-2:])  # of the same size
    assert digest(identity(recipe, None)) not in str(made.file)
    ready = Recipe(blend=made.file)
    before = identity(ready, None)
    made.file.write_text(made.file.read_text().replace("weight: ", "weight:  "))
    assert identity(ready, None) != before
    before = identity(ready, None)
    tokens = sorted(made.file.parent.glob("*.bin"))[0]
    tokens.write_bytes(tokens.read_bytes() + b"\0\0")
    assert identity(ready, None) != before


def test_train_only_leaves_out_what_would_be_held_out(tmp_path):
    texts = make_texts(100)
    path = write_lines(tmp_path / "text.jsonl", texts)
    settings = PrepareSettings(
        output=tmp_path / "out",
        components=(f"clean={path}", f"copies={path}"),
        train_only=("copies",),
        vocab_size=400,
        validation_share=0.2,
        workers=1,
        progress=False,
    )
    prepare(settings)
    trained = read_back(tmp_path / "out", "copies.train")
    (held_N,) = held_out([ComponentTexts("dirty", texts)], 0.2)
    assert sorted(trained) == sorted(text for text, out in zip(texts, held_N, strict=True) if not out)
    assert not (tmp_path / "out" / "copies.valid.bin").exists()


def test_train_only_must_name_a_component(tmp_path):
    path = write_lines(tmp_path / "text.jsonl", make_texts(10))
    settings = PrepareSettings(output=tmp_path / "out", components=(f"clean={path}",), train_only=("claen",))
    with pytest.raises(ConfigError, match="`--train-only` must name components, but `claen`"):
        prepare(settings)


def test_a_ready_blend_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        blends.make_blend("mine", Recipe(blend=tmp_path / "blend.yaml"), tmp_path, None)


def test_nothing_else_is_said_of_a_ready_blend(tmp_path):
    with pytest.raises(ConfigError, match="Nothing else may be given with `blend`"):
        Recipe(blend=tmp_path / "blend.yaml", vocab_size=500)


def test_a_component_of_few_documents_is_split_and_what_is_damaged_is_not_evaluated():
    for seed in range(20):
        few = [ComponentTexts("few", make_texts(7, seed)), ComponentTexts("two", make_texts(2, 100 + seed))]
        held = held_out(few, 0.01)
        assert [int(held_N.sum()) for held_N in held] == [1, 1]
        (after, _) = derive(few, Recipe(demo=True, validation_share=0.01, damage=Damage(share=0.5, inside=True)))
        (now, _) = held_out([after, few[1]], 0.01)
        assert (now == held[0]).all()
        assert [text for text, out in zip(after.texts, now, strict=True) if out] == [
            text for text, out in zip(few[0].texts, held[0], strict=True) if out
        ]
