"""How fast token files are read from end to end for their hash, and how fast by the hash alone."""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.scale_measure import measured
from es_megatron.frameworks.megatron_data import open_token_file
from es_megatron.frameworks.token_hash import take_hash

BLOCK = 1 << 22


def write(prefix: Path, megabytes: int) -> None:
    """One document of random uint16 tokens."""
    random = np.random.default_rng(0)
    with Path(f"{prefix}.bin").open("wb") as file:
        for _ in range(megabytes):
            file.write(random.integers(0, 50_000, 500_000, np.uint16).tobytes())
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 1, 2)
    Path(f"{prefix}.idx").write_bytes(head + struct.pack("<iqqq", 500_000 * megabytes, 0, 0, 1))


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1_000, help="size of the file (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the file is made (the system's folder for such)")
    arguments = parser.parse_args()
    size = arguments.megabytes / 1e3
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write(Path(folder, "a"), arguments.megabytes)
        file = open_token_file(Path(folder, "a"))
        take_hash(file)  # the file is in the page cache now, as far as it fits
        with measured() as whole:
            take_hash(file)
        digest, block = hashlib.blake2b(), bytes(BLOCK)
        with measured() as alone:
            for _ in range(arguments.megabytes * 10**6 // BLOCK):
                digest.update(block)
    told = {
        "gigabytes": size,
        "hash_and_ids_gb_per_s": size / whole.seconds,
        "hash_and_ids_gb_per_cpu_s": size / whole.cpu_seconds,
        "blake2b_alone_gb_per_cpu_s": size / alone.cpu_seconds,
        "extra_bytes": whole.extra_bytes,
    }
    print(json.dumps({name: round(value, 3) for name, value in told.items()}))


if __name__ == "__main__":
    main()
