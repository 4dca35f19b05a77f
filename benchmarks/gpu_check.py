"""Everything that needs a GPU, in one command: `make gpu-check` on a machine with CUDA devices writes `gpu_check.json`.

    python -m benchmarks.gpu_check [--output gpu_check.json] [--folder runs/gpu_check]

Each case is a short run of the reference trainer under torchrun, with NCCL. What it chose is held against a run of the
same settings on the CPU, or against another case. Without a CUDA device it tells what it would do, and ends with 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

VOCAB = 2048
SEQ_LENGTH = 128
ROWS = {"small": 300, "large": 900}
ALIKE = 0.95
"""Least share of equal ids, where rounding may tip a choice: runs drift apart by it, and ever faster."""
EXACT_ITERATIONS = 5
"""First iterations, whose ids must be equal in fp32: weights have hardly drifted by then."""
MINUTES = 20

Judged = Literal["ids", "learns", "ends"]


class Machine(NamedTuple):
    """What there is to check with."""

    devices: tuple[str, ...]
    """Names of the CUDA devices."""
    transformer_engine: bool
    versions: Mapping[str, str | None]


@dataclass(frozen=True)
class Case:
    """A run, and what it has to be like."""

    name: str
    ranks: int = 1
    settings: tuple[str, ...] = ()
    """Overrides of the trainer's settings."""
    model: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Changes of Megatron-Core's `TransformerConfig`."""
    judged: Judged = "ids"
    """`ids`: chooses as the case does that it is held against. `learns`: losses are finite and fall. `ends`: they are
    finite."""
    against: str = "cpu"
    needs_engine: bool = False
    cpu: bool = False
    """Whether it is the run on the CPU that others are held against."""

    def why_not(self, machine: Machine) -> str | None:
        """Why it cannot run on a machine; None where it can."""
        if self.ranks > len(machine.devices) and not self.cpu:
            return f"needs {self.ranks} CUDA devices"
        if self.needs_engine and not machine.transformer_engine:
            return "needs Transformer Engine"
        return None


FREE = "evolved_sampling.preset=default"
BF16 = "training.precision=bf16"
FP32 = "training.precision=fp32"
LARGE = (
    "model.seq_length=512",
    "model.num_layers=12",
    "model.hidden_size=768",
    "model.num_attention_heads=12",
    BF16,
    FREE,
)


def overhead(batch: int) -> Case:
    """A run whose meta-batch is so large, for what Evolved Sampling costs a step."""
    sizes = (f"training.global_batch_size={batch}", f"training.train_samples={12 * batch}", "training.lr=1e-4")
    return Case(f"overhead-{batch}", settings=(*LARGE, *sizes), judged="ends")


CASES = (
    Case("cpu", cpu=True, settings=(FP32,), judged="learns"),
    Case("one", settings=(FP32,)),
    Case("one-free-scores", settings=(FP32, FREE), judged="learns"),
    Case("dp2", 2, (FP32,)),
    Case("tp2", 2, (FP32, "parallel.tensor=2")),
    Case("pp2", 2, (FP32, "parallel.pipeline=2")),
    Case("vpp2", 2, (FP32, "parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    Case("cp2", 2, (BF16, "parallel.context=2"), against="bf16", needs_engine=True),
    Case("cp2-pp2", 4, (BF16, "parallel.context=2", "parallel.pipeline=2"), against="bf16", needs_engine=True),
    Case("dp4-overlaps", 4, (FP32, "parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true")),
    Case("bf16", settings=(BF16,), judged="learns"),
    Case("bf16-dp2", 2, (BF16,), against="bf16"),
    Case(
        "fp8-delayed-free-scores",
        settings=(BF16, FREE),
        model={"fp8": "hybrid", "fp8_recipe": "delayed"},
        judged="learns",
        needs_engine=True,
    ),
    Case(
        "fp8-tensorwise-fresh-scores",
        settings=(BF16,),
        model={"fp8": "hybrid", "fp8_recipe": "tensorwise"},
        judged="learns",
        needs_engine=True,
    ),
    Case(
        "cuda-graphs-free-scores",
        settings=(BF16, FREE),
        model={"cuda_graph_impl": "local"},
        judged="learns",
        needs_engine=True,
    ),
    overhead(512),
    overhead(4096),
)


@dataclass(frozen=True)
class Measured:
    """What a run left behind."""

    chosen: list[list[int]]
    """Ids by iteration."""
    loss: list[float]
    """Mean loss of the trained sequences, by iteration."""
    seconds: Mapping[str, float]
    """Wall-clock of the whole run by part."""
    error: str | None = None
    """The end of what it printed, where it failed."""

    @property
    def overhead(self) -> dict[str, float] | None:
        """What Evolved Sampling costs a step beside the passes: milliseconds, and the share of the step."""
        step, count = self.seconds.get("step", 0.0), len(self.chosen)
        if not step or not count:
            return None
        own = self.seconds.get("exchange", 0.0) + self.seconds.get("order", 0.0)
        return {"milliseconds": 1e3 * own / count, "share_of_step": own / step, "step_milliseconds": 1e3 * step / count}


class Verdict(NamedTuple):
    """What came of a case."""

    ok: bool | None
    """None: it was not judged."""
    told: str


def look() -> Machine:
    """What this machine has; nothing is started on a device."""
    import torch

    names = tuple(torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count()))
    wanted = ("torch", "megatron-core", "transformer-engine", "deepspeed", "numpy", "es_megatron")
    versions = {name: version_of(name) for name in wanted}
    versions["cuda"], versions["python"] = torch.version.cuda, sys.version.split()[0]
    return Machine(names, importlib.util.find_spec("transformer_engine") is not None, versions)


def version_of(package: str) -> str | None:
    """Version of an installed package, None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def settings_of(blend: Path) -> dict[str, Any]:
    """Settings that all cases share."""
    return {
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "seq_length": SEQ_LENGTH,
            "init_std": 0.1,  # losses that differ from the first iteration on
        },
        "data": {"blend": str(blend)},
        "training": {
            "train_samples": 30 * 32,
            "global_batch_size": 32,
            "micro_batch_size": 2,
            "eval_samples": 0,
            "log_interval": 1,
        },
        "run": {"save_interval": None, "audit": True, "progress": False},
        "evolved_sampling": {
            "preset": "paper",
            "selection": {"keep_ratio": 0.25},
            "pruning": {"ratio": 0.2},
            "order": {"mask_lag": 4},
        },
    }


def write_blend(folder: Path) -> Path:
    """Write components of random tokens, each with its own share of the vocabulary, in Megatron's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, rows) in enumerate(ROWS.items()):
        random = np.random.default_rng(number)
        tokens = random.choice(VOCAB, rows * SEQ_LENGTH + 1, p=random.dirichlet(np.full(VOCAB, 0.1))).astype(np.uint16)
        for row in np.flatnonzero(random.random(rows) < 0.4):
            tokens[row * SEQ_LENGTH : (row + 1) * SEQ_LENGTH] = tokens[row * SEQ_LENGTH]
        (folder / f"{name}.bin").write_bytes(tokens.tobytes())
        head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 1, 2)
        lengths, starts = np.asarray([len(tokens)], np.int32), np.zeros(1, np.int64)
        (folder / f"{name}.idx").write_bytes(head + lengths.tobytes() + starts.tobytes() + np.arange(2).tobytes())
    entries = [{"name": name, "train": name} for name in ROWS]
    (folder / "blend.yaml").write_text(yaml.safe_dump({"vocab_size": VOCAB, "components": entries}))
    return folder / "blend.yaml"


def command_of(case: Case, settings: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command of a case, and what it has in its environment beside what is there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    command += ["-m", "benchmarks.gpu_worker", json.dumps(dict(case.model)), str(settings)]
    # float32 that is float32: TF32 would tip choices
    return [*command, f"run.directory={folder}", *case.settings], {
        "NVIDIA_TF32_OVERRIDE": "0",
        "OMP_NUM_THREADS": "4",
        **({"CUDA_VISIBLE_DEVICES": ""} if case.cpu else {}),
    }


def run_case(case: Case, settings: Path, folder: Path) -> Measured:
    """Run a case to its end, or to its time-out."""
    command, more = command_of(case, settings, folder)
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **more}, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(60 * MINUTES)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun hands it on
            process.wait()
            code = -1
    told = log.read_text(errors="replace")[-2000:]
    return read_run(folder) if code == 0 else Measured([], [], {}, error=f"ended with {code}: {told}")


def read_run(folder: Path) -> Measured:
    """What a finished run wrote."""
    audit = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    losses = json.loads((folder / "losses.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    return Measured([line["chosen"] for line in audit], losses, summary["seconds"])


def share_alike(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of chosen ids that two runs have in common, over all iterations."""
    common = sum(len(set(a) & set(b)) for a, b in zip(ours, theirs, strict=False))
    return common / max(1, sum(map(len, ours)), sum(map(len, theirs)))


def judge(case: Case, found: Measured, against: Measured | None) -> Verdict:
    """Whether a run is what it should be.

    Args:
        case: what was run.
        found: what came of it.
        against: the run that it is held against; None where there is none.
    """
    if found.error is not None:
        return Verdict(False, found.error)
    if not found.loss or not np.isfinite(found.loss).all():
        return Verdict(False, "its losses are not all finite")
    if case.judged == "ends":
        return Verdict(True, f"{len(found.loss)} iterations, all losses finite")
    if case.judged == "learns":
        few = max(1, len(found.loss) // 5)
        first, last = float(np.mean(found.loss[:few])), float(np.mean(found.loss[-few:]))
        fell = last < first
        return Verdict(fell, f"losses {'fell' if fell else 'did not fall'} from {first:.3f} to {last:.3f}")
    if against is None or against.error is not None:
        return Verdict(None, f"`{case.against}` did not run")
    exact = [set(a) == set(b) for a, b in zip(found.chosen, against.chosen, strict=False)]
    share = share_alike(found.chosen, against.chosen)
    equal = len(exact) if all(exact) else exact.index(False)
    told = f"{share:.1%} of the ids are those of `{case.against}`, all in the first {equal} of {len(exact)} iterations"
    needed = EXACT_ITERATIONS if FP32 in case.settings else 1
    return Verdict(share >= ALIKE and equal >= needed and len(found.chosen) == len(against.chosen), told)


Runner = Callable[[Case, Path, Path], Measured]


def check(machine: Machine, folder: Path, run: Runner = run_case, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all cases that the machine can, and judge them; what is to be written as JSON."""
    report: dict[str, Any] = {"run": bool(machine.devices), "devices": machine.devices, "versions": machine.versions}
    if not machine.devices:
        report["would_run"] = {case.name: command_of(case, Path("SETTINGS"), Path(case.name))[0] for case in CASES}
        say(f"no CUDA device here: nothing was run. It would run {len(CASES)} cases: {', '.join(report['would_run'])}")
        return report
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(settings_of(write_blend(folder / "data").resolve())))
    measured: dict[str, Measured] = {}
    report["cases"] = told = dict[str, Any]()
    ordered = sorted(CASES, key=lambda case: case.judged == "ids")  # what others are held against goes first
    for case in ordered:
        why = case.why_not(machine)
        if why is not None:
            told[case.name] = {"ok": None, "told": why}
        else:
            found = measured[case.name] = run(case, settings, folder / case.name)
            verdict = judge(case, found, measured.get(case.against))
            told[case.name] = {**verdict._asdict(), "overhead": found.overhead, "iterations": len(found.chosen)}
        say(f"{case.name}: {told[case.name]['told']}")
    report["ok"] = all(each["ok"] is not False for each in told.values())
    return report


def main() -> int:
    """Check, write, and end with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_check"), help="for the runs")
    arguments = parser.parse_args()
    report = check(look(), arguments.folder)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {arguments.output}")
    return 0 if report.get("ok", True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
