"""The import contracts of pyproject.toml hold, and the import linter can tell when they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


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
