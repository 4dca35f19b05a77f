"""Ways to spoil a text, each a pure function of the text and a generator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from es_megatron.bench.recipe import DamageKind

GARBLED = 0.15
"""Share of the characters that `garble_characters` changes."""

BOILERPLATE = (
    "All rights reserved. No part of this page may be reproduced without written permission.",
    "We use cookies to improve your experience. By continuing you accept our terms of service.",
    "Click here to subscribe to our newsletter and never miss an update.",
    "This page was last modified today. Please report broken links to the webmaster.",
    "Home | About | Contact | Privacy | Terms | Sitemap | Help",
    "You must enable JavaScript to view this content. Please update your browser and try again.",
)

NOUNS = ("apple", "river", "stone", "cloud", "horse", "table", "garden", "letter")
COLOURS = ("red", "blue", "grey", "white", "brown", "yellow", "green", "black")


def shuffle_words(text: str, random: np.random.Generator) -> str:
    """All words in another order: the right tokens, no sentence."""
    words = text.split()
    random.shuffle(words)
    return " ".join(words)


def shuffle_sentences(text: str, random: np.random.Generator) -> str:
    """All sentences and lines in another order: locally right, globally not."""
    sentences = [sentence for sentence in re.split(r"(?<=[.!?;:])\s+|\n+", text) if sentence.strip()]
    random.shuffle(sentences)
    return " ".join(sentences)


def garble_characters(text: str, random: np.random.Generator) -> str:
    """A share of the characters replaced by others of the text, as a bad scan does; white space stays."""
    characters = np.array(list(text))
    places = np.flatnonzero([not character.isspace() for character in text])
    if len(places) == 0:
        return text
    hit = random.choice(places, round(GARBLED * len(places)), replace=False)
    characters[hit] = characters[random.choice(places, len(hit))]
    return "".join(characters.tolist())


def repeat_boilerplate(text: str, random: np.random.Generator) -> str:
    """Two phrases of web pages, over and over, as long as the text."""
    first, second = random.choice(len(BOILERPLATE), 2, replace=False)
    phrase = f"{BOILERPLATE[first]} {BOILERPLATE[second]}\n"
    return (phrase * (len(text) // len(phrase) + 1))[: max(len(text), len(phrase))]


KINDS: Mapping[DamageKind, Callable[[str, np.random.Generator], str]] = {
    "words": shuffle_words,
    "characters": garble_characters,
    "boilerplate": repeat_boilerplate,
    "sentences": shuffle_sentences,
}


def change_words(text: str, others: Sequence[str], share: float, random: np.random.Generator) -> str:
    """A near copy: a share of the words replaced by words of `others`; white space stays."""
    pieces = re.split(r"(\s+)", text)
    words = [place for place, piece in enumerate(pieces) if piece and not piece.isspace()]
    for place in random.choice(words, round(share * len(words)), replace=False) if words else ():
        pieces[place] = others[int(random.integers(len(others)))]
    return "".join(pieces)


def easy_text(random: np.random.Generator, lines: int = 60) -> str:
    """A counted list in which only the first line is not foretold by the rules of all of them."""
    start, noun = int(random.integers(1, 10_000)), int(random.integers(len(NOUNS)))
    return "".join(f"{number}. the {NOUNS[noun]} is {COLOURS[noun]}\n" for number in range(start, start + lines))
