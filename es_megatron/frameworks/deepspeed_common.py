"""What the DeepSpeed engines share: settings from the JSON, ranks, refusals, and the ES state beside each tag.

Shape suffixes: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from es_megatron.checkpoint import disk
from es_megatron.checkpoint.agreement import agreed, compute_on_first
from es_megatron.checkpoint.es_state import read_manifest, read_state
from es_megatron.checkpoint.sealed import leads_down
from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.metrics import RunTotals
from es_megatron.core.step import Trained, Work
from es_megatron.data.manifest import Manifest
from es_megatron.errors import CheckpointError, ConfigError, LossError
from es_megatron.frameworks.data_only import check_folder, data_only
from es_megatron.frameworks.deepspeed_accumulation import check_steps
from es_megatron.frameworks.feed import MetaBatchFeed, Rows
from es_megatron.frameworks.handle import Handle
from es_megatron.frameworks.rate import scaled_steps
from es_megatron.frameworks.run_plan import settings_in
from es_megatron.frameworks.samples import Samples
from es_megatron.rank_grid import RankGrid
from es_megatron.refusals.deepspeed import DEEPSPEED, block_is_on
from es_megatron.refusals.table import refuse
from es_megatron.scoring import scorer_of

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
LossOf = Callable[[Tensor, Tensor], Tensor]

LOGGER = logging.getLogger(__name__)

ES_STATE = "es_state"
LATEST = "latest"
UNIVERSAL = "_universal"
STATES = "*_states.pt"
"""DeepSpeed's files in a tag's folder; a user may have put others there."""

FEATURES: Mapping[str, Callable[[Any], Any]] = {
    "curriculum_learning": lambda engine: (
        block_is_on(engine._config._param_dict, "curriculum_learning") or engine.curriculum_learning_enabled()
    ),
    "random_ltd": lambda engine: engine.random_ltd_enabled(),
    "moe_layers": lambda engine: engine.has_moe_layers,
    "sequence_parallel_size": lambda engine: engine.sequence_parallel_size,
}
"""Features that an engine knows of itself; others are blocks of its configuration."""


def prepare() -> None:
    """Keep DeepSpeed from compiling or guessing on a machine without CUDA; call it before DeepSpeed's first use.

    `init_distributed` would build its shared-memory operation: minutes, and a hard error without a compiler.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError("DeepSpeed must be installed for its engines. Install `es_megatron[deepspeed]`.") from error
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def settings_of(engine: Any) -> EvolvedSamplingConfig:
    """Settings in the `"evolved_sampling"` block of an engine's JSON.

    Raises:
        ConfigError: no such block, an unknown key, a value out of range.
    """
    return settings_in(engine._config._param_dict)  # what DeepSpeed has read, from a dict or a file


def check_engine(engine: Any, config: EvolvedSamplingConfig) -> None:
    """Refuse what would train or score wrongly.

    Raises:
        ConfigError: names the feature, why, and the cure.
    """
    if engine.bfloat16_enabled() and engine.zero_optimization_stage() == 0 and "adam" in optimizer_name(engine).lower():
        raise ConfigError(
            "`zero_optimization.stage` must be 1 or more with bf16 and Adam: DeepSpeed's bf16 optimizer without ZeRO "
            "takes a step of its own at the start, which shifts Adam's bias correction. Use stage 1."
        )

    check_merging(engine, config)

    def feature(name: str) -> Any:
        return FEATURES[name](engine) if name in FEATURES else block_is_on(engine._config._param_dict, name)

    refuse(DEEPSPEED, feature, config)


def check_merging(engine: Any, config: EvolvedSamplingConfig) -> None:
    """Refuse a merged scorer where this engine cannot merge.

    Raises:
        ConfigError: it has no pipeline, or cannot score the beginnings of sequences so.
    """
    scorer = scorer_of(config)
    if scorer.merges and not hasattr(engine, "_train_schedule"):
        raise ConfigError(
            "`scorer.overlap` must be `none` without a `PipelineEngine` of DeepSpeed 0.19 or later, but is `merged` "
            "instead: without pipeline stages nothing is idle. Leave it out."
        )
    if scorer.merges and (scorer.shortens or config.scorer.micro_batch_size is not None):
        raise ConfigError(
            "`scorer.overlap` must be `none` with `scorer: prefix` or `scorer.micro_batch_size` on DeepSpeed's "
            "pipeline, whose stages exchange micro-batches of one shape, but is `merged` instead. Leave one out."
        )


def optimizer_name(engine: Any) -> str:
    """Class of the optimizer inside DeepSpeed's wrapper."""
    return type(getattr(engine.optimizer, "optimizer", engine.optimizer)).__name__


def rank_grid_of(place: tuple[int, int]) -> RankGrid:
    """The grid of ranks from everybody's place in it; collective over the world.

    Args:
        place: this rank's data-parallel and model-parallel rank.
    """
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, place)
    ranks = {each: rank for rank, each in enumerate(places)}
    data, model = (1 + max(each[axis] for each in places) for axis in (0, 1))
    return RankGrid.of_grid([[ranks[d, m] for m in range(model)] for d in range(data)])


def mean_loss(losses_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean loss over the unmasked tokens of a micro-batch, 0 where all are masked."""
    mask_BT = mask_BT.float()
    return (losses_BT.float() * mask_BT).sum() / mask_BT.sum().clamp(min=1)


@contextmanager
def universal_mended(engine: Any) -> Generator[None]:
    """Load a universal checkpoint in the body of a `with` so that stage 3 gets it right.

    DeepSpeed gives every parameter group the first one's settings there (so that norms would decay), and all of them
    one and the same step count (so that it would grow by as many at each step).
    """
    optimizer = getattr(engine.optimizer, "optimizer", None)
    if engine.zero_optimization_stage() < 3 or optimizer is None:
        yield
        return
    before = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, kept in zip(optimizer.param_groups, before, strict=True):
        group.update(kept)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


class DeepSpeedSampling(Handle, ABC):
    """Evolved Sampling attached to a DeepSpeed engine; subclasses do the passes (`core.step.Framework`)."""

    def __init__(self, engine: EvolvedSampling, feed: MetaBatchFeed | None, deepspeed: Any, loss_source: int) -> None:
        """Join the parts, and put the ES state beside the engine's checkpoints from now on.

        Args:
            engine: the step and its state.
            feed: samples, None on ranks that read no data.
            deepspeed: DeepSpeed's engine.
            loss_source: model-parallel rank that computes losses.
        """
        super().__init__(engine, feed, loss_source)
        self.deepspeed = deepspeed
        self.totals = RunTotals(len(engine.manifest.components), engine.meta_batch)
        """What the run has done so far, skipped steps among it; checkpoints carry it."""
        self._own_save, self._own_load = deepspeed.save_checkpoint, deepspeed.load_checkpoint
        deepspeed.save_checkpoint, deepspeed.load_checkpoint = self.save_checkpoint, self.load_checkpoint

    def detach(self) -> None:
        """Give the engine its own checkpoint functions back."""
        for name in ("save_checkpoint", "load_checkpoint"):
            self.deepspeed.__dict__.pop(name, None)

    @abstractmethod
    def score(self, positions: Int64) -> Float32 | None:
        """Forward-only pass in evaluation mode; see `Framework.score`."""

    @abstractmethod
    def train(self, work: Work) -> Trained:
        """Forward and backward on the chosen sequences, and the optimizer's step; see `Framework.train`."""

    def step(self) -> Any:
        """Draw a meta-batch, choose, train on the choice, step once, and close the iteration; collective.

        Returns:
            Mean training loss (float) over the micro-batches of all ranks, the same on every rank.

        Raises:
            LossError: too many losses are not finite, or weights were updated with a gradient that is not.
            ConfigError: DeepSpeed's optimizer was not called exactly once.
        """
        before = self.deepspeed.global_steps
        batch = self.engine.draw()
        if self.feed is not None:
            self.feed.fetch(batch)
        with scaled_steps(self.deepspeed.optimizer, self.engine.rate_factor):
            result = self.engine.step(batch, self)
        check_steps(self.deepspeed.global_steps - before)
        succeeded = bool(self.deepspeed.was_step_applied())
        norm = self.deepspeed.get_global_grad_norm()
        if succeeded and not np.isfinite(float(result if norm is None else norm)):
            raise LossError(
                f"The gradient of iteration {self.engine.iteration} is not finite, and DeepSpeed has applied it. "
                "Resume from the last checkpoint with a lower learning rate, or in bf16 with `check_grad_overflow`."
            )
        record = self.engine.last
        assert record is not None
        self.engine.finish(succeeded)
        self.totals.add(record, {}, succeeded=succeeded)
        if not succeeded and self.engine.grid.world_rank == 0:
            LOGGER.warning(
                "DeepSpeed skipped the optimizer's step of iteration %d, since a gradient is not finite: weights and "
                "scores stay as they were (%d of %d iterations so far)",
                record.iteration,
                self.totals.skipped,
                self.engine.iteration,
            )
        return result

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        **more: Any,
    ) -> bool:
        """DeepSpeed's `save_checkpoint`, with `es_state/` in the tag's folder before `latest` names it; collective.

        Raises:
            CheckpointError: the ES state could not be written; `latest` still names the tag before.
        """
        tag = str(tag) if tag is not None else f"global_step{self.deepspeed.global_steps}"
        done = self._own_save(str(save_dir), tag=tag, client_state=dict(client_state or {}), save_latest=False, **more)
        grid = self.engine.grid
        self.save(Path(save_dir) / tag / ES_STATE, totals=self.totals.state_dict())
        with agreed(grid, f"move {Path(save_dir) / LATEST}"):
            if save_latest and grid.world_rank == 0:
                disk.replace_file(Path(save_dir) / LATEST, tag.encode())
        return bool(done)

    def load_checkpoint(self, load_dir: str | Path, tag: str | None = None, *args: Any, **more: Any) -> Any:
        """DeepSpeed's `load_checkpoint`, of data alone, and the ES state of that tag; collective.

        Args:
            load_dir: as DeepSpeed's.
            tag: as DeepSpeed's; None: the one `latest` names, or where that is gone the newest that is there.
            args: passed on.
            more: passed on, but `es_state=False`, which leaves the ES state as it is (a checkpoint of a plain run).

        Raises:
            CheckpointError: the tag has no ES state, or it is damaged or of another run; or a file names something to
                call, see `data_only`.
        """
        es_state, folder, grid = more.pop("es_state", True), Path(load_dir), self.engine.grid
        universal = bool(self.deepspeed.load_universal_checkpoint())
        if tag is None:
            tag = compute_on_first(
                grid, f"find the newest checkpoint in {folder}", lambda: newest_tag(folder, universal)
            )
        if tag is not None:
            check_folder(folder / str(tag), grid, STATES)
        with universal_mended(self.deepspeed) if universal else nullcontext(), data_only(folder):
            found = self._own_load(str(load_dir), tag, *args, **more)
        if es_state and tag is not None and found[0] is not None:
            more = self.load(state_folder(Path(load_dir), str(tag)))
            if "totals" in more:
                self.totals.load_state_dict(more["totals"])
        return found


def newest_tag(directory: Path, universal: bool) -> str | None:
    """The tag that `latest` names; if that is gone or damaged, the newest tag with an ES state, and a warning.

    Args:
        directory: that holds the tags' folders.
        universal: whether universal checkpoints are looked for, which have a `latest_universal`.

    Returns:
        None if there is no `latest`: DeepSpeed tells.

    Raises:
        CheckpointError: what it names is gone, and nothing else is left.
    """
    suffix = UNIVERSAL if universal else ""
    path = directory / f"{LATEST}{suffix}"
    try:
        named = path.read_bytes().decode(errors="replace").strip()
    except OSError as error:
        named, problem = None, f"cannot be read ({error.strerror})"
    else:
        if leads_down(named) and (directory / named).is_dir():
            return named
        problem = f"names {named!r}, which is missing"
    states = [(_iteration(each), each.parent.name) for each in directory.glob(f"*/{ES_STATE}")]
    tags = [tag + suffix for iteration, tag in sorted(states, reverse=True) if iteration >= 0]
    left = [tag for tag in tags if (directory / tag).is_dir()]
    if named is None and not path.exists():
        return None
    if not left:
        raise CheckpointError(
            f"{path} {problem}, and no other tag in {directory} has an `{ES_STATE}`. Restore it from a copy, or pass "
            "the tag to load."
        )
    LOGGER.warning("%s %s. Falling back to the newest checkpoint there is, %s.", path, problem, left[0])
    return left[0]


def _iteration(state: Path) -> int:
    """Iterations that an ES state has seen; -1 if it cannot be read."""
    try:
        return int(read_state(state, read_manifest(state))["engine"]["iteration"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return -1


def state_folder(directory: Path, tag: str) -> Path:
    """Where the ES state of a tag is; a tag converted to a universal checkpoint has that of its origin.

    Raises:
        CheckpointError: neither has one.
    """
    names = [tag, tag.removesuffix(UNIVERSAL)]
    for name in names:
        if (directory / name / ES_STATE).is_dir():
            return directory / name / ES_STATE
    raise CheckpointError(
        f"`{directory / tag}` holds no `{ES_STATE}`: it was saved without Evolved Sampling. Pass `es_state=False` to "
        "begin with new scores, or load another tag."
    )


def build_engine(
    deepspeed: Any,
    config: EvolvedSamplingConfig | None,
    manifest: Manifest,
    grid: RankGrid,
    train_samples: int,
    warm_start: WarmStart = start_with_scores,
) -> EvolvedSampling:
    """The step over the batch sizes of a DeepSpeed engine.

    Raises:
        ConfigError: the settings are wrong, or ask for what the engine cannot do.
    """
    config = config or settings_of(deepspeed)
    check_engine(deepspeed, config)
    engine = EvolvedSampling(
        config,
        manifest,
        grid,
        meta_batch=int(deepspeed.train_batch_size()),
        micro_batch=int(deepspeed.train_micro_batch_size_per_gpu()),
        train_samples=train_samples,
        warm_start=warm_start,
    )
    size = config.scorer.micro_batch_size
    if size is not None and len(engine.own) % size:
        fitting = [s for s in range(1, len(engine.own) + 1) if len(engine.own) % s == 0]
        raise ConfigError(
            f"`scorer.micro_batch_size` must divide a rank's {len(engine.own)} sequences, but is {size} instead. "
            f"Use one of {fitting}."
        )
    return engine


def build_feed(engine: EvolvedSampling, rows: Rows, workers: int, prefetch: int) -> MetaBatchFeed:
    """Samples of this rank, read ahead."""
    lag = engine.epochs.read_ahead(workers * prefetch)
    rows = rows if isinstance(rows, Samples) else Samples(rows, engine.manifest.seq_length)
    return MetaBatchFeed(rows, engine.sampler, engine.own, workers=workers, prefetch=prefetch, mask_lag=lag)
