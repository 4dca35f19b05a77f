"""A training loop of a user's own, a few lines around Megatron-Core, with or without Evolved Sampling attached.

It notes every micro-batch that gets a backward pass, so that a second loop can train on exactly those, plainly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any

import numpy as np
import torch
from torch import Tensor

from es_megatron.data.manifest import Component, Manifest
from tests.context_helper import gather_attention
from tests.small_run import SIZES, VOCABULARY, T, main_gradients

from megatron.core.models.gpt import gpt_layer_specs  # isort: skip - the CPU layer stands since small_run was imported
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.transformer.moe import moe_utils  # isort: skip

from es_megatron.frameworks.megatron_core import MegatronCoreSampling, attach
from es_megatron.trainer import model as model_module
from es_megatron.trainer.model import build_model, forward_step, reads_data
from es_megatron.trainer.optimizer import build_optimizer, step, zero_gradients
from es_megatron.trainer.settings import PretrainSettings

Batch = dict[str, Tensor]
MicroBatches = list[Batch]
MANIFEST = Manifest(tuple(Component(name, name, size, float(size), name) for name, size in SIZES.items()), T)
UNMASKED, RAGGED = "unmasked", "ragged"


@dataclass(frozen=True)
class RandomRows:
    """A blend in memory: random tokens, and masks that count 1 to T tokens, or none for the rows in `empty`."""

    masks: str = UNMASKED
    empty: tuple[int, ...] = ()

    def __getitem__(self, sample_id: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 + sample_id)
        tokens = torch.randint(0, VOCABULARY // (1 + sample_id % 3), (T + 1,), generator=generator)
        counted = int(torch.randint(1, T + 1, (1,), generator=generator)) if self.masks == RAGGED else T
        mask = (torch.arange(T) < (0 if sample_id in self.empty else counted)).float()
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask, "position_ids": torch.arange(T)}

    def find(self, tokens_T: Tensor, labels_T: Tensor) -> int:
        """Id of the row with these tokens."""
        return self._index[bytes(tokens_T.numpy().tobytes() + labels_T.numpy().tobytes())]

    @functools.cached_property
    def _index(self) -> dict[bytes, int]:
        rows = [self[sample_id] for sample_id in range(MANIFEST.total)]
        index = {row["tokens"].numpy().tobytes() + row["labels"].numpy().tobytes(): n for n, row in enumerate(rows)}
        assert len(index) == MANIFEST.total, "every row must be told from the others by its tokens"
        return index


def per_token_loss(mask_BT: Tensor | None, losses_BT: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum and count of token losses, which `calculate_per_token_loss` divides by the count of the whole batch."""
    assert mask_BT is not None
    mask_N = mask_BT.reshape(-1).float()
    total = torch.sum(losses_BT.reshape(-1).float() * mask_N)
    return total, mask_N.sum().to(torch.int), {"lm loss": total.detach().clone()}


def change_model(**changes: Any) -> None:
    """Change Megatron's `TransformerConfig` of the models this process builds from now on (in a forked rank only)."""
    original = model_module.transformer_config
    swap(model_module, "transformer_config", lambda settings: replaced(original(settings), **changes))


def swap(module: Any, name: str, stand_in: Any) -> None:
    """Replace a function of a module, which must exist, until this process ends."""
    assert callable(getattr(module, name))
    setattr(module, name, stand_in)


def build_experts() -> None:
    """Have the models this process builds from now on be mixtures of experts with every counter that there is."""
    moe_utils.te_general_gemm = None  # 0.16.1 looks for it also where Transformer Engine is not installed
    change_model(
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_z_loss_coeff=1e-3,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=1e-2,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        moe_permute_fusion=False,
        add_bias_linear=False,
    )
    spec = gpt_layer_specs.get_gpt_layer_local_spec
    swap(model_module, "layer_spec", lambda settings: spec(num_experts=4, normalization=settings.model.normalization))


@dataclass
class Step:
    """What one iteration did on this rank."""

    seen: MicroBatches
    """Micro-batches that got a backward pass, in order."""
    gradients: Tensor
    """What the optimizer was given."""
    chosen: list[int] = field(default_factory=list)
    """Ids that the whole run trained on, from Evolved Sampling's own record."""
    weights: list[float] | None = None
    """What the losses of the rows seen were multiplied by."""


class Loop:
    """Model and optimizer of this rank; call `initialize(settings)` before."""

    def __init__(
        self,
        settings: PretrainSettings,
        rows: RandomRows | None,
        *,
        per_token: bool = False,
        gathering: bool = False,
        **attached: Any,
    ) -> None:
        self.settings, self.per_token = settings, per_token
        if per_token:
            change_model(calculate_per_token_loss=True)
        gather_attention(settings, packed=gathering)
        self.chunks = build_model(settings, VOCABULARY)
        assert self.chunks[0].config.calculate_per_token_loss == per_token
        self.optimizer = build_optimizer(settings, self.chunks)
        self.sampling: MegatronCoreSampling | None = rows and attach(
            settings.evolved_sampling,
            MANIFEST,
            rows,
            model_config=self.chunks[0].config,
            global_batch_size=settings.training.global_batch_size,
            micro_batch_size=settings.training.micro_batch_size,
            train_samples=settings.training.train_samples or 0,
            **attached,
        )
        self.seen: MicroBatches = []

    def forward_step(self, iterator: Iterator[Batch] | None, chunk: Any) -> Any:
        """The trainer's forward step, taking notes of what is trained on."""
        if not reads_data(chunk):
            return forward_step(iterator, chunk)
        assert iterator is not None
        batch = next(iterator)
        if torch.is_grad_enabled():
            self.seen.append(batch)
        output, loss_func = forward_step(iter([batch]), chunk)
        return output, functools.partial(per_token_loss, *loss_func.args) if self.per_token else loss_func

    def call(self, micro_batches: int) -> dict[str, Any]:
        """Keywords of a training call of the schedule, but for the data."""
        return {
            "forward_step_func": self.forward_step,
            "model": self.chunks,
            "num_microbatches": micro_batches,
            "seq_length": T,
            "micro_batch_size": self.settings.training.micro_batch_size,
            "forward_only": False,
        }

    def run_passes(self) -> Any:
        """Score, choose, forward and backward, through the wrapped schedule; returns what the schedule returned."""
        assert self.sampling is not None
        engine, size = self.sampling.engine, self.settings.training.micro_batch_size
        own = engine.plan.schedule.ramp.size(engine.iteration) // (size * engine.grid.dp_size)
        none = None if len(self.chunks) == 1 else [None for _ in self.chunks]
        return self.sampling.wrap(get_forward_backward_func())(**self.call(own), data_iterator=none)

    def evolve(self, *, runs: int = 1, spoil: Callable[[Loop], None] | None = None) -> Step:
        """One iteration with Evolved Sampling.

        Args:
            runs: how often the passes are run, as upstream's re-run machinery does; the last one counts.
            spoil: called between the backward pass and the optimizer step.
        """
        assert self.sampling is not None
        for _ in range(runs):
            self.seen = []
            zero_gradients(self.chunks, self.optimizer)
            self.run_passes()
        gradients = main_gradients(self.chunks)
        if spoil is not None:
            spoil(self)
        self.sampling.finish(step(self.optimizer)[0])
        record = self.sampling.engine.last
        assert record is not None
        return Step(self.seen, gradients, record.chosen.tolist())

    def gradient(self, name: str) -> list[float]:
        """What the optimizer is given for a parameter of the first chunk."""
        parameter: Any = dict(self.chunks[0].named_parameters())[name]
        return parameter.main_grad.flatten().tolist()

    def train_on(self, batches: Sequence[Batch], weights: Sequence[float] | None = None) -> Step:
        """One plain iteration on given micro-batches, with upstream's schedule as it is.

        Args:
            batches: the same on every stage that reads data.
            weights: what the loss of each row is multiplied by, one for each row of all batches.
        """
        self.seen = []
        zero_gradients(self.chunks, self.optimizer)
        iterators = [iter(batches) for _ in self.chunks]
        call = self.call(len(batches))
        if weights is not None:
            call["forward_step_func"] = self.weighted(np.reshape(weights, (len(batches), -1)))
        get_forward_backward_func()(**call, data_iterator=iterators if len(iterators) > 1 else iterators[0])
        gradients = main_gradients(self.chunks)
        step(self.optimizer)
        return Step(self.seen, gradients)

    def weighted(self, weights: Any) -> Callable[..., Any]:
        """A forward step with a loss function that weighs the rows of the n-th micro-batch by `weights[n]`."""
        remaining = iter(torch.from_numpy(weights).float())

        def weighted_step(*args: Any) -> Any:
            output, loss_func = self.forward_step(*args)

            def loss(losses_BT: Tensor) -> Any:
                return loss_func(losses_BT * next(remaining)[:, None])

            return output, loss

        return weighted_step
