"""Text for the examples: made-up token ids, a component that repeats itself and one that does not."""

from __future__ import annotations

import numpy as np

from es_megatron import blend_of

VOCABULARY, SEQ_LENGTH = 128, 32


class Tokens:
    """A map-style dataset of one's own: item i is the same each time, in every process."""

    def __init__(self, rows: int, seed: int, period: int) -> None:
        self.rows, self.seed, self.period = rows, seed, period

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        words = np.random.default_rng((self.seed, row)).integers(1, VOCABULARY, self.period)
        return {"input_ids": np.resize(words, SEQ_LENGTH)}


def make_blend():
    """Both as a blend; there are no labels, so they are the tokens, shifted by one."""
    return blend_of({"repeats": Tokens(400, 1, 4), "prose": Tokens(200, 2, 31)}, SEQ_LENGTH, shift_labels=True)
