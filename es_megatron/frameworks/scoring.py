"""What scoring passes of every framework share: losses of sequences, and leaving no trace. torch only."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from es_megatron.algorithm.evolution import NO_LOSS
from es_megatron.rank_grid import RankGrid
from es_megatron.scoring import Scorer

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

MAX_LOGITS = "current_max_attn_logits"

RNG_TRACKERS = {
    "megatron.core.tensor_parallel.random": "get_cuda_rng_tracker",
    "deepspeed.runtime.activation_checkpointing.checkpointing": "get_cuda_rng_tracker",
}
"""Modules that keep random states of their own, if something has imported them, and what gives their tracker."""


def shortened(batch: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The first tokens of a micro-batch: of tensors `[b, T]`, and of attention masks `[b, 1, T, T]`."""
    return {
        name: tensor[..., :tokens, :tokens] if tensor.dim() == 4 else tensor[:, :tokens]
        for name, tensor in batch.items()
    }


def scored_part(batches: list[dict[str, Tensor]], scorer: Scorer) -> list[dict[str, Tensor]]:
    """What a scoring pass reads of micro-batches: all, or the first tokens of those with `labels`."""
    if not scorer.shortens:
        return batches
    return [shortened(batch, scorer.tokens(batch["labels"].shape[1])) for batch in batches]


def by_sequence(output: Tensor, sequences: int) -> Tensor:
    """Token losses by sequence, `[b, T]`, also where rows were packed into one, `[1, b * T]`."""
    return output.reshape(sequences, -1) if output.dim() == 2 and output.shape[0] == 1 else output


def sequence_sums(output: Tensor, mask: Tensor, tokens: int | None = None) -> Tensor:
    """Sum of token losses of each sequence under its mask, and what that counts, detached.

    Args:
        output: token losses `[b, T]`; T are those of this rank, where ranks share a sequence.
        mask: `[b, T]` or of as many elements.
        tokens: only the first ones count; None: all.

    Returns:
        float32 `[2, b]`.
    """
    loss_BT = output.detach().float()
    mask_BT = mask.detach().reshape(loss_BT.shape).float()
    loss_BT, mask_BT = loss_BT[:, :tokens], mask_BT[:, :tokens]
    return torch.stack([torch.where(mask_BT > 0, loss_BT * mask_BT, 0.0).sum(dim=1), mask_BT.sum(dim=1)])


def sequence_losses(output: Tensor, mask: Tensor, tokens: int | None = None) -> Tensor:
    """Mean token loss of each sequence under its mask, detached; `NO_LOSS` where no token counts.

    Args:
        output: token losses `[b, T]`, of whole sequences.
        mask: `[b, T]` or of as many elements.
        tokens: only the first ones count; None: all.

    Returns:
        float32 `[b]`.
    """
    loss_B, count_B = sequence_sums(output, mask, tokens)
    mean_B = loss_B / count_B
    mean_B = torch.where(mean_B == NO_LOSS, torch.nan, mean_B)  # of a loss function of one's own that has gone wrong
    return torch.where(count_B == 0, NO_LOSS, mean_B)


def padded(ids: Int64, share: int, multiple: int) -> Int64:
    """Ids that make whole micro-batches, int64[k * multiple] of at least `share`; the first ones are repeated."""
    length = -(-share // multiple) * multiple
    return np.resize(ids, length) if len(ids) else np.zeros(length, np.int64)


def join(found: list[Tensor]) -> Float32 | None:
    """Losses of all micro-batches as one CPU array, along the last axis; None where this stage has none."""
    return torch.cat(found, dim=-1).float().cpu().numpy() if found else None


def means_of(found: list[Tensor], grid: RankGrid) -> Float32 | None:
    """Mean losses from sums that each rank has over its tokens; collective over the ranks that share a sequence.

    Args:
        found: of each micro-batch, float32 `[2, b]` of `sequence_sums`, or `[3, b]` with `norm_sums` under them.
        grid: this rank's place.

    Returns:
        float32[n], `NO_LOSS` where no token counts; float32[2, n] with the bounds of gradient norms; None on stages
        without losses.
    """
    sums = join(found)
    if sums is None:
        return None
    loss, count, *squares = grid.sum_over_cp(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(loss / count == NO_LOSS, np.float32(np.nan), loss / count)
        mean = np.where(count == 0, np.float32(NO_LOSS), mean)
        return np.stack([mean, np.sqrt(squares[0]) / count]) if squares else mean


@contextmanager
def traceless(chunks: list[torch.nn.Module]) -> Generator[None]:
    """Leave no trace of what runs inside: modes, random states, buffers (MoE counters among them), timers, maxima."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    # straight in the modules: this runs for every scoring micro-batch, and their attributes are slow to look up
    training = [module for module in modules if module.training]
    # by the class: Megatron's data-parallel wrapper has an attribute `buffers` of its own
    found = {id(each): each for module in modules for each in torch.nn.Module.buffers(module, recurse=False)}
    buffers = [(buffer, buffer.clone()) for buffer in found.values()]
    configs = [config for chunk in chunks if (config := getattr(chunk, "config", None)) is not None]
    timers = [(config, config.timers) for config in configs if hasattr(config, "timers")]
    # of attention in Transformer Engine, over every forward pass of an iteration; `qk_clip` changes weights by them
    logits = [(module, module.__dict__[MAX_LOGITS]) for module in modules if MAX_LOGITS in module.__dict__]
    trackers = [(tracker, tracker.get_states()) for tracker in rng_trackers()]
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    for module in training:
        if type(module).train is not torch.nn.Module.train:
            module.eval()
    _set_training(training, to=False)
    for config, _ in timers:
        config.timers = None
    try:
        yield
    finally:
        _set_training(training, to=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for config, before in timers:
            config.timers = before
        for module, before in logits:
            setattr(module, MAX_LOGITS, before)
        for tracker, states in trackers:
            tracker.set_states(states)
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)


def _set_training(modules: list[torch.nn.Module], *, to: bool) -> None:
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            module.training = to
        else:
            object.__setattr__(module, "training", to)  # a module's own way looks for parameters first


def rng_trackers() -> list[Any]:
    """Trackers of random states of the frameworks that are loaded."""
    loaded = [(sys.modules[name], function) for name, function in RNG_TRACKERS.items() if name in sys.modules]
    return [getattr(module, function)() for module, function in loaded]
