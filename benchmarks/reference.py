"""What a reference costs: scoring a blend with it, its memory, and an engine's own time with and without it.

    python -m benchmarks.reference [--json] [--quick]

Each part holds what is new beside what is known in one run: scoring beside a plain forward-only evaluation of the same
rows, in turns; a store of 10^8 samples with reference losses beside one without; steps of two ranks over such stores,
in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale_measure import measured, resident
from benchmarks.scale_prune import fill, one_component
from benchmarks.scale_ranks import on_ranks
from es_megatron.checkpoint.es_state import ScoreRange, save_es_state
from es_megatron.checkpoint.reference_losses import bind_reference
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.step import Trained, Work
from es_megatron.data.manifest import Manifest
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore
from es_megatron.testing import cpu

TURNS = 5
META_BATCH = 1024
SEQ_LENGTH = 4096
PARTS = ("scoring", "memory", "steps")


def main() -> None:
    """Run every part in a process of its own, and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the samples")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    samples = 10**6 if arguments.quick else 10**8
    if arguments.part is not None:
        cpu.install()
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(globals()[arguments.part](samples, Path(folder))))
        return
    found: dict[str, Any] = {}
    for part in PARTS:
        command = [sys.executable, "-m", "benchmarks.reference", "--part", part, *(["--quick"] * arguments.quick)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=2) if arguments.json else table(found))


def table(found: dict[str, Any]) -> str:
    """A line for each part."""
    score, memory, steps = (found[part] for part in PARTS)
    by_evaluation = f"{score['ratio']:.1%} of a forward-only evaluation's {score['evaluation_rows_per_s']:.0f} rows/s"
    of_reference = {kind: memory[f"{kind}_bytes_per_sample"] for kind in ("store", "reference", "reference_float16")}
    return (
        f"scoring {score['rows']} rows: {score['scoring_rows_per_s']:.0f} rows/s, {by_evaluation}\n"
        f"memory of {memory['samples']:.0e} samples: {of_reference['reference']:.2f} B a sample for h (float16 "
        f"{of_reference['reference_float16']:.2f} B), beside {of_reference['store']:.2f} B for scores\n"
        f"a step of {steps['meta_batch']} on 2 ranks: {steps['reducible_ms']:.2f} ms by a reference, "
        f"{steps['history_ms']:.2f} ms without (order, exchange, choice, commit; no passes)"
    )


def write_reference(folder: Path, manifest: Manifest) -> None:
    """Losses of every sample, as `es-megatron reference score` writes them."""
    loss = np.random.default_rng(0).lognormal(1.0, 0.3, manifest.total).astype(np.float32)
    scores = ScoreRange(manifest.total, 0, loss, np.ones(manifest.total, np.uint8))
    state = {"reference": {"model": "none", "checkpoint": "none", "tokens": manifest.seq_length}}
    save_es_state(folder, scores, {}, state, manifest.to_json(), RankGrid.alone())


def config(folder: Path | None, precision: str = "float32") -> EvolvedSamplingConfig:
    """Free scores with pruning; by a reference, where there is one."""
    by: dict[str, Any] = {"reference": {"folder": str(folder), "precision": precision}} if folder else {}
    policy = {"policy": "reducible"} if folder else {}
    return EvolvedSamplingConfig.from_mapping({"seed": 1, "pruning": {"ratio": 0.2}, "selection": policy, **by})


def scoring(samples: int, folder: Path) -> dict[str, Any]:
    """Rows a second of `RowScoring` and of an evaluation over the same rows and passes, medians of turns."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from benchmarks.step import RandomRows
    from benchmarks.step_sizes import MICRO_BATCH, VOCAB
    from es_megatron.checkpoint.row_scoring import RowScoring
    from es_megatron.frameworks.megatron_core import rank_grid_of_parallel_state
    from es_megatron.trainer.model import build_model, initialize
    from es_megatron.trainer.passes import SchedulePasses, evaluate, losses_of_rows
    from es_megatron.trainer.settings import DataSettings, ModelSettings, PretrainSettings, TrainingSettings

    count = 512 if samples < 10**7 else 4096
    settings = PretrainSettings(
        model=ModelSettings(num_layers=4, hidden_size=128, num_attention_heads=4, seq_length=128),
        data=DataSettings(blend=Path("synthetic")),
        training=TrainingSettings(passes=1.0, micro_batch_size=MICRO_BATCH, eval_samples=count),
    )
    initialize(settings)
    grid, source = rank_grid_of_parallel_state()
    rows = RandomRows(128, count)
    chunks = build_model(settings, VOCAB)
    passes = SchedulePasses(settings, chunks, get_forward_backward_func(), grid, source)
    seconds: dict[str, list[float]] = {"evaluation": [], "scoring": []}

    def losses_of(ids: Any, share: int) -> Any:
        return losses_of_rows(passes, rows, ids, share)

    for turn in range(TURNS):
        began = time.perf_counter()
        evaluate(passes, {"all": rows})
        seconds["evaluation"].append(time.perf_counter() - began)
        began = time.perf_counter()
        about = {"model": "none", "checkpoint": "none", "tokens": 128}
        RowScoring(grid, one_component(count), losses_of, folder / f"{turn}", about, lambda _: None).run()
        seconds["scoring"].append(time.perf_counter() - began)
    rates = {f"{name}_rows_per_s": count / statistics.median(each) for name, each in seconds.items()}
    return {"rows": count, **rates, "ratio": rates["scoring_rows_per_s"] / rates["evaluation_rows_per_s"]}


def memory(samples: int, folder: Path) -> dict[str, Any]:
    """Resident bytes a sample that scores take, and that reference losses add; and the peak while they are read."""
    manifest = one_component(samples)
    write_reference(folder / "reference", manifest)
    before = resident("VmRSS")
    store = ScoreStore(manifest, config(None), RankGrid.alone())
    fill(store)
    found: dict[str, Any] = {"samples": samples, "store_bytes_per_sample": (resident("VmRSS") - before) / samples}
    for precision, name in (("float32", "reference"), ("float16", "reference_float16")):
        store = ScoreStore(manifest, config(folder / "reference", precision), RankGrid.alone())
        before = resident("VmRSS")
        with measured() as cost:
            bind_reference(store, manifest.seq_length)
        found[f"{name}_bytes_per_sample"] = (resident("VmRSS") - before) / samples
        found[f"{name}_peak_bytes_per_sample"] = cost.extra_bytes / samples
    return found


class NoPasses:
    """A framework whose passes take no time: losses are a function of the id."""

    loss_source = 0

    def __init__(self) -> None:
        """Start without a meta-batch."""
        self.batch: Any = None

    def score(self, positions: Any) -> Any:
        """Never asked: scores are free."""
        raise AssertionError(f"a scoring pass over {len(positions)} sequences")

    def train(self, work: Work) -> Trained:
        """Losses of the trained ids."""
        loss = 1.0 + (self.batch.id[work.positions] % 1013) / 500
        return Trained(None, loss.astype(np.float32))


def steps(samples: int, folder: Path) -> dict[str, Any]:
    """Milliseconds of an iteration without its passes on the slower of two ranks, medians."""
    write_reference(folder / "reference", one_component(samples))
    told = on_ranks(2, _steps, samples, str(folder / "reference"))
    return {"samples": samples, "meta_batch": META_BATCH} | {
        name: max(each[name] for each in told) for name in ("history_ms", "reducible_ms")
    }


def _steps(grid: RankGrid, samples: int, reference: str) -> dict[str, Any]:
    configs = {"history": config(None), "reducible": config(Path(reference))}
    manifest = one_component(samples)
    engines = {
        name: EvolvedSampling(
            each, manifest, grid, meta_batch=META_BATCH, micro_batch=1, train_samples=META_BATCH * 1000
        )
        for name, each in configs.items()
    }
    framework, times = NoPasses(), {name: list[float]() for name in engines}
    for turn in range(160):
        for name, engine in engines.items():
            grid.barrier()
            began = time.perf_counter()
            framework.batch = engine.draw()
            engine.step(framework.batch, framework)
            engine.finish(succeeded=True)
            if turn > 60:  # annealing is over
                times[name].append(time.perf_counter() - began)
    return {f"{name}_ms": 1e3 * statistics.median(each) for name, each in times.items()}


if __name__ == "__main__":
    main()
