"""The README's commands, as printed and in order, in a copy of the checkout on what may be a bare machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KEPT_OUT = shutil.ignore_patterns(".*", "runs", "__pycache__", "build", "dist", "*.egg-info")


def blocks(text: str) -> list[str]:
    """What stands in the blocks of commands."""
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_readme_is_one_screen_and_names_files_that_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("origin", ["checkout", "wheel"])
def test_the_commands_run_as_printed(origin: str, tmp_path: Path) -> None:
    """From a checkout; and with a wheel that was built of it, in a folder that has nothing else but the files named."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=KEPT_OUT)
    install, own = blocks((copy / "README.md").read_text(encoding="utf-8"))
    script = f"{install}\n{own}"
    where = copy
    if origin == "wheel":
        where = tmp_path / "elsewhere"
        where.mkdir()
        for name in ("docs", "configs"):
            shutil.copytree(copy / name, where / name)
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(where), str(copy)]
        subprocess.run(build, check=True)
        (wheel,) = where.glob("es_megatron-*.whl")
        assert '".[' in script
        script = script.replace('".[', f'"./{wheel.name}[')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    path = os.pathsep.join([str(Path(sys.base_prefix) / "bin"), environment["PATH"]])
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=where,
        env={**environment, "PATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (where / "runs" / "small" / "report" / "report.html").is_file() or list(
        (where / "runs" / "small").rglob("*.html")
    )
    assert "predicted saving" in done.stdout
