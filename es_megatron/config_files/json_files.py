"""DeepSpeed's JSON: what keeps a text from being JSON, by its line."""

from __future__ import annotations

import json
import re
from typing import Any

from es_megatron.errors import ConfigError

COMMENT = re.compile(r"(?://|/\*|#)")
PLACEHOLDER = re.compile(r"<[^<>\n]+>|\$\{?\w+\}?|\{\{[^}\n]*\}\}|%\w+%|[A-Za-z_]\w*")
CONSTANTS = ("true", "false", "null", "NaN", "Infinity")


def load(text: str) -> Any:
    """A JSON text.

    Raises:
        ConfigError: it is none; names the line, and what to do.
    """
    try:
        return json.loads(text.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        raise ConfigError(what_is_wrong(text.lstrip("\ufeff"), error)) from error


def what_is_wrong(text: str, error: json.JSONDecodeError) -> str:
    """What is said of a text that is no JSON: comments, trailing commas, templates, or the rest."""
    at = len(text) - len(text[error.pos :].lstrip())
    at -= text[max(at - 1, 0) : at + 1] == "{{"
    line = text.count("\n", 0, at) + 1
    if COMMENT.match(text, at):
        return f"Line {line}: comments are not JSON, and DeepSpeed refuses them too. Take them out."
    before = text[:at].rstrip()
    if before.endswith(",") and text[at : at + 1] in ("}", "]"):
        line = before.count("\n") + 1
        return f"Line {line}: the comma before `{text[at]}` is not JSON, and DeepSpeed refuses it too. Take it out."
    found = PLACEHOLDER.match(text, at)
    if found and found[0] not in CONSTANTS:
        return (
            f"Line {line}: `{found[0]}` is a placeholder, so this is a template. Fill it in, and patch what comes out."
        )
    return f"It must be JSON, but is not: {error}. Correct it."


def automatic(text: str, name: str) -> tuple[str, str, str]:
    """What is said of a size that is `auto`."""
    found = re.search(rf'"{re.escape(name)}"\s*:\s*"auto"', text)
    line = f"line {text.count(chr(10), 0, found.start()) + 1}: " if found else ""
    return (
        f"{line}`{name}: auto`",
        "is filled in by the program that calls DeepSpeed, so b is not computed",
        f"give `--set {name}=N`",
    )
