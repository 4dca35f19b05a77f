"""The short core of `make chaos`: one save that fails on one rank, one kill in a save, some bits that flip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import shim

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
@pytest.mark.skipif(shim.compiler() is None, reason="there is no C compiler")
def test_core(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.chaos", "--core", "--folder", str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "error on rank 1: 1 tried, 1 held" in ended.stdout
    assert "killed in a save: 1 tried, 1 held" in ended.stdout
    assert "bit flips: 40 tried, 40 held" in ended.stdout
