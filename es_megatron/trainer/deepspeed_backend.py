"""DeepSpeed as the framework of a run: its engine with ZeRO, or its pipeline engine, over Megatron-Core's layers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from typing_extensions import override

from es_megatron.checkpoint import disk
from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.warm_start import WarmStart, start_with_scores
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config.names import SECTION, block_in
from es_megatron.core.plan import Layout
from es_megatron.data.manifest import Manifest
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.frameworks import deepspeed_common
from es_megatron.frameworks.data_only import check_folder, data_only
from es_megatron.frameworks.feed import Rows
from es_megatron.frameworks.megatron_data import LoadedBlend
from es_megatron.rank_grid import RankGrid
from es_megatron.trainer import model
from es_megatron.trainer.backend import MARKS, Backend, Iteration
from es_megatron.trainer.model_state import random_state, restore_random_state
from es_megatron.trainer.optimizer import build_scheduler, learning_rate, take_settings
from es_megatron.trainer.passes import Float32, MicroBatches, calibrate, evaluate
from es_megatron.trainer.settings import PretrainSettings
from es_megatron.trainer.universal import convert_to_universal

LOGGER = logging.getLogger(__name__)

TAG = "model"
NEVER = 1 << 40


def initialize(settings: PretrainSettings) -> None:
    """Join the run: torch.distributed, Megatron's groups but for pipeline stages, and DeepSpeed on top of them.

    Raises:
        LayoutError: the world cannot hold the layout.
        ConfigError: DeepSpeed is not installed.
    """
    deepspeed_common.prepare()
    model.initialize(settings, stages_elsewhere=True)
    if dist.get_world_size() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed's engines ask for it, started alone or not
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class TensorParallelUnit:
    """Megatron-Core's groups as the `mpu` that DeepSpeed's engine asks for: model-parallel means tensor-parallel."""

    def __getattr__(self, name: str) -> Any:
        """Look a function up in Megatron's `parallel_state`."""
        names = {
            "get_model_parallel_world_size": "get_tensor_model_parallel_world_size",
            "get_model_parallel_rank": "get_tensor_model_parallel_rank",
            "get_model_parallel_group": "get_tensor_model_parallel_group",
        }
        if not name.startswith("get_"):
            raise AttributeError(name)
        return getattr(parallel_state, names.get(name, name))


class DeepSpeedPasses:
    """Passes through an attached DeepSpeed engine, as calibration and evaluation need them."""

    def __init__(self, settings: PretrainSettings, sampling: Any) -> None:
        """Take the attached engine."""
        self.settings, self.sampling = settings, sampling
        self.grid: RankGrid = sampling.engine.grid
        self.loss_source: int = sampling.loss_source

    def score(self, micro_batches: MicroBatches) -> Float32 | None:
        """Mean token loss of each sequence, forward only; None on ranks without losses."""
        return self.sampling.score_batches(micro_batches)

    def train(self, micro_batches: MicroBatches) -> None:
        """Forward and backward, leaving no trace but gradients."""
        self.sampling.train_batches(micro_batches)


class DeepSpeedBackend(Backend):
    """A model in a DeepSpeed engine, or in its pipeline engine, with Evolved Sampling attached."""

    def __init__(
        self,
        settings: PretrainSettings,
        blend: LoadedBlend,
        train_samples: int,
        warm_start: WarmStart = start_with_scores,
    ) -> None:
        """Build the model and attach; see `build_backend`."""
        self.settings = settings
        self.deepspeed: Any = build_deepspeed(settings, blend.vocab_size)
        sizes = (getattr(each, "ds_numel", each.numel()) for each in self.deepspeed.module.parameters())  # of ZeRO 3
        self.parameters = sum(sizes)
        self.sampling = attach(settings, self.deepspeed, blend, train_samples, warm_start)
        self.sampling.detach()  # the loop writes the ES state
        self.engine, self.loss_source = self.sampling.engine, self.sampling.loss_source
        self.scheduler: Any = build_scheduler(settings, self.deepspeed.optimizer, self.engine.plan.schedule.iterations)
        self.passes = DeepSpeedPasses(settings, self.sampling)

    @override
    def iterate(self) -> Iteration:
        rate = learning_rate(self.deepspeed.optimizer)
        loss = self.sampling.step()
        succeeded = bool(self.deepspeed.was_step_applied())
        if succeeded:
            self.scheduler.step(1)
        norm = self.deepspeed.get_global_grad_norm()
        record, engine = self.engine.last, self.engine
        assert record is not None
        count = len(record.chosen) // (engine.micro_batch * engine.grid.dp_size)
        known = float("nan") if norm is None else float(norm)
        return Iteration(loss * count, count, succeeded, known, rate, 0.0)

    @override
    def evaluate(self, domains: Mapping[str, Rows]) -> dict[str, float]:
        return evaluate(self.passes, domains)

    @override
    def calibrate(self) -> Layout:
        return calibrate(self.passes, lambda: None)

    @override
    def save(self, directory: Path) -> None:
        state = {"scheduler": self.scheduler.state_dict(), "iteration": self.engine.iteration}
        self.deepspeed.save_checkpoint(str(directory), tag=TAG, client_state=state, save_latest=False)
        grid = self.engine.grid
        with agreed(grid, f"save random states in {directory}"):
            torch.save(random_state(), directory / random_file(grid))
            if grid.world_rank == 0:
                disk.write_file(directory / MARKS["deepspeed"], [json.dumps(layout_of(self.settings, grid)).encode()])

    @override
    def load(self, directory: Path) -> None:
        """Take a checkpoint back; under another data-parallel size through DeepSpeed's universal form.

        Raises:
            CheckpointError: damaged, of another model or ZeRO stage, or of a layout that DeepSpeed cannot leave.
        """
        grid = self.engine.grid
        saved: dict[str, int] = {}
        with agreed(grid, f"load {directory}"):
            saved = json.loads((directory / MARKS["deepspeed"]).read_text(encoding="utf-8"))
            check_layout(saved, layout_of(self.settings, grid), directory)
        check_folder(directory, grid)
        with data_only(directory):
            if saved["data"] == grid.dp_size or saved["zero_stage"] == 0:
                found = self.deepspeed.load_checkpoint(str(directory), tag=TAG)
            else:
                found = self._load_universal(directory)
        if found[0] is None:
            raise CheckpointError(f"`{directory}` holds no DeepSpeed checkpoint `{TAG}`. Use an older one.")
        self.scheduler.num_steps = 0  # loading adds the checkpoint's steps
        self.scheduler.load_state_dict(found[1]["scheduler"])
        take_settings(self.settings, self.deepspeed.optimizer, self.scheduler)
        if saved["data"] == grid.dp_size:
            restore_random_state(torch.load(directory / random_file(grid), weights_only=True))

    def _load_universal(self, directory: Path) -> Any:
        """Load under another data-parallel size, by way of DeepSpeed's universal checkpoint."""
        folder = self.settings.run.directory / "universal"
        grid = self.engine.grid
        with agreed(grid, f"convert {directory} to a universal checkpoint"):
            if grid.world_rank == 0:
                disk.remove_tree(folder)
                convert_to_universal(directory / TAG, folder / TAG)
        config = self.deepspeed._config
        config.load_universal_checkpoint = True
        try:
            with deepspeed_common.universal_mended(self.deepspeed):
                return self.deepspeed.load_checkpoint(str(folder), tag=TAG)
        finally:
            config.load_universal_checkpoint = False
            grid.barrier()
            if grid.world_rank == 0:
                disk.remove_tree(folder)


def build_deepspeed(settings: PretrainSettings, vocab_size: int) -> Any:
    """Build the model and DeepSpeed's engine around it; collective, after `initialize`."""
    import deepspeed

    from es_megatron.trainer.deepspeed_model import build_pipeline, build_whole

    pipeline = settings.parallel.pipeline > 1
    world_size = dist.get_world_size()
    network: Any = build_pipeline(settings, vocab_size, world_size) if pipeline else build_whole(settings, vocab_size)
    leave_out_empty_states(network)
    training = settings.training
    optimizer = torch.optim.AdamW(
        parameter_groups(network, training.weight_decay),
        lr=training.lr,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
    )
    tensor_unit = TensorParallelUnit() if settings.parallel.tensor > 1 and not pipeline else None
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, config=engine_settings(settings), mpu=tensor_unit, dist_init_required=False
    )
    return engine


def leave_out_empty_states(network: torch.nn.Module) -> None:
    """Keep Megatron-Core's `_extra_state`, which is None here, out of checkpoints: the converter trips over it."""
    suffix = "_extra_state"
    names = [name for name in network.state_dict() if name.endswith(suffix)]

    def leave_out(_: torch.nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in names:
            if state.get(prefix + name, 0) is None:
                del state[prefix + name]

    def put_back(_: torch.nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in names:
            state.setdefault(prefix + name, None)

    network.register_state_dict_post_hook(leave_out)
    network.register_load_state_dict_pre_hook(put_back)


def attach(
    settings: PretrainSettings, engine: Any, blend: LoadedBlend, train_samples: int, warm_start: WarmStart
) -> Any:
    """Attach to the engine, whichever it is."""
    options: dict[str, Any] = {
        "train_samples": train_samples,
        "workers": settings.data.num_workers,
        "prefetch": settings.data.prefetch,
        "warm_start": warm_start,
    }
    return attach_rows(settings, engine, blend.manifest, blend.rows, options)


def attach_rows(
    settings: PretrainSettings, engine: Any, manifest: Manifest, rows: Rows, options: Mapping[str, Any]
) -> Any:
    """The same for any rows; `options` are further arguments of `attach` in the framework's module."""
    if settings.parallel.pipeline > 1:
        from es_megatron.frameworks import deepspeed_pipe
        from es_megatron.trainer.deepspeed_model import token_losses

        return deepspeed_pipe.attach(engine, manifest, rows, token_losses=token_losses, **options)
    from es_megatron.frameworks import deepspeed_engine

    return deepspeed_engine.attach(engine, manifest, rows, **options)


def parameter_groups(network: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, norms and biases without; as Megatron-Core's optimizer has it."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": weight_decay, "wd_mult": 1.0},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0, "wd_mult": 0.0},
    ]
    return [group for group in groups if group["params"]]


def engine_settings(settings: PretrainSettings) -> dict[str, Any]:
    """DeepSpeed's JSON for a run: the user's file, if there is one, and what the run's own settings say.

    Raises:
        ConfigError: the file cannot be read, or says otherwise.
    """
    training = settings.training
    own: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_clipping": training.clip_grad,
        "zero_optimization": {"stage": settings.deepspeed.zero_stage},
        "bf16": {"enabled": training.precision == "bf16"},
        SECTION: settings.evolved_sampling.to_mapping(),
    }
    if settings.parallel.pipeline > 1:
        own["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}
    given: dict[str, Any] = {"steps_per_print": NEVER}
    path = settings.deepspeed.config
    if path is not None:
        try:
            given |= json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"`deepspeed.config` must be a JSON file, but `{path}` is not: {error}.") from error
    given.pop("gradient_accumulation_steps", None)  # follows from the batch sizes
    block = block_in(given, str(path))
    given.pop(SECTION, None)
    if block is not None:
        said = EvolvedSamplingConfig.from_mapping(block, f'{path}: "{SECTION}"')
        if said.order.skip is None:  # which the folder of the run may have added
            said = said.replaced({"order.skip": settings.evolved_sampling.order.skip})
        if said.filled_in() != settings.evolved_sampling.filled_in():
            raise ConfigError(
                f'`"{SECTION}"` in `{path}` must agree with the section of that name in the run\'s '
                "settings, but does not. Leave it out there, or make them say the same."
            )
    return merge(given, own, str(path))


def merge(given: Mapping[str, Any], own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Put settings together; where both have one they must agree, but for "auto".

    Raises:
        ConfigError: they do not.
    """
    merged = dict(given)
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value, f"{where}: {key}")  # pyright: ignore[reportUnknownArgumentType]
        elif key in merged and merged[key] not in (value, "auto"):
            raise ConfigError(
                f"`{key}` in `{where}` must agree with the run's settings, {value!r}, but is {merged[key]!r} instead. "
                'Leave it out there, or write "auto".'
            )
        else:
            merged[key] = value
    return merged


def layout_of(settings: PretrainSettings, grid: RankGrid) -> dict[str, int]:
    """What a checkpoint's files depend on."""
    parallel = settings.parallel
    return {
        "zero_stage": settings.deepspeed.zero_stage,
        "data": grid.dp_size,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
    }


def check_layout(saved: Mapping[str, int], now: Mapping[str, int], directory: Path) -> None:
    """Refuse a layout that a checkpoint cannot be loaded under.

    Raises:
        CheckpointError: names what differs.
    """
    for name in ("zero_stage", "tensor", "pipeline"):
        if saved[name] != now[name]:
            raise CheckpointError(
                f"Checkpoint `{directory}` is of a run with {name} {saved[name]}, but this run has {now[name]}. Only "
                "the data-parallel size may change; set the others as they were."
            )


def random_file(grid: RankGrid) -> str:
    """Name of the file of a rank's random states."""
    return f"random-{grid.world_rank:05d}.pt"
