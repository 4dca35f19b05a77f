"""Runs of an unmodified Megatron-LM checkout on this machine's CPU, with data made on the spot."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SCORES = [
    "--es-preset",
    "paper",
    "--es-pruning-ratio",
    "0.25",
    "--es-selection-keep-ratio",
    "0.25",
    "--es-order-mask-lag",
    "2",
]
"""ESWP with b = 4 of B = 16; epochs of 161 and 90 rows are pruned several times in 70 iterations."""

RUN_SECONDS = 900
"""How long a run may take; on an idle machine it takes about 15."""

MODEL = shlex.split("""
    --distributed-backend gloo --use-cpu-initialization --transformer-impl local --tokenizer-type NullTokenizer
    --vocab-size 127 --make-vocab-size-divisible-by 64 --no-gradient-accumulation-fusion --no-persist-layer-norm
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --num-workers 0
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 4
    --log-interval 1 --eval-interval 1000 --eval-iters 1 --attention-dropout 0 --hidden-dropout 0 --split 90,5,5
    --ckpt-format torch_dist
""")

UNTOUCHED = '''
"""Starts the script on the CPU as `python script` would on a GPU; of es_megatron only the CPU layer is imported."""
import atexit, os, sys
from es_megatron.testing import megatron_lm_cpu

if __name__ == "__main__":
    megatron_lm_cpu.install()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.environ.get("SCRIPT_FOLDER") or os.path.dirname(sys.argv[0]))
    megatron_lm_cpu.adapt_megatron_core()
    ours = lambda: sorted(name for name in sys.modules if name.split(".")[0] == "es_megatron")
    atexit.register(lambda: print("es_megatron modules:", *ours()))
    exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), globals())
'''

SUFFIX = """#!/bin/sh
# The one on PATH may be another Python's, and the Makefile of Megatron-LM names its library after it.
exec python3 -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))'
"""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    text: str
    audit: list[dict[str, Any]]

    def values(self, name: str, after: int) -> dict[int, str]:
        """What Megatron's log line says under a name, as text, for iterations after one.

        The first line of a process is best left out: other ranks report their memory at the same time, and into it.
        """
        pattern = re.compile(rf"^(?: \[[^]]*\])? iteration +(\d+)/.*\| {re.escape(name)}: +([^|]*?) +\|")
        lines = (pattern.search(line) for line in self.text.splitlines())
        return {int(found[1]): found[2] for found in lines if found is not None and int(found[1]) > after}

    def meta_losses(self) -> list[float]:
        """Mean loss of each meta-batch, as our own log line tells it."""
        return [float(found) for found in re.findall(r"\| meta-batch loss: (\S+) \|", self.text)]

    def chosen(self) -> dict[int, list[int]]:
        """Chosen ids by iteration."""
        return {line["iteration"]: line["chosen"] for line in self.audit}


@dataclass(frozen=True)
class Site:
    """A folder for runs of one checkout."""

    root: Path
    checkout: Path

    @staticmethod
    def make(root: Path, checkout: Path) -> Site:
        """Write data and launcher."""
        write_component(root / "books", 110, seed=1)
        write_component(root / "code", 60, seed=2)
        (root / "untouched.py").write_text(UNTOUCHED)
        (root / "bin").mkdir()
        (root / "bin" / "python3-config").write_text(SUFFIX)
        (root / "bin" / "python3-config").chmod(0o755)
        return Site(root, checkout)

    @property
    def script(self) -> str:
        """The script of the checkout."""
        return str(self.checkout / "pretrain_gpt.py")

    @property
    def minor_version(self) -> int:
        """The number after the first point in the version of its Megatron-Core."""
        text = (self.checkout / "megatron" / "core" / "package_info.py").read_text()
        found = re.search(r"^MINOR = (\d+)", text, re.MULTILINE)
        assert found is not None, "no version in the checkout"
        return int(found[1])

    def untested(self) -> Site:
        """The checkout as a version that nobody has tested: links to all of it, but for the file with the version."""
        copy = self.root / "untested"
        link(self.checkout, copy, ("megatron", "core", "package_info.py"))
        link(self.checkout, copy, ("pretrain_gpt.py",))  # the runner goes by where the script really is
        text = (copy / "megatron" / "core" / "package_info.py").read_text()
        (copy / "megatron" / "core" / "package_info.py").write_text(re.sub(r"(?m)^MINOR = \d+", "MINOR = 99", text))
        return Site(self.root, copy)

    def run(
        self,
        name: str,
        flags: Sequence[str],
        *,
        ranks: int = 1,
        patched: bool = True,
        script: str | None = None,
        model: Sequence[str] = MODEL,
    ) -> Outcome:
        """Start the script under torchrun and wait for its end.

        Args:
            name: of the log and audit files; a second run of a name goes on in the same audit file.
            flags: beside those of the model and the data.
            ranks: processes.
            patched: whether the runner starts it, or a launcher that knows nothing of Evolved Sampling.
            script: another one than the checkout's.
            model: flags of the model and the optimizer.
        """
        audit = self.root / f"{name}.audit.jsonl"
        data = ["--data-path", "0.6", str(self.root / "books"), "0.4", str(self.root / "code")]
        data += ["--data-cache-path", str(self.root / "cache")]
        start = ["-m", "es_megatron.run"] if patched else [str(self.root / "untouched.py")]
        told = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.root))  # by rank: on one pipe their lines get mixed up
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["--redirects", "3", "--log-dir", str(told)]
        command += [*start, script or self.script, *model, *data, *flags]
        if any(flag.startswith("--es") for flag in flags):
            command += ["--es-audit", str(audit)]
        log = self.root / f"{name}.log"
        code = run_to_end(command, log, self.root, self.environment())
        text = "".join(file.read_text(errors="replace") for file in [*sorted(told.glob("**/*.log")), log])
        log.write_text(text)
        lines = audit.read_text().splitlines() if audit.exists() else []
        return Outcome(code, text, [json.loads(line) for line in lines])

    def environment(self) -> dict[str, str]:
        """One thread a rank; this Python and our python3-config first."""
        folders = [str(self.root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "PATH": os.pathsep.join(folders),
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
            "SCRIPT_FOLDER": str(self.checkout),
        }


def link(source: Path, target: Path, copied: Sequence[str]) -> None:
    """Make a folder of links to what is in another, but for one file below it, by its path, which is copied."""
    target.mkdir(exist_ok=True)
    for entry in source.iterdir():
        place = target / entry.name
        if entry.name != copied[0]:
            place.exists() or place.symlink_to(entry)
        elif len(copied) > 1:
            link(entry, place, copied[1:])
        else:
            place.unlink(missing_ok=True)
            place.write_bytes(entry.read_bytes())


def run_to_end(command: Sequence[str], log: Path, folder: Path, environment: dict[str, str]) -> int:
    """Run a command with its output in a file; end it on time-out by the signal that torchrun hands on."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            return process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(60)
            return process.returncode
        finally:
            process.kill()


def write_component(prefix: Path, documents: int, seed: int) -> None:
    """Write documents of counting numbers with more or less noise, so that some are learnt sooner than others."""
    rng = np.random.default_rng(seed)
    made: list[np.ndarray] = []
    for _ in range(documents):
        length, stride = int(rng.integers(20, 90)), int(rng.integers(1, 9))
        tokens = np.arange(length) * stride % 120 + 1
        noisy = rng.random(length) < 0.6 * rng.random()
        tokens[noisy] = rng.integers(1, 121, int(noisy.sum()))
        made.append(np.append(tokens, 125).astype(np.uint16))
    lengths = np.asarray([len(document) for document in made], np.int32)
    starts = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    prefix.with_suffix(".bin").write_bytes(b"".join(document.tobytes() for document in made))
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(made), len(made) + 1)
    bounds = np.arange(len(made) + 1, dtype=np.int64)
    prefix.with_suffix(".idx").write_bytes(head + lengths.tobytes() + starts.tobytes() + bounds.tobytes())


def digest_tensors(folder: Path) -> dict[str, str]:
    """Checksum of every tensor of a distributed checkpoint by name; what else is in it names its own folder."""
    reader = FileSystemReader(folder)
    kinds = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in kinds.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}
