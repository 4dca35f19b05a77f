"""Puts Evolved Sampling into the text of a config, and takes it out again byte for byte.

What is put in is marked or of one exact shape, so that taking it out needs no copy of the original: every patch is
undone in memory first, and is only given out if that restores the text.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config.names import GROUPS, SECTION, flag_of, settings_in
from es_megatron.config.settings import option_words
from es_megatron.config_files.existing_run import Kind
from es_megatron.config_files.json_members import Member, members_of
from es_megatron.config_files.reading import Source, last_word, scripts_in
from es_megatron.config_files.shell.words import CONTINUED
from es_megatron.config_files.yaml_files import key_lines
from es_megatron.config_patch import yaml_blocks
from es_megatron.config_patch.scripts import ARRAYS, RUN_AS_MODULE, patch_launches, unpatch_launches
from es_megatron.errors import ConfigError
from es_megatron.frameworks.arguments import STRICT_VERSIONS, Switches

NO_SWITCHES = Switches(None, None)
BEGIN, END = "# >>> es-megatron", "# <<< es-megatron <<<"
MARKED = re.compile(rf"[ \t]*{BEGIN} \(([^)]*)\).*?{END}\r?\n", re.DOTALL)
BARE = [
    *(flag_of(each.name) for each in settings_in(EvolvedSamplingConfig) if each.field.default is False),
    "--es-inclusion-weights",  # its name of before
]
PLAIN = "|".join(flag.removeprefix("--es-") for flag in (*BARE, STRICT_VERSIONS))
"""Flags without a value, as an alternative of a pattern."""
VALUE = r"[^\s\"'\\;|&<>()`]+"
OPTIONS = rf"--es-[a-z-]+-options(?:[ =][a-z]\w*={VALUE})*"
"""A flag with any number of values."""
FLAG = rf"(?:(?:--(?:no-)?es(?:-(?:{PLAIN}))?|{OPTIONS})(?![\w-])|--es-[a-z0-9-]+[ =]{VALUE})"
IN_LAUNCH = re.compile(rf" \"\$\{{(?:{'|'.join(ARRAYS)})\[@\]\}}\"|(?: {FLAG})*")
IN_ARGUMENTS = re.compile(rf"(?:(?: \\)?\r?\n[ \t]*| ){FLAG}")


def flags_of(config: EvolvedSamplingConfig, switches: Switches = NO_SWITCHES) -> list[str]:
    """Settings that differ from their default or hang on the preset, as flags, and what goes with them."""
    flags: list[str] = []
    for group, values in config.to_mapping().items():
        named = {f"{group}.{name}": value for name, value in values.items()} if group in GROUPS else {group: values}
        for name, value in named.items():
            told = " ".join(option_words(value)) if isinstance(value, dict) else value
            flags.append(flag_of(name) if value is True else f"{flag_of(name)} {told}".rstrip())
    flags += [] if switches.audit is None else [f"--es-audit {switches.audit}"]
    return flags + ([STRICT_VERSIONS] if switches.strict_versions else [])


def patch(source: Source, config: EvolvedSamplingConfig, switches: Switches = NO_SWITCHES) -> str:
    """The text with Evolved Sampling put in.

    Args:
        source: what was read.
        config: its settings.
        switches: whose audit file and strictness are put in besides.

    Raises:
        ConfigError: it is in already, or this text cannot be patched so that undoing it restores it.
    """
    if is_patched(source):
        raise ConfigError(
            "It is patched already. Edit the settings in it, or take them out with `es-megatron unpatch` first."
        )
    if switches.score_reference is not None:
        raise ConfigError("`--es-score-reference` is for one run: add it to that launch. Leave it out here.")
    audit = "" if switches.audit is None else str(switches.audit)
    if audit and (
        (source.kind in ("yaml", "deepspeed") and not source.launches)
        or not re.fullmatch(VALUE, audit.replace("$", " "))
    ):
        raise ConfigError(
            "`--es-audit` must be a plain path, and is for scripts and argument lists only. Leave it out here."
        )
    if source.launches:
        patched = _patch_script(source, flags_of(config, switches))
    elif source.kind == "arguments":
        patched = _patch_arguments(source.text, flags_of(config, switches))
    elif source.kind == "yaml":
        patched = _patch_yaml(source.text, config.to_mapping())
    else:
        patched = _patch_json(source.text, config.to_mapping())
    if unpatch(source.kind, patched)[0] != source.text:
        raise ConfigError(
            "It cannot be patched so that undoing it restores it. Put the settings in by hand (docs/configs.md)."
        )
    return patched


def is_patched(source: Source) -> bool:
    """Whether Evolved Sampling is in a config already."""
    return bool(source.settings) or any(launch.patched for launch in source.launches)


def unpatch(kind: Kind, text: str) -> tuple[str, bool]:
    """The text with Evolved Sampling taken out, and whether it is known to be the original again.

    Raises:
        ConfigError: there is nothing of it in the text, or half of it only.
    """
    if kind == "deepspeed":
        return _unpatch_json(text), True
    if kind == "arguments":
        restored = IN_ARGUMENTS.sub("", text)
        if restored == text:
            raise ConfigError("It has no `--es-*` flags, so there is nothing to take out.")
        return restored, True
    marks = list(MARKED.finditer(text))
    if not marks or len(marks) != text.count(BEGIN) or len(marks) != text.count(END):
        found = f"{text.count(BEGIN)} and {text.count(END)}"
        raise ConfigError(
            f"It must have `{BEGIN} ...` and `{END}` in pairs, but has {found} instead: it is not patched, or was "
            "edited there. Take the rest out by hand."
        )
    told = marks[0][1]
    restored = yaml_blocks.taken_out(text, MARKED, told)
    if RUN_AS_MODULE.search(restored):
        restored = unpatch_launches(restored, IN_LAUNCH)
    return restored, digest(restored) in told


def digest(text: str) -> str:
    """What tells an original from an edited one."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _marked(text: str, body: list[str], indent: str = "", extra: str = "") -> str:
    told = f"sha256 {digest(text)}{extra}"
    lines = [f"{BEGIN} ({told}): `es-megatron unpatch` takes this out >>>", *body, END]
    return "".join(f"{indent}{line}{_newline(text)}" for line in lines)


def _patch_script(source: Source, flags: list[str]) -> str:
    def mark(body: list[str], indent: str) -> str:
        return _marked(source.text, body, indent)

    begins = key_lines if source.kind == "yaml" else None
    return patch_launches(source.text, flags, lambda text: scripts_in(source.kind, text, source.hints), mark, begins)


def _patch_arguments(text: str, flags: list[str]) -> str:
    at, newline = last_word(text), _newline(text)
    begin = text.rfind("\n", 0, at) + 1
    indent = text[begin:at][: len(text[begin:at]) - len(text[begin:at].lstrip(" \t"))]
    many = "\n" in text.strip()
    separator = f" \\{newline}{indent}" if CONTINUED.search(text) else f"{newline}{indent}" if many else " "
    return text[:at] + "".join(separator + flag for flag in flags) + text[at:]


def _patch_yaml(text: str, settings: dict[str, Any]) -> str:
    def marked(body: list[str], indent: str, extra: str) -> str:
        return _marked(text, body, indent, extra)

    return yaml_blocks.put_in(text, settings, _newline(text), marked)


def _patch_json(text: str, settings: dict[str, Any]) -> str:
    opened, members = members_of(text)
    newline = _newline(text)
    at = members[-1].end if members else opened + 1
    lines = "\n" in text[opened:at] and bool(members)
    begin = text.rfind("\n", 0, members[0].start) + 1 if lines else 0
    indent = text[begin : members[0].start] if lines and not text[begin : members[0].start].strip() else "    "
    if lines:
        inner = f",{newline}".join(f"{indent}{indent}{json.dumps(k)}: {json.dumps(v)}" for k, v in settings.items())
        block = f"{newline}{indent}{json.dumps(SECTION)}: {{{newline}{inner}{newline}{indent}}}"
    else:
        block = f"{' ' if members else ''}{json.dumps(SECTION)}: {json.dumps(settings)}"
    return text[:at] + ("," if members else "") + block + text[at:]


def _unpatch_json(text: str) -> str:
    opened, members = members_of(text)
    at = next((number for number, member in enumerate(members) if member.key == SECTION), None)
    if at is None:
        raise ConfigError(f"It has no `{SECTION}` block, so there is nothing to take out.")
    member: Member = members[at]
    if at > 0:
        return text[: members[at - 1].end] + text[member.end :]
    if len(members) > 1:
        return text[: member.start] + text[members[1].start :]
    return text[: opened + 1] + text[member.end :]
