"""Where the members of a JSON object stand in its text."""

from __future__ import annotations

import json
from typing import NamedTuple

from es_megatron.errors import ConfigError

BLANK = " \t\r\n"


class Member(NamedTuple):
    """A key and its value, between two offsets."""

    key: str
    start: int
    end: int


def members_of(text: str) -> tuple[int, list[Member]]:
    """Offset of the opening bracket, and the members in order.

    Raises:
        ConfigError: the text is no JSON object.
    """
    decoder, members = json.JSONDecoder(), list[Member]()
    opened = text.find("{")
    at = _skip(text, opened + 1)
    try:
        while text[at] != "}":
            start = at
            key, at = decoder.raw_decode(text, at)
            at = _expect(text, _skip(text, at), ":")
            _, at = decoder.raw_decode(text, _skip(text, at))
            members.append(Member(str(key), start, at))
            at = _skip(text, at)
            if text[at] == ",":
                at = _skip(text, at + 1)
    except (IndexError, json.JSONDecodeError) as error:
        raise ConfigError(f"It must be a JSON object, but is not: {error}. Correct it.") from error
    return opened, members


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in BLANK:
        at += 1
    return at


def _expect(text: str, at: int, character: str) -> int:
    if text[at] != character:
        raise json.JSONDecodeError(f"Expected {character}", text, at)
    return at + 1
