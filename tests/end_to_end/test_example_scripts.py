"""The launch script and the SLURM job of `examples/`: the commands in their first lines, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from es_megatron.checks.communication import address_of
from tests.megatron_lm_helper import SUFFIX

ROOT = Path(__file__).parents[2]
CHECKOUT = os.environ.get("MEGATRON_LM", "")
SECONDS = 600

SBATCH = """\
#!/bin/sh
echo "Submitted batch job 7"
SLURM_JOB_ID=7 SLURM_JOB_NODELIST='node[7-8]' exec bash "$1"
"""

SCONTROL = """\
#!/bin/sh
[ "$*" = "show hostnames node[7-8]" ] && printf "localhost\\nnode8\\n"
"""

SRUN = """\
#!{python}
# All tasks at once, as on two nodes; the first one that fails is told.
import os, subprocess, sys
given = sys.argv[1:]
options = dict(each.partition("=")[::2] for each in given[: given.index("bash")])
nodes, each = int(options.get("--nodes", 2)), int(options.get("--ntasks-per-node", 2))
tasks = []
for rank in range(nodes * each):
    task = dict(SLURM_PROCID=str(rank), SLURM_NTASKS=str(nodes * each), SLURM_LOCALID=str(rank % each))
    tasks.append(subprocess.Popen(given[given.index("bash"):], env=dict(os.environ, **task)))
sys.exit(max(abs(task.wait()) for task in tasks))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 60)]


def commands_of(path: Path) -> list[str]:
    """The commands that stand in a file's comments."""
    found = re.findall(r"^#     (\S.*?)(?: {2,}# .*)?$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found


def program(folder: Path, name: str, text: str) -> None:
    """Write a stand-in."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run(command: str, folder: Path, **variables: str) -> str:
    """Run a command line in a folder that has stand-ins in `bin`; what it printed."""
    search = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_"))}
    ours = {"PATH": os.pathsep.join(search), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**given, **ours, **variables},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the commands find in a checkout."""
    for name in ("examples", "configs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    return tmp_path


def test_the_launch_script_is_patched_and_restored_byte_for_byte(folder: Path) -> None:
    path = folder / "examples" / "megatron_lm.sh"
    original = path.read_bytes()
    _, patch, start, unpatch = commands_of(path)[:4]
    assert "b = 8 (keep ratio 0.25)" in run(patch, folder)
    copy = path.with_name("megatron_lm.es.sh")
    assert start == "MEGATRON_LM=CHECKOUT bash examples/megatron_lm.es.sh"
    run(f"bash -n {path} && bash -n {copy}", folder)
    launched = [line for line in copy.read_text().splitlines() if line.startswith("torchrun ")]
    assert len(launched) == 1
    assert ' -m es_megatron.run "${MEGATRON_LM:?' in launched[0]
    assert path.read_bytes() == original
    run(unpatch, folder)
    assert copy.read_bytes() == original


@pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of Megatron-LM: MEGATRON_LM=FOLDER make test-megatron-lm")
def test_the_patched_launch_script_trains(folder: Path) -> None:
    program(folder / "bin", "python3-config", SUFFIX)
    *_, more = lines = commands_of(folder / "examples" / "megatron_lm.sh")
    prepare, patch, start, _ = lines[:4]
    assert more == 'MORE_ARGS="--distributed-backend gloo --use-cpu-initialization"'
    run(prepare, folder)
    run(patch, folder)
    checkout = str(Path(CHECKOUT).resolve())
    told = run(f"export {more}; {start.replace('CHECKOUT', checkout)}", folder, TRAIN_ITERS="20")
    assert "plan: arm es, B = 32, b = 8, scorer history" in told
    kept = re.findall(r"^ es: iteration +(\d+)/ +20 \| es kept: (\d+)/32 ", told, re.MULTILINE)
    assert kept == [("5", "8"), ("10", "8"), ("15", "8"), ("20", "32")], "the last iteration anneals"
    assert (folder / "runs" / "megatron_lm" / "iter_0000020" / "es_state" / "manifest.json").is_file()


def test_the_slurm_job_runs_on_two_nodes(folder: Path) -> None:
    """`sbatch`, `srun` and `scontrol` are stand-ins, and both nodes this machine."""
    found = [name for _, name in socket.if_nameindex() if name != "lo" and address_of(name)]
    if not found:
        pytest.skip("needs a network interface with an address, besides lo")
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN.format(python=sys.executable))):
        program(folder / "bin", name, text)
    path = folder / "examples" / "slurm.yaml"
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    text = path.read_text()
    for old, new in (("interface: eth0 ", f"interface: {found[0]} "), ("master_port: 29500", f"master_port: {port}")):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    run("es-megatron prepare --output data --component docs='docs/*.md' --vocab-size 1000", folder)
    dry, submit = commands_of(path)
    script = run(dry, folder)
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in script
    assert not (folder / "run.sbatch").exists()
    told = run(f"{submit} -- pretrain --config configs/small.yaml training.passes=1", folder)
    assert "Submitted batch job 7" in told
    assert "pre-flight of 2 nodes" in told
    summary = json.loads((folder / "runs" / "small" / "summary.json").read_text())
    assert (summary["world_size"], summary["finished"]) == (4, True)
