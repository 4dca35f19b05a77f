"""Megatron-Bridge's own training loop on a CPU: `python tests/bridge_run.py BRIDGE BOOKS CODE OUTPUT ITERATIONS`.

What a CPU has not (modelopt, the Hugging Face bridges, resiliency extensions) is a stand-in; initialisation, data
loaders, optimizer, callbacks, training loop and checkpoints are Bridge's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from es_megatron.testing import megatron_lm_cpu

STAND_INS = ("megatron.bridge.models", "megatron.bridge.peft", "modelopt", "nvidia_resiliency_ext", "datasets")
MORE = ("omegaconf", "transformers", "multistorageclient", "wandb", "megatron.energon")
"""Stand-ins where they are not installed."""
TARGETS = ("training.train", "training.setup", "training.checkpointing", "training.callbacks", "data.loaders")


class StandIn(types.ModuleType):
    """A module that has whatever is asked for: classes by a capital letter, else functions that do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = type(name, (), {}) if name[0].isupper() else lambda *args, **kwargs: None
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        ours = any(name == each or name.startswith(f"{each}.") for each in self.names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> Any:
        module: Any = StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing is in it."""


def open_bridge(folder: Path) -> None:
    """Make the modules of a Bridge importable that the loop needs, without those of its models."""
    for name in ("gpt", "common.embeddings.rope_utils"):
        importlib.import_module(f"megatron.core.models.{name}")
    missing = tuple(name for name in MORE if find_spec(name) is None)
    sys.meta_path.insert(0, Finder((*STAND_INS, *missing)))
    package: Any = types.ModuleType("megatron.bridge")
    package.__path__ = [str(folder / "megatron" / "bridge")]
    sys.modules["megatron.bridge"] = package
    for name in TARGETS:
        importlib.import_module(f"megatron.bridge.{name}")


def states_of_targets() -> list[str]:
    """How each patch stands, as `target state`."""
    from es_megatron.patching import check, read_patches

    return [
        f"{each.patch.target} {each.state} {each.detail}".strip() for each in check(read_patches("megatron-bridge"))
    ]


def settings_of(data: list[str], output: Path, iterations: int) -> Any:
    """Bridge's configuration of a tiny GPT."""
    from megatron.bridge.training import config as kinds
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    @dataclass
    class Model(TransformerConfig):
        seq_length: int = 32
        vocab_size: int = 128
        should_pad_vocab: bool = False
        make_vocab_size_divisible_by: int = 128
        share_embeddings_and_output_weights: bool = True

    model = Model(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        finalize_model_grads_func=importlib.import_module("megatron.core.distributed").finalize_model_grads,
    )
    weights, prefixes = [float(each) for each in data[::2]], data[1::2]
    unevaluated = {"eval_iters": 0, "eval_interval": 1000}
    apart: Any = getattr(kinds, "ValidationConfig", None)  # from 0.4 on
    config = kinds.ConfigContainer(
        train=kinds.TrainingConfig(
            train_iters=iterations, global_batch_size=16, micro_batch_size=2, **({} if apart else unevaluated)
        ),
        **({"validation": apart(**unevaluated)} if apart else {}),
        model=model,
        optimizer=kinds.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-4, clip_grad=1.0),
        ddp=DistributedDataParallelConfig(),
        scheduler=kinds.SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_iters=2,
            lr_decay_iters=iterations,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
        ),
        dataset=kinds.GPTDatasetConfig(
            random_seed=1,
            seq_length=32,
            blend=(prefixes, weights),
            split="90,5,5",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            num_workers=0,
            dataloader_type="single",
            path_to_cache=str(output / "cache"),
        ),
        logger=kinds.LoggerConfig(log_interval=1, tensorboard_dir=None),
        tokenizer=kinds.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=127),
        checkpoint=kinds.CheckpointConfig(save=None, save_interval=None),
        dist=kinds.DistributedInitConfig(distributed_backend="gloo", use_gloo_process_groups=True),
    )
    config.data_parallel_size = 1
    config.optimizer.finalize()
    config._calculate_scheduler_steps()
    return config


def forward_step(data_iterator: Any, model: Any) -> Any:
    """As Bridge's `gpt_step`, without what is for GPUs."""
    from megatron.bridge.training.losses import masked_next_token_loss

    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, functools.partial(masked_next_token_loss, batch["loss_mask"], check_for_nan_in_loss=False)


def build_model(config: Any) -> list[Any]:
    """A GPT of Megatron-Core in its data-parallel wrapper."""
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    torch.manual_seed(1)
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    model = GPTModel(config.model, spec, vocab_size=128, max_sequence_length=32)
    return [DistributedDataParallel(config.model, config.ddp, model)]


def datasets_of(samples: list[int], config: Any, tokenizer: Any = None, pg_collection: Any = None) -> Any:
    """Megatron-Core's datasets, as Bridge's own provider builds them."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    return BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()


def train(folder: Path, data: list[str], output: Path, iterations: int) -> None:
    """Train to the planned end."""
    open_bridge(folder)
    from megatron.bridge.data import loaders
    from megatron.bridge.training import callbacks, checkpointing, initialize, optim, setup, state
    from megatron.bridge.training import train as training
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from es_megatron import EvolvedSamplingConfig
    from es_megatron.bridge import evolve

    print("\n".join(f"target: {each}" for each in states_of_targets()))
    chosen = EvolvedSamplingConfig.from_mapping(
        {"preset": "paper", "selection": {"keep_ratio": 0.25}, "pruning": {"ratio": 0.25}, "order": {"mask_lag": 2}}
    )
    callback = evolve(chosen, output / "audit.jsonl")
    config = settings_of(data, output, iterations)
    run = state.GlobalState()
    run.cfg = config
    run.train_state.do_train = True
    initialize.compile_helpers = lambda: None  # the wheel of Megatron-Core ships them compiled
    setup.initialize_megatron(cfg=config)
    model = build_model(config)
    optimizer, scheduler = optim.setup_optimizer(
        optimizer_config=config.optimizer, scheduler_config=config.scheduler, model=model, use_gloo_process_groups=True
    )
    tokenizer: Any = types.SimpleNamespace(eod=126, pad=-1, vocab_size=127, unique_identifiers={"class": "none"})
    config.dataset.tokenizer = tokenizer
    config.dataset.finalize()
    group = parallel_state.get_data_parallel_group()
    iterators = loaders.setup_data_iterators(
        cfg=config,
        train_state=run.train_state,
        model_length=1,
        train_valid_test_datasets_provider=datasets_of,
        dp_group=group,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    manager = callbacks.CallbackManager()
    manager.add(callback)
    made: Any = getattr(checkpointing, "create_checkpoint_manager", lambda _: {})  # before 0.4 a context is handed on
    saving = made(config.checkpoint)
    more = {"callback_manager": manager}
    training.train(forward_step, model, optimizer, scheduler, *iterators[:2], run, saving, groups, **more)
    print(f"trained: {run.train_state.step} iterations, rate {optimizer.param_groups[0]['lr']:.6g}")


if __name__ == "__main__":
    megatron_lm_cpu.install()
    bridge, books, code, target = map(Path, sys.argv[1:5])
    train(bridge, ["0.6", str(books), "0.4", str(code)], target, int(sys.argv[5]))
