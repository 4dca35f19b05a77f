"""Model, optimizer, schedule and random states of a run, through Megatron-Core's distributed checkpoints.

Such a checkpoint can be loaded under another data-, tensor- or pipeline-parallel size. Random states belong to a
layout, and are restored if tensor- and pipeline-parallel sizes are those of the checkpoint.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from es_megatron.checkpoint.agreement import describe
from es_megatron.errors import CheckpointError
from es_megatron.frameworks.data_only import check_files, check_metadata, data_only
from es_megatron.trainer.model import settled_weights, unwrap
from es_megatron.trainer.optimizer_state import METADATA, sharded_optimizer_state
from es_megatron.trainer.writing import writing_in_threads

logger = logging.getLogger(__name__)

BRIEF = 400
"""Characters of an upstream error that are repeated."""

COMMON = "common.pt"
"""Megatron-Core's file of what is not sharded."""

PROBE_BYTES = 1 << 16
"""What every rank writes, and removes, before a checkpoint is begun."""

SPACE_MARGIN = 1.02
"""Bytes a checkpoint takes on disk over those of its tensors: file headers and metadata."""


def save_model(
    directory: str | Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    iteration: int,
) -> None:
    """Write a checkpoint; collective. Nothing is synced to disk or renamed here: that is the caller's.

    Args:
        directory: of this checkpoint alone; made if it does not exist, and best empty.
        chunks: of `build_model`.
        optimizer: of `build_optimizer`.
        scheduler: of `build_scheduler`.
        iteration: finished iterations.

    Raises:
        CheckpointError: not enough space, seen on every rank before anything is written, or a write failed.
    """
    directory = Path(directory)
    with settled_weights(chunks):
        state = _sharded_state(chunks, optimizer, is_loading=False)
        state["scheduler"] = scheduler.state_dict()
        state["iteration"] = iteration
        state["rng"] = ShardedObject("rng", random_state(), *_rng_place())
        _make_room(directory, _stored_bytes(state))
        with _failures_named(f"Checkpoint `{directory}` could not be written", "Check the space and rights there."):
            about = {**METADATA, "layout": _layout(), "distributed_optimizer": _is_sharded(chunks)}
            with writing_in_threads():
                dist_checkpointing.save(state, str(directory), content_metadata=about)


def load_model(
    directory: str | Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
) -> int:
    """Load a checkpoint of `save_model`, in place; collective.

    Args:
        directory: of the checkpoint.
        chunks: of `build_model`, for the same model under any layout.
        optimizer: of `build_optimizer`.
        scheduler: of `build_scheduler`; takes the checkpoint's schedule and position.

    Returns:
        Iterations that were finished.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one of another model.
    """
    directory = Path(directory)
    with _reading(directory, f"Checkpoint `{directory}` could not be loaded", "Use an older one, or its own settings."):
        if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
            raise CheckpointError(
                f"`{directory}` holds no complete model checkpoint. Check the path, or use an older one."
            )
        saved: dict[str, Any] = dist_checkpointing.load_content_metadata(str(directory)) or {}
        _check_kind(directory, saved, chunks)
        state = _sharded_state(chunks, optimizer, is_loading=True)
        same_layout = saved.get("layout") == _layout()
        if same_layout:
            state["rng"] = ShardedObject("rng", None, *_rng_place())
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))  # pyright: ignore[reportAssignmentType]
        for key, chunk in _named(chunks).items():
            unwrap(chunk).load_state_dict(loaded[key], strict=True)
        _take_rates(loaded["optimizer"], optimizer)
        optimizer.load_state_dict(loaded["optimizer"])
        scheduler.num_steps = 0  # loading adds the checkpoint's steps
        scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        restore_random_state(loaded["rng"])
    else:
        logger.info(
            "Random states start anew: the checkpoint has layout %s, the run %s.", saved.get("layout"), _layout()
        )
    return int(loaded["iteration"])


def _take_rates(state: Any, optimizer: ChainedOptimizer) -> None:
    """Give the saved groups of parameters the run's highest and lowest rate, in place: from 0.19 on Megatron-Core finds
    the saved group of a parameter by them, and a run may go on with others.
    """
    rates = {name: value for name, value in optimizer.param_groups[0].items() if name in ("max_lr", "min_lr")}
    for each in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        _take_rates(each, optimizer)
    if isinstance(state, dict) and "params" in state and "max_lr" in state:
        state.update(rates)


def load_weights(directory: Path, chunks: Sequence[DistributedDataParallel]) -> None:
    """Load the weights of a checkpoint alone, in place, under any layout; collective.

    Args:
        directory: of a checkpoint of `save_model`.
        chunks: of `build_model`, for the same model.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one of another model.
    """
    with _reading(directory, f"The weights of `{directory}` could not be loaded", "Use its own settings."):
        if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
            raise CheckpointError(f"`{directory}` holds no complete model checkpoint. Check the path.")
        state = {
            key: unwrap(chunk).sharded_state_dict(metadata=dict(METADATA)) for key, chunk in _named(chunks).items()
        }
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))  # pyright: ignore[reportAssignmentType]
        for key, chunk in _named(chunks).items():
            unwrap(chunk).load_state_dict(loaded[key], strict=True)


def random_state() -> dict[str, Any]:
    """Give the states of every generator a step may draw from, in types that torch loads without pickle."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - what libraries draw from
    return {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": {name: state.clone() for name, state in _tracker().get_states().items()},
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to a state of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states(dict(state["tracker"]))


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def _named(chunks: Sequence[DistributedDataParallel]) -> dict[str, DistributedDataParallel]:
    """Chunks under the keys that Megatron's optimizers look for."""
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{index}": chunk for index, chunk in enumerate(chunks)}


def _sharded_state(
    chunks: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    """Describe which part of which tensor this rank holds. The optimizer's keys are those of the weights."""
    state: dict[str, Any] = {
        key: unwrap(chunk).sharded_state_dict(metadata=dict(METADATA)) for key, chunk in _named(chunks).items()
    }
    state["optimizer"] = sharded_optimizer_state(optimizer, state, is_loading=is_loading)
    return state


def _is_sharded(chunks: Sequence[DistributedDataParallel]) -> bool:
    return bool(chunks[0].ddp_config.use_distributed_optimizer)


def _check_kind(directory: Path, saved: dict[str, Any], chunks: Sequence[DistributedDataParallel]) -> None:
    """Refuse the state of an optimizer that is sharded where the run's is not, or the other way round."""
    was, now = bool(saved.get("distributed_optimizer")), _is_sharded(chunks)
    if was != now:
        raise CheckpointError(
            f"Checkpoint `{directory}` is of a run with `distributed_optimizer: {str(was).lower()}`, but this run has "
            f"{str(now).lower()}. Set it as it was; that works under any data-parallel size."
        )


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _rng_place() -> tuple[tuple[int, int], tuple[int, int], int]:
    """Global shape, own offset and grid of random states: one for each stage and tensor rank."""
    layout = _layout()
    offset = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return (layout["pipeline"], layout["tensor"]), offset, replica


def _stored_bytes(state: object) -> int:
    """Count the bytes this rank writes: of tensors whose first grid it holds."""
    if isinstance(state, dict):
        return sum(_stored_bytes(value) for value in state.values())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(state, list | tuple):
        return sum(_stored_bytes(value) for value in state)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    data, grid = getattr(state, "data", None), getattr(state, "replica_id", None)
    if not isinstance(data, torch.Tensor) or grid is None:
        return 0
    first = not any(grid) if isinstance(grid, tuple) else grid == 0  # pyright: ignore[reportUnknownArgumentType]
    return data.numel() * data.element_size() if first else 0


def _make_room(directory: Path, own_bytes: int) -> None:
    """Make the folder, and have every rank refuse if any of them sees a problem.

    Rank 0 writes parts alone, and while it failed there the others would wait for it.
    """
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, own_bytes)
    needed = int(sum(sizes) * SPACE_MARGIN)
    problem = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < needed:
            problem = f"needs {needed:,} bytes, but {free:,} are free"
        else:
            _write_probe(directory / f"probe-{dist.get_rank()}")
    except OSError as error:
        problem = f"cannot be made: {describe(error).rstrip('.')}"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise CheckpointError(
                f"Checkpoint `{directory}` {found} (rank {rank}). Free some space, keep fewer checkpoints, or change "
                "`run.directory`."
            )


def _write_probe(path: Path) -> None:
    """Find out what free space does not tell: quotas, limits on file sizes, a disk that fails or is read-only."""
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _failures_named(what: str, cure: str) -> Generator[None, None, None]:
    """Turn whatever upstream raises into an error that names the checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is a bare BaseException
        raise CheckpointError(f"{what}: {_brief(error)}. {cure}") from error


@contextmanager
def _reading(directory: Path, what: str, cure: str) -> Generator[None, None, None]:
    """Load a checkpoint as data in the body of a `with`, and name it in whatever goes wrong."""
    with _failures_named(what, cure):
        check_metadata(directory)
        check_files([directory / COMMON] if (directory / COMMON).is_file() else [])
        with data_only(directory):
            yield


def _brief(error: BaseException) -> str:
    """Tell an error in a line; of those of several ranks the first."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    for rank, (failure, _) in failures.items():
        return f"{_brief(failure)} (rank {rank})"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:BRIEF]}".rstrip(" .")
