"""Run a script of an upstream with Evolved Sampling: `python -m es_megatron.run pretrain_gpt.py FLAGS --es-...`.

The script is not changed and sees what it would see if it had been started itself: its own folder first on the path,
its own arguments. Without any `--es` flag it runs as it is, with nothing patched that has an effect.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from es_megatron.errors import ConfigError, EsError
from es_megatron.frameworks.arguments import check_flags
from es_megatron.patching import patch_and_report
from es_megatron.testing import prepare_cpu

USAGE = "usage: python -m es_megatron.run SCRIPT.py [FLAGS OF THE SCRIPT] [--es ...]"


def prepare(script: Path) -> None:
    """Make the script's folder importable, put the CPU layer in place where there is no GPU, and patch.

    Raises:
        ConfigError: there is no such script.
        PatchError: the upstream is not as the patches rely on.
    """
    if not script.is_file():
        raise ConfigError(f"`{script}` must be a script, but there is no such file. {USAGE}")
    folder = script.resolve().parent
    sys.path.insert(0, str(folder))
    upstream = "megatron-deepspeed" if (folder / "megatron" / "training.py").is_file() else "megatron-lm"
    if prepare_cpu(upstream) and os.environ.get("RANK", "0") == "0":
        print("es_megatron: no CUDA here; on the CPU, which is for trying things out only", flush=True)
    patch_and_report(upstream)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `es-megatron run`, for one process."""
    parser.add_argument("script", help="such as CHECKOUT/pretrain_gpt.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script, and --es-...")


def run_script(arguments: argparse.Namespace) -> int:
    """Become `python -m es_megatron.run`; does not return.

    Under torchrun start that directly (`torchrun ... -m es_megatron.run SCRIPT.py ...`), or this with `--no-python`.
    """
    command = [sys.executable, "-m", "es_megatron.run", arguments.script, *arguments.flags]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def main() -> None:
    """Prepare, then run the script as the main program of this process."""
    if len(sys.argv) > 2 and sys.argv[1].startswith(("--local_rank=", "--local-rank=")):
        sys.argv.append(sys.argv.pop(1))  # launchers put it before what they take for the script's arguments
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    try:
        check_flags(sys.argv[1:])
        prepare(script)
        # Not by runpy, which would put another module in __main__'s place: what the script pickles would not be found,
        # and a spawned process (saving a checkpoint starts one) would run the script's imports again.
        namespace: dict[str, Any] = vars(sys.modules["__main__"])
        namespace["__file__"] = str(script)
        exec(compile(script.read_bytes(), str(script), "exec"), namespace)  # noqa: S102 - it is what the user asked for
    except EsError as error:
        print(f"es_megatron: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
