"""Puts a block of settings into YAML: behind what is there, or into the mapping in braces that it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from es_megatron.config.names import SECTION
from es_megatron.errors import ConfigError

BOM = "\ufeff"
BROKEN = "a line broken before it"
UNENDED = "no newline at the end"
Marked = Callable[[list[str], str, str], str]
"""Lines between marks: the lines, their indentation, and what the mark says besides."""


def put_in(text: str, settings: Mapping[str, Any], newline: str, marked: Marked) -> str:
    """The text with a block of settings.

    Raises:
        ConfigError: nothing can be put into this YAML without changing what it says; gives the block.
    """
    flow = f"{json.dumps(SECTION)}: {json.dumps(dict(settings))}"
    try:
        root = yaml.compose(text.lstrip(BOM), yaml.SafeLoader)
        braces = isinstance(root, yaml.MappingNode) and root.flow_style
        patched = _in_braces(text, root, flow, newline, marked) if braces else _behind(text, settings, newline, marked)
        before, after = (yaml.safe_load(each.lstrip(BOM)) for each in (text, patched))
        same = after == {**before, SECTION: settings}
    except yaml.YAMLError:
        same, patched = False, ""
    if not same:
        raise ConfigError(f"A block cannot be put behind this YAML. Put in by hand: {flow}")
    return patched


def _behind(text: str, settings: Mapping[str, Any], newline: str, marked: Marked) -> str:
    body = [f"{SECTION}:", *(f"  {name}: {json.dumps(value)}" for name, value in settings.items())]
    ended = not text or text.endswith("\n")
    return text + ("" if ended else newline) + marked(body, "", "" if ended else f", {UNENDED}")


def _in_braces(text: str, root: yaml.MappingNode, flow: str, newline: str, marked: Marked) -> str:
    at = root.end_mark.index - 1 + len(text) - len(text.lstrip(BOM))
    last = root.value[-1][1].end_mark.index if root.value else root.start_mark.index + 1
    rest = re.sub(r"#[^\n]*", "", text[last + len(text) - len(text.lstrip(BOM)) : at])
    body = ["", flow] if "," in rest or not root.value else [", " + flow]
    begin = text.rfind("\n", 0, at) + 1
    alone = not text[begin:at].strip() and begin > 0
    if alone:
        return text[:begin] + marked([line for line in body if line], "", "") + text[begin:]
    return text[:at] + newline + marked([line for line in body if line], "", f", {BROKEN}") + text[at:]


def taken_out(text: str, pattern: re.Pattern[str], told: str) -> str:
    """The text without the block.

    Args:
        text: with it.
        pattern: matches what stands between marks, and these.
        told: what the first mark says.
    """
    if BROKEN in told:
        return re.sub(rf"\r?\n{pattern.pattern}", "", text, flags=pattern.flags)
    restored = pattern.sub("", text)
    return restored.removesuffix("\n").removesuffix("\r") if UNENDED in told else restored
