"""A tiny GPT of the reference trainer on random tokens, for the tests that train one."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from es_megatron.trainer.model import build_model, data_parallel_size, forward_step, initialize, reads_data
from es_megatron.trainer.model_settings import ModelSettings, ParallelSettings
from es_megatron.trainer.optimizer import build_optimizer, build_scheduler, step, zero_gradients
from es_megatron.trainer.settings import DataSettings, PretrainSettings, TrainingSettings

VOCABULARY = 60
META_BATCH = 8
STEPS = 3
PLAIN = ParallelSettings()
OVERLAPPING = ParallelSettings(
    distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=5000
)
"""Buckets small enough that the tiny model has several, with padding between them."""

Layout = namedtuple("Layout", "name ranks parallel")
LAYOUTS = [
    Layout("dp2", 2, ParallelSettings()),
    Layout("tp2", 2, ParallelSettings(tensor=2)),
    Layout("pp2", 2, ParallelSettings(pipeline=2)),
    Layout("vpp2", 2, ParallelSettings(pipeline=2, virtual_pipeline=2)),
    Layout("dp2-sharded", 2, ParallelSettings(distributed_optimizer=True)),
    Layout("dp2-overlapping", 2, OVERLAPPING),
]
LARGE_LAYOUTS = [
    Layout("tp2-pp2", 4, ParallelSettings(tensor=2, pipeline=2)),
    Layout("pp2-dp2-overlapping", 4, replace(OVERLAPPING, pipeline=2)),
    Layout("vpp2-dp2-overlapping", 4, replace(OVERLAPPING, pipeline=2, virtual_pipeline=2)),
    Layout("pp4", 4, ParallelSettings(pipeline=4)),
]


def settings_of(parallel=PLAIN, *, precision="fp32", **model):
    tiny = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
    return PretrainSettings(
        model=ModelSettings(**{**tiny, **model}),
        parallel=parallel,
        data=DataSettings(blend=Path("unused.yaml")),
        training=TrainingSettings(
            train_samples=100, global_batch_size=META_BATCH, micro_batch_size=1, lr=1e-2, precision=precision
        ),
    )


GPT2 = {
    "swiglu": False,
    "bias": True,
    "normalization": "LayerNorm",
    "position_embedding": "learned",
    "tie_embeddings": False,
}


def batches_of(iteration, size, length, first=0, last=META_BATCH):
    """Micro-batches of rows first to last of a random meta-batch; a third of the tokens do not count."""
    generator = torch.Generator().manual_seed(iteration)
    tokens = torch.randint(0, VOCABULARY, (META_BATCH, length + 1), generator=generator)
    mask = (torch.rand((META_BATCH, length), generator=generator) < 2 / 3).float()
    positions = torch.arange(length).expand(META_BATCH, -1)
    return [
        {
            "tokens": tokens[row : row + size, :-1],
            "labels": tokens[row : row + size, 1:],
            "loss_mask": mask[row : row + size],
            "position_ids": positions[row : row + size],
        }
        for row in range(first, last, size)
    ]


@dataclass
class Run:
    """A run in this process; its group and layout are of the rank."""

    settings: PretrainSettings
    history: list = field(default_factory=list)

    def __post_init__(self):
        initialize(self.settings)
        self.chunks = build_model(self.settings, VOCABULARY)
        self.optimizer = build_optimizer(self.settings, self.chunks)
        self.scheduler = build_scheduler(self.settings, self.optimizer, 10)

    def own_batches(self, iteration, size=1):
        share = META_BATCH // data_parallel_size()
        first = share * parallel_state.get_data_parallel_rank()
        return batches_of(iteration, size, self.settings.model.seq_length, first, first + share)

    def pass_over(self, batches, **changes):
        feeds = [iter(batches) if reads_data(chunk) else None for chunk in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=feeds if len(feeds) > 1 else feeds[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=self.settings.model.seq_length,
            micro_batch_size=len(batches[0]["tokens"]),
            **{"forward_only": False, **changes},
        )

    def train(self, start, stop, before=lambda run, iteration: None):
        for iteration in range(start, stop):
            self.scheduler.step(1)
            zero_gradients(self.chunks, self.optimizer)
            before(self, iteration)
            found = self.pass_over(self.own_batches(iteration))
            total = torch.stack([each["lm loss"] for each in found]).sum() if found else torch.zeros(())
            dist.all_reduce(total)  # tensor-parallel ranks of the last stage all have it
            succeeded, norm = step(self.optimizer)
            self.history.append((total.item() / META_BATCH / self.settings.parallel.tensor, norm, succeeded))
        return self.history


def train(settings, start=0, stop=STEPS, before=lambda run, iteration: None):
    return Run(settings).train(start, stop, before)
