"""DeepSpeed's converter to universal checkpoints, in a process of its own, which reads what it converts as data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from es_megatron.checkpoint import disk
from es_megatron.errors import CheckpointError, EsError
from es_megatron.frameworks.data_only import data_only


def convert_to_universal(source: Path, target: Path) -> None:
    """Run the converter, in a process of its own since it starts workers.

    Raises:
        CheckpointError: it failed; with what it said last.
    """
    disk.make_folder(target.parent)
    command = [sys.executable, "-m", __name__, "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    environment = {**os.environ, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}  # for its workers too
    environment.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch takes one of the two
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise CheckpointError(
            f"DeepSpeed could not convert `{source}`: {said[-1]}. Go on with as many ranks as saved it."
        )


def main() -> int:
    """Convert; the command line is that of `deepspeed.checkpoint.ds_to_universal`."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = ds_to_universal.parse_arguments()
    try:
        with data_only(Path(arguments.input_folder)):
            ds_to_universal.main(arguments)
    except EsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
