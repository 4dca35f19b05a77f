"""What the launchers of a script are really given: bash runs it, and stand-ins on PATH write their arguments down."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

INTERPRETERS = ("torchrun", "python", "python3", "deepspeed", "msrun")
"""Stand-ins that start a training script: they write their arguments down, and end."""
RUNNERS = ("srun", "mpirun", "numactl", "nsys", "singularity", "nohup", "timeout", "sbatch")
"""Stand-ins that start another program: it is what follows their options."""
STARTED = "torchrun|python|python3|deepspeed|msrun|bash|sh|env|numactl|nsys|singularity|nohup|timeout"
MODULE = "es_megatron.run"

RECORD = """#!/bin/bash
{ printf '%s\\0' NAME "$@"; printf '\\n\\0'; } >> "$ORACLE_LOG"
"""
PASS_ON = f"""#!/bin/bash
while (( $# )); do
  case $1 in {STARTED}) exec "$@" ;; esac
  [[ -f $1 ]] && exec bash "$@"
  shift
done
if ! [[ -t 0 ]]; then exec bash; fi
"""


def make_stand_ins(folder: Path) -> Path:
    """Write the stand-ins into a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in INTERPRETERS:
        (folder / name).write_text(RECORD.replace("NAME", name))
    for name in RUNNERS:
        (folder / name).write_text(PASS_ON)
    for stand_in in folder.iterdir():
        stand_in.chmod(0o755)
    return folder


def calls_of(
    text: str, stand_ins: Path, folder: Path, environment: Mapping[str, str] | None = None, shell: str = "bash"
) -> list[list[str]]:
    """The calls of launchers that a script makes, each with its arguments, in order."""
    log, script = folder / "calls.log", folder / "oracle_script.sh"
    log.write_bytes(b"")
    script.write_bytes(text.encode("utf-8", "surrogateescape"))
    told = {"PATH": f"{stand_ins}:/usr/bin:/bin", "ORACLE_LOG": str(log), "HOME": str(folder), **(environment or {})}
    subprocess.run(
        [shell, script], env=told, cwd=folder, timeout=30, check=False, capture_output=True, stdin=subprocess.DEVNULL
    )
    written = log.read_bytes().decode("utf-8", "surrogateescape").removesuffix("\n\0")
    return [call.split("\0")[:-1] for call in written.split("\n\0")] if written else []


def expected(call: Sequence[str], script: str, flags: Sequence[str]) -> list[str]:
    """A call as it must be after patching; unchanged where it does not start the script."""
    at = next((at for at, each in enumerate(call) if os.path.basename(each) == script), None)
    if at is None:
        return list(call)
    allowed = ("--module", "-m") if call[0] in ("torchrun", "deepspeed") or "torch.distributed.run" in call else ("-m",)
    option = allowed[0] if call[0] == "deepspeed" else "-m"
    return [*call[:at], option, MODULE, call[at], *flags, *call[at + 1 :]]


def plain(call: Sequence[str]) -> list[str]:
    """A call with `--module` written `-m` where both are the same to its launcher."""
    same = call and (call[0] == "torchrun" or "torch.distributed.run" in call or "torch.distributed.launch" in call)
    return ["-m" if same and each == "--module" else each for each in call]


def parses(text: str) -> bool:
    """Whether `bash -n` takes a script."""
    told = subprocess.run(
        ["bash", "-n"],
        input=text.encode("utf-8", "surrogateescape"),
        timeout=30,
        check=False,
        capture_output=True,
    )
    return told.returncode == 0
