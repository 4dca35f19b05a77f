"""Initial weights that depend on the seed and a weight's name alone, never on the parallel layout.

Each rank draws the whole matrix from a generator of its own name, with layers counted over all stages, and keeps its
part.
"""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from es_megatron.trainer.model_settings import ModelSettings

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
GATED = "mlp.linear_fc1.weight"
"""With SwiGLU gate and up projection in one matrix; each tensor-parallel rank has a share of both."""

RESIDUAL_WRITERS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def leave_uninitialized(weight: torch.Tensor) -> torch.Tensor:
    """Stand in for Megatron's initializers, whose draws depend on what the rank built before."""
    return weight


@torch.no_grad()
def set_initial_weights(model: GPTModel, settings: ModelSettings) -> None:
    """Draw every matrix of a chunk from N(0, std^2), in place; norms and biases keep their ones and zeros.

    Args:
        model: a chunk without wrappers.
        settings: give the standard deviation, which is divided by sqrt(2 layers) for weights that write to the residual
            stream (GPT-2), and the seed.
    """
    for name, weight in model.named_parameters():
        set_initial_weight(global_name(model, name), weight, settings)


@torch.no_grad()
def set_initial_weight(key: str, weight: torch.Tensor, settings: ModelSettings) -> None:
    """Draw this rank's part of one matrix, in place.

    Args:
        key: the weight's name in a model on one rank.
        weight: this rank's part of it; a vector keeps its values.
        settings: see `set_initial_weights`.
    """
    if weight.dim() < 2:
        return
    std = settings.init_std
    if key.endswith(RESIDUAL_WRITERS):
        std /= math.sqrt(2 * settings.num_layers)
    whole = draw_normal(settings.init_seed, key, whole_shape(weight)) * np.float32(std)
    blocks = 2 if settings.swiglu and key.endswith(GATED) else 1
    weight.copy_(own_part(torch.from_numpy(whole), weight, blocks))


def global_name(model: GPTModel, name: str) -> str:
    """Give a weight's name with its layer's number over all stages, and a tied output layer the embedding's."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"

    def renumber(match: re.Match[str]) -> str:
        layer = model.decoder.layers[int(match.group(1))]
        return f"decoder.layers.{int(layer.layer_number) - 1}."  # pyright: ignore[reportArgumentType]

    return LAYER.sub(renumber, name)


def draw_normal(seed: int, key: str, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Draw standard normal numbers that depend on the arguments alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))
    return generator.standard_normal(shape, dtype=np.float32)


def whole_shape(weight: torch.Tensor) -> tuple[int, ...]:
    """Shape of a weight before tensor parallelism split it."""
    shape = list(weight.shape)
    if is_split(weight):
        shape[partition_axis(weight)] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def own_part(whole: torch.Tensor, weight: torch.Tensor, blocks: int) -> torch.Tensor:
    """Take this tensor-parallel rank's part: an equal share of each of so many blocks along the axis that is split."""
    if not is_split(weight):
        return whole
    axis = partition_axis(weight)
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return torch.cat([block.chunk(size, axis)[rank] for block in whole.chunk(blocks, axis)], axis)


def is_split(weight: torch.Tensor) -> bool:
    """Whether tensor-parallel ranks hold parts of a weight."""
    return bool(getattr(weight, "tensor_model_parallel", False))


def partition_axis(weight: torch.Tensor) -> int:
    """Axis along which a weight is split."""
    return int(weight.partition_dim)  # pyright: ignore[reportAttributeAccessIssue]
