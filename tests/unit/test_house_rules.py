"""Rules of the house that no linter knows: where scorers and arms are named, how long things get."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from es_megatron.scoring import ARMS, SCORERS

PACKAGE = Path(__file__).parents[2] / "es_megatron"
NAMES = frozenset({*ARMS, *SCORERS})
HOMES = ("scoring", "config")
"""What scorers and arms there are is known here alone; the rest of the house asks the objects."""

OTHER_MEANINGS = {
    ("algorithm/policies.py", "es"): "a policy",
    ("algorithm/policies.py", "uniform"): "a policy",
    ("checks/megatron_config.py", "external"): "Megatron-LM's --dataloader-type",
    ("config_patch/command.py", "es"): "the flag --es",
    ("core/plan.py", "plain"): "what the guard falls back to",
    ("forecast/request.py", "es"): "the flag --es",
    ("frameworks/arguments.py", "es"): "the flag --es",
    ("prepare/writing.py", "prefix"): "of an indexed dataset",
    ("trainer/model.py", "uniform"): "Megatron-Core's recompute_method",
}
"""The same words, where they name something else."""


def sources() -> Iterator[tuple[str, ast.Module, int]]:
    """Every module: its path in the package, its tree, its lines."""
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        yield file.relative_to(PACKAGE).as_posix(), ast.parse(text), text.count("\n")


def literals_of(path: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names of scorers and arms that stand in a module as strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            yield path, node.value


def test_scorers_and_arms_are_named_in_scoring_and_config_only():
    found = {each for path, tree, _ in sources() if path.split("/")[0] not in HOMES for each in literals_of(path, tree)}
    assert found == set(OTHER_MEANINGS)


def test_a_string_that_is_asked_about_is_found():
    tree = ast.parse("def choose(config):\n    return config.scorer.kind in ('history', 'every-k')\n")
    assert set(literals_of("core/new.py", tree)) == {("core/new.py", "history"), ("core/new.py", "every-k")}


def test_modules_and_functions_stay_short():
    lines = {path: count for path, _, count in sources()}
    functions = {
        f"{path}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree, _ in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {path: count for path, count in lines.items() if count > 400} == {}
    assert {name: count for name, count in functions.items() if count > 60} == {}
    assert statistics.median(count for count in lines.values() if count > 5) < 130  # an empty __init__ counts not


@pytest.mark.parametrize("pattern", [r"^See `[\w.]+`"], ids=["a pointer instead of words"])
def test_docstrings_say_what_they_are_about(pattern: str):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{path}:{getattr(node, 'lineno', 1)}"
        for path, tree, _ in sources()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and re.match(pattern, ast.get_docstring(node) or "")
    ]
    assert found == []
