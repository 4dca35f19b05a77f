"""The import contracts of pyproject.toml hold, no modules import each other in a circle, and breaches are found."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
ROOTS = ("es_megatron", "benchmarks")
FRONT_DOOR = "es_megatron"
"""Imports what it offers when it is asked for, so its own imports close no circle."""


def _lint(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(CONFIG))",
    ]
    command[2] = command[2].replace("CONFIG", f"config_filename={str(config)!r}, cache_dir=None")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_import_contracts_hold() -> None:
    ended = _lint(CHECKOUT / "pyproject.toml", CHECKOUT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 kept, 0 broken" in ended.stdout


def test_import_that_points_up_and_megatron_in_a_low_layer_break_them(tmp_path: Path) -> None:
    package = tmp_path / "es_megatron"
    for source in (CHECKOUT / "es_megatron").rglob("*.py"):
        target = package / source.relative_to(CHECKOUT / "es_megatron")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    (package / "data" / "blend.py").write_text("import es_megatron.core\nimport megatron.core\n")
    (package / "frameworks" / "allowed.py").write_text("import deepspeed\nimport megatron.core.parallel_state\n")
    ended = _lint(CHECKOUT / "pyproject.toml", tmp_path)
    assert ended.returncode != 0
    assert "es_megatron.data.blend -> es_megatron.core" in ended.stdout
    assert "es_megatron.data.blend -> megatron" in ended.stdout
    assert "es_megatron.frameworks" not in ended.stdout


def _modules(checkout: Path) -> dict[str, Path]:
    """The file of every module below the roots; a package is its `__init__.py`."""
    files = [file for root in ROOTS for file in sorted((checkout / root).rglob("*.py"))]
    names = [".".join(file.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


def _import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports at any depth, so also those in functions, but none that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _import_statements(ast.Module([other], []))
        else:
            yield from _import_statements(child)


def _imported(module: str, modules: Mapping[str, Path]) -> set[str]:
    """The modules that a module names; a submodule counts without the packages that hold it."""
    found: set[str] = set()
    for statement in _import_statements(ast.parse(modules[module].read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found.update(alias.name for alias in statement.names)
            continue
        assert not statement.level, f"{module} has a relative import, which this test does not follow"
        package = statement.module or ""
        for alias in statement.names:
            submodule = f"{package}.{alias.name}"
            found.add(submodule if submodule in modules else package)
    return found & modules.keys()


def _circles(checkout: Path) -> list[list[str]]:
    """Every largest set of modules that all import each other, at once or by way of others."""
    modules = _modules(checkout)
    edges = {module: _imported(module, modules) for module in modules if module != FRONT_DOOR}

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(edges.get(module, ()))
        while ahead:
            following = ahead.pop()
            if following not in seen:
                seen.add(following)
                ahead.extend(edges.get(following, ()))
        return seen

    reach = {module: reached(module) for module in modules}
    sets = {frozenset(other for other in reach[module] if module in reach[other]) for module in modules}
    return sorted(sorted(each) for each in sets if each)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert _circles(CHECKOUT) == []


@pytest.mark.parametrize(
    ("one", "other", "circles"),
    [
        ("def late():\n    from es_megatron.b import x", "import es_megatron.a", [["es_megatron.a", "es_megatron.b"]]),
        ("from es_megatron import b", "from es_megatron.a import x", [["es_megatron.a", "es_megatron.b"]]),
        ("from es_megatron.a import x", "", [["es_megatron.a"]]),
        ("from es_megatron.b import x", "if TYPE_CHECKING:\n    import es_megatron.a", []),
        (
            "from es_megatron.b import x",
            "if typing.TYPE_CHECKING:\n    pass\nelse:\n    import es_megatron.a",
            [["es_megatron.a", "es_megatron.b"]],
        ),
        ("import es_megatron.b", "import torch", []),
        ("from es_megatron import attach", "", []),
    ],
)
def test_circles_are_found_also_in_functions(one: str, other: str, circles: list[list[str]], tmp_path: Path) -> None:
    package = tmp_path / "es_megatron"
    package.mkdir()
    (package / "__init__.py").write_text("def attach():\n    import es_megatron.a\n")
    (package / "a.py").write_text(one)
    (package / "b.py").write_text(other)
    assert _circles(tmp_path) == circles
