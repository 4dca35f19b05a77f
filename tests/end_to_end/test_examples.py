"""The loops of `examples/` run as their first lines say, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {
    "deepspeed_llama": ("deepspeed", "transformers"),
    "deepspeed_pipeline": ("deepspeed",),
    "megatron_core_loop": (),
}
SECONDS = 300

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 20)]


def test_every_example_is_run_and_described() -> None:
    scripts = {"megatron_lm.sh", "slurm.yaml"}  # by test_example_scripts.py
    found = {path.name for path in (ROOT / "examples").iterdir() if path.is_file() and ".es." not in path.name}
    assert found == {*(f"{name}.py" for name in NEEDS), "tokens.py", *scripts}
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert {name for name in found if name not in page} == set()
    for name in scripts:
        lines = (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()
        commands = [
            line.removeprefix("#     ").partition("  #")[0].strip() for line in lines if line.startswith("#     ")
        ]
        assert {each for each in commands if not each.startswith("MORE_ARGS") and f"    {each}\n" not in page} == set()


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_to_its_end(name: str) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    path = ROOT / "examples" / f"{name}.py"
    command = re.search(r"^torchrun (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command[1].split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("plan: arm es, B = 32, b = 8") == 1
    losses = [float(loss) for loss in re.findall(r"^iteration \d+ of 38: loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 3
    assert all(3 < loss < 6 for loss in losses), "near the logarithm of the vocabulary's size"
