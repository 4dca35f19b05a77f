"""The settings as a JSON schema (draft 7, which editors know), so that they are checked while they are typed."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from es_megatron.config.fields import Fact, limits_of
from es_megatron.config.names import HEADS, SECTION
from es_megatron.config.settings import Preset
from es_megatron.settings_page.entries import Entry, sections

TYPES: Mapping[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}


def schema() -> dict[str, Any]:
    """Schema of the YAML of `es-megatron pretrain`; JSON-able."""
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "es_megatron"}
    root: dict[str, Any] = {**head, **_object("Settings of `es-megatron pretrain`.")}
    for section in sections():
        inside = root
        for part in section.name.split(".") if section.name else ():
            inside = inside["properties"].setdefault(part, _object(section.help))
        for entry in section.entries:
            inside["properties"][entry.name.rpartition(".")[2]] = _entry(entry)
            if entry.default is dataclasses.MISSING:
                inside.setdefault("required", []).append(entry.name.rpartition(".")[2])
            for old in entry.before:
                root["properties"][SECTION]["properties"][old] = {**_entry(entry), "deprecated": True}
    root["required"] = [name for name, each in root["properties"].items() if "required" in each]
    ours = root["properties"][SECTION]["properties"]
    ours["preset"] = {"enum": list(typing.get_args(Preset)), "description": "Where what is not given comes from."}
    for group, head in HEADS.items():  # `scorer: history` is `scorer: {kind: history}`
        short = {**ours[group]["properties"][head]}
        ours[group] = {"anyOf": [ours[group], short], "description": ours[group]["description"]}
    return root


def _object(description: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "description": description, "properties": {}}


def _entry(entry: Entry) -> dict[str, Any]:
    made = {**_type(entry.fact), "description": entry.help}
    if entry.default is not dataclasses.MISSING:
        made["default"] = json.loads(json.dumps(entry.default, default=str))
    return made


def _type(fact: Fact) -> dict[str, Any]:
    if typing.get_origin(fact.kind) is Literal:
        return {"enum": [*typing.get_args(fact.kind), *([None] if fact.optional else [])]}
    name = TYPES.get(fact.kind, "object")
    made: dict[str, Any] = {"type": [name, "null"] if fact.optional else name}
    if fact.spec.limits:
        limits = limits_of(fact.spec.limits)
        made["exclusiveMinimum" if limits.low_open else "minimum"] = limits.low
        if limits.high < math.inf:
            made["exclusiveMaximum" if limits.high_open else "maximum"] = limits.high
    return made
