"""What several ranks do together: exchange and update of a step, checkpoints, moving between numbers of ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.scale_measure import measured, resident
from benchmarks.scale_prune import config, fill, one_component
from es_megatron.checkpoint import ScoreRange, load_es_state, save_es_state
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore

META_BATCH = 16_384
STEPS = 105


def on_ranks(ranks: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function on gloo ranks, each a forked process; what each returned, by rank."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, Path(folder), body, arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"A rank ended with exit codes {[process.exitcode for process in processes]}.")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: Path, body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    told = body(RankGrid.data_parallel(), *arguments)
    (folder / f"{rank}.json").write_text(json.dumps({**told, "rss": resident("VmHWM")}))
    dist.barrier()
    dist.destroy_process_group()


def evolve(samples: int, ranks: int) -> dict[str, Any]:
    """Share losses, look scores up, evolve and commit a meta-batch of 16,384; median step of the slowest rank."""
    told = on_ranks(ranks, _evolve, samples)
    names = ("step_ms", "exchange_ms", "losses_alone_ms", "debiased_step_ms")
    return {
        "samples": samples,
        "ranks": ranks,
        **{name: max(each[name] for each in told) for name in names},
        "rss_gb": sum(each["rss"] for each in told) / 1e9,
    }


def _evolve(grid: RankGrid, samples: int) -> dict[str, Any]:
    store = ScoreStore(one_component(samples), config(), grid)
    fill(store)
    debiased = ScoreStore(one_component(samples), config(scores={"correction": "debiased"}), grid)
    debiased.score, debiased.visits = store.score, store.visits
    times: dict[str, list[float]] = {"step": [], "exchange": [], "losses_alone": [], "debiased_step": []}
    random = np.random.default_rng(0)
    own = np.arange(META_BATCH) % grid.dp_size == grid.dp_rank
    for iteration in range(STEPS):
        ids = random.integers(0, samples, META_BATCH)
        loss = np.where(own, random.lognormal(0.5, 0.3, META_BATCH), 0).astype(np.float32)
        for name, each in (("step", store), ("debiased_step", debiased)):
            grid.barrier()
            began = time.perf_counter()
            found, shared = each.exchange(ids, loss)
            exchanged = time.perf_counter()
            each.evolve(iteration, ids, found, shared)
            each.commit(iteration)
            times[name].append(time.perf_counter() - began)
            if name == "step":
                times["exchange"].append(exchanged - began)
        grid.barrier()
        began = time.perf_counter()
        grid.sum_over_dp(loss)
        times["losses_alone"].append(time.perf_counter() - began)
    return {f"{name}_ms": 1e3 * statistics.median(found[5:]) for name, found in times.items()}


def checkpoint(samples: int, folder: str) -> dict[str, Any]:
    """Save on 2 ranks, load on 2, and on 1 and 3 (a move between numbers of ranks).

    The peer is `numpy.save` and `numpy.load` of each rank's arrays: no checksum, no other number of ranks.
    """
    with tempfile.TemporaryDirectory(dir=folder) as root:
        saved = on_ranks(2, _save, samples, root)
        result: dict[str, Any] = {
            "samples": samples,
            "bytes": saved[0]["bytes"],
            "save_s": max(each["seconds"] for each in saved),
            "save_extra_bytes_per_sample": sum(each["extra"] for each in saved) / samples,
            "snapshot_s": max(each["snapshot"] for each in saved),
            "numpy_save_s": max(each["numpy"] for each in saved),
        }
        sums = sum(each["sum"] for each in saved)
        for ranks, name in ((2, "load"), (1, "reshard_2_to_1"), (3, "reshard_2_to_3")):
            loaded = on_ranks(ranks, _load, samples, root)
            assert sum(each["sum"] for each in loaded) == sums
            result[f"{name}_s"] = max(each["seconds"] for each in loaded)
            result[f"{name}_extra_bytes_per_sample"] = sum(each["extra"] for each in loaded) / samples
            if ranks == 2:
                result["numpy_load_s"] = max(each["numpy"] for each in loaded)
    return result


def _save(grid: RankGrid, samples: int, root: str) -> dict[str, Any]:
    manifest = one_component(samples)
    store = ScoreStore(manifest, config(), grid)
    fill(store)
    scores = ScoreRange(samples, store.low, store.score, store.visits)
    with measured() as cost:
        report = save_es_state(Path(root) / "es_state", scores, {}, {}, manifest.to_json(), grid)
    with measured() as snapshot:  # what training waits for when the rest is written in the background
        copies = store.score.copy(), store.visits.copy()
    told = {"bytes": report.bytes, "seconds": cost.seconds, "extra": cost.extra_bytes, "snapshot": snapshot.seconds}
    grid.barrier()
    with measured() as plain:
        for name, array in zip(("score", "visits"), copies, strict=True):
            with _numpy_file(root, grid, name).open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        grid.barrier()
    return {**told, "numpy": plain.seconds, "sum": _sum(*copies)}


def _load(grid: RankGrid, samples: int, root: str) -> dict[str, Any]:
    with measured() as cost:
        state = load_es_state(Path(root) / "es_state", samples, grid)
    told = {"seconds": cost.seconds, "extra": cost.extra_bytes, "sum": _sum(state.score, state.visits)}
    if grid.dp_size != 2:
        return told
    grid.barrier()
    with measured() as plain:
        arrays = [np.load(_numpy_file(root, grid, name)) for name in ("score", "visits")]
        grid.barrier()
    assert _sum(*arrays) == told["sum"]
    return {**told, "numpy": plain.seconds}


def _numpy_file(root: str, grid: RankGrid, name: str) -> Path:
    return Path(root) / f"{name}-{grid.dp_rank}.npy"


def _sum(score: Any, visits: Any) -> int:
    return int(score.view(np.uint32).sum(dtype=np.uint64)) + int(visits.sum(dtype=np.uint64))
