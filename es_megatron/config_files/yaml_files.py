"""Settings in YAML, nested or in lists, and shell scripts that stand in it as strings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import yaml

from es_megatron.config_files.launches import RUNNER, SCRIPT, Launch, Reason, Script, read_script
from es_megatron.config_files.ranks import product
from es_megatron.config_files.shell.branches import STARTS
from es_megatron.config_files.shell.traced import Place, Run, Traced, made, unknown
from es_megatron.errors import ConfigError

BOM = "\ufeff"
INTERPOLATED = re.compile(r"\$\{([^}]*)\}|\{\{([^}]*)\}\}")
RANKS = (
    ("devices", "num_nodes"),
    ("gpus", "nodes"),
    ("nproc_per_node", "nnodes"),
    ("gpus_per_node", "num_nodes"),
    ("num_gpus_per_node", "num_nodes"),
    ("gpus_per_node", "nodes"),
)
"""Keys for ranks on a node, and nodes: of NeMo, of Megatron-LM's recipes, of launchers."""
Found = dict[str, list[tuple[str, tuple[str, ...]]]]


def load(text: str) -> Any:
    """The one document of a YAML file.

    Raises:
        ConfigError: it is no YAML, or has several documents.
    """
    try:
        return yaml.safe_load(text.lstrip(BOM))
    except yaml.YAMLError as error:
        raise ConfigError(f"It must be YAML with one document, but is not: {error}. Correct it.") from error


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Every setting: where it stands, its key, its values. Lists of mappings are gone into as well."""
    if isinstance(value, Mapping):
        for key, inner in cast(Mapping[Any, Any], value).items():
            yield from _leaf(str(key), inner, f"{where}{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(cast(list[Any], value)):
            yield from leaves(inner, f"{where.rstrip('.')}[{number}].")


def _leaf(key: str, value: Any, place: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    if isinstance(value, Mapping):
        yield from leaves(value, place + ".")
    elif not isinstance(value, list):
        yield place, key, (plain(value),)
    else:
        items = cast(list[Any], value)
        if any(isinstance(item, Mapping) for item in items):
            yield from leaves(items, place + ".")
        else:
            yield place, key, tuple(plain(item) for item in items)


def plain(value: object) -> str:
    """A value as text; what is filled in later as a mark."""
    text = "null" if value is None else str(value)
    return INTERPOLATED.sub(lambda match: unknown((match[1] or match[2]).strip()), text)


def ranks_in(found: Found) -> int | None:
    """Ranks of the run, as far as keys of schedulers and trainers tell."""

    def value(name: str) -> str | None:
        return found[name][0][1][0] if name in found and found[name][0][1] else None

    for whole in ("world_size", "global_num_gpus"):
        if (number := value(whole)) and number.isdigit():
            return int(number)
    for each, nodes in RANKS:
        if (number := product(value(each), value(nodes))) is not None:
            return number
    return None


def scripts_in_yaml(text: str, pinned: Mapping[str, str], name: str | None) -> list[Script]:
    """The shell scripts that stand as strings in a YAML file, and lists of words that start a training."""
    skipped = len(text) - len(text.lstrip(BOM))
    try:
        nodes = [node for node in yaml.compose_all(text[skipped:], yaml.SafeLoader) if node is not None]
    except yaml.YAMLError:
        return []
    found: list[Script] = []
    for node in nodes:
        for each in _strings(node):
            if isinstance(each, yaml.ScalarNode):
                try:
                    found.append(read_script(each.value, pinned, name, source_of(each, text, skipped)))
                except ConfigError:
                    continue  # no script after all
            else:
                found.append(_words(each, skipped))
    return [script for script in found if script.launches]


def _strings(node: yaml.Node) -> Iterator[yaml.ScalarNode | yaml.SequenceNode]:
    if isinstance(node, yaml.ScalarNode):
        if " " in node.value and ".py" in node.value and STARTS.search(node.value):
            yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _strings(value)
    elif isinstance(node, yaml.SequenceNode):
        words = [each.value for each in node.value if isinstance(each, yaml.ScalarNode)]
        if any(SCRIPT.fullmatch(word.rpartition("/")[2]) for word in words):
            yield node
        for value in node.value:
            yield from _strings(value)


def _words(node: yaml.SequenceNode, skipped: int) -> Script:
    """A command as a list of words: recognised, but not changed."""
    words = [str(each.value) for each in node.value if isinstance(each, yaml.ScalarNode)]
    at = next(at for at, word in enumerate(words) if SCRIPT.fullmatch(word.rpartition("/")[2]))
    reason = Reason(
        f"`{words[at]}`",
        "stands in a list of words, which is not changed here",
        f'put `"-m", "{RUNNER}"` before it and the flags `--es-*` behind it, or write the command as one string',
    )
    launch = Launch(
        tuple(words[:at]), words[at], tuple(words[at + 1 :]), (), node.start_mark.index + skipped, (), None, reason
    )
    return Script((launch,), {}, (), {})


def source_of(node: yaml.ScalarNode, text: str, skipped: int) -> Traced:
    """The value of a string with its places in the file; without places where it is folded or has escapes."""
    start, end, value = node.start_mark.index + skipped, node.end_mark.index + skipped, str(node.value)
    if node.style == "|":
        return _block(value, text, start)
    inner = Place(start + 1, end - 1) if node.style in ("'", '"') else Place(start, end)
    same = text[inner.start : inner.end] == value
    return (Run(value, (inner,)),) if same else made(value)


def _block(value: str, text: str, start: int) -> Traced:
    at, runs, indent = text.find("\n", start) + 1, list[Run](), None
    for line in value.splitlines(keepends=True):
        if indent is None and line.strip():
            content = text[at:]
            indent = len(content) - len(content.lstrip(" ")) - (len(line) - len(line.lstrip(" ")))
        place = at + (indent or 0) if line.strip() else at + len(text[at:].split("\n", 1)[0])
        here = line.removesuffix("\n")
        if text[place : place + len(here)] != here:
            return made(value)
        end = text.find("\n", place)
        runs.append(Run(here, (Place(place, place + len(here)),)))
        runs += [Run("\n", (Place(end, end + 1),))] if line.endswith("\n") else []
        at = end + 1 if end >= 0 else len(text)
    return tuple(run for run in runs if run.text)


def key_lines(text: str, scripts: Sequence[Script]) -> list[int]:
    """Starts of the lines on which the strings begin that hold launches."""
    skipped = len(text) - len(text.lstrip(BOM))
    starts = sorted(
        node.start_mark.index + skipped
        for root in yaml.compose_all(text[skipped:], yaml.SafeLoader)
        if root is not None
        for node in _strings(root)
    )
    sites = [launch.at for script in scripts for launch in script.launches]
    return [text.rfind("\n", 0, max(start for start in starts if start <= at)) + 1 for at in sites]
