"""The reference GPT for DeepSpeed: whole for its engine, as a list of layers for its pipeline.

Shape suffixes: T tokens, B sequences, H hidden size, V share of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody gives it
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from typing_extensions import override

from es_megatron.trainer.initial_weights import leave_uninitialized, set_initial_weight, set_initial_weights
from es_megatron.trainer.model import build_chunk, layer_spec, padded_vocab_size, transformer_config
from es_megatron.trainer.model_settings import ModelSettings
from es_megatron.trainer.settings import PretrainSettings

TIED = "embedding"
WORDS = "embedding.word_embeddings.weight"


def build_whole(settings: PretrainSettings, vocab_size: int) -> torch.nn.Module:
    """Megatron-Core's GPTModel with the initial weights of every other layout."""
    model = build_chunk(settings, transformer_config(settings, pipeline=1), vocab_size, None)
    set_initial_weights(model, settings.model)
    return model


def build_pipeline(settings: PretrainSettings, vocab_size: int, world_size: int) -> PipelineModule:
    """The same GPT as layers over pipeline stages: as many transformer layers on each, the embedding on the first."""
    model, parallel = settings.model, settings.parallel
    config = transformer_config(settings, pipeline=1)
    rows = padded_vocab_size(settings, vocab_size)
    tie: dict[str, Any] = {"tied_weight_attr": "word_embeddings.weight"}
    layers: list[Any] = [
        TiedLayerSpec(TIED, Embedding, config, rows, model, positions=model.position_embedding == "learned", **tie)
        if model.tie_embeddings
        else LayerSpec(Embedding, config, rows, model, positions=model.position_embedding == "learned")
    ]
    layers += [LayerSpec(Decoder, settings, config, number) for number in range(model.num_layers)]
    layers.append(LayerSpec(FinalNorm, config))
    layers.append(
        TiedLayerSpec(TIED, Embedding, config, rows, model, positions=False, forward_fn=tied_logits, **tie)
        if model.tie_embeddings
        else LayerSpec(Output, config, rows)
    )
    data = parallel.data_parallel(world_size)
    module = PipelineModule(
        layers=layers,
        topology=PipeModelDataParallelTopology(parallel.pipeline, parallel.tensor, data),
        loss_fn=mean_of_token_losses,
        partition_method="type:Decoder",
        activation_checkpoint_interval=1 if model.recompute == "full" else 0,
    )
    for part in module.modules():
        if isinstance(part, KeyedModule):
            for key, weight in part.keyed_weights():
                set_initial_weight(key, weight, model)
    return module


def token_losses(logits_TBV: Tensor, labels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of tokens `[B, T]` and their mask, from the last stage's logits."""
    labels_BT, mask_BT = labels
    labels_TB = labels_BT.transpose(0, 1).contiguous()
    losses_TB: Any = tensor_parallel.vocab_parallel_cross_entropy(logits_TBV, labels_TB)
    return losses_TB.transpose(0, 1).contiguous(), mask_BT


def mean_of_token_losses(logits_TBV: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of a micro-batch, for those who use the module without Evolved Sampling."""
    from es_megatron.frameworks.deepspeed_common import mean_loss

    return mean_loss(*token_losses(logits_TBV, labels))


class KeyedModule(torch.nn.Module):
    """A piece of the model that knows its weights' names in the whole one."""

    def keyed_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights by the name they have in Megatron-Core's GPTModel."""
        raise NotImplementedError


class Embedding(KeyedModule):
    """Token embedding, plus that of positions where it is learned."""

    def __init__(self, config: TransformerConfig, rows: int, model: ModelSettings, *, positions: bool) -> None:
        """Make the tables; weights are set later."""
        super().__init__()
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            rows, config.hidden_size, init_method=leave_uninitialized, config=config
        )
        self.position_embeddings = torch.nn.Embedding(model.seq_length, config.hidden_size) if positions else None
        self.dropout = config.hidden_dropout

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states [T, B, H] of (tokens, positions), each [B, T]."""
        tokens_BT, positions_BT = inputs
        hidden = self.word_embeddings(tokens_BT)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(positions_BT)
        return F.dropout(hidden.transpose(0, 1).contiguous(), p=self.dropout, training=self.training)

    @override
    def keyed_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield WORDS, self.word_embeddings.weight
        if self.position_embeddings is not None:
            yield "embedding.position_embeddings.weight", self.position_embeddings.weight


class Decoder(KeyedModule):
    """One transformer layer of Megatron-Core."""

    def __init__(self, settings: PretrainSettings, config: TransformerConfig, number: int) -> None:
        """Make layer `number`, counted from 0."""
        super().__init__()
        self.number = number
        self.layer = TransformerLayer(config, layer_spec(settings).submodules, layer_number=number + 1)  # pyright: ignore[reportArgumentType]
        rope = settings.model.position_embedding == "rope"
        channels = config.kv_channels or config.hidden_size // config.num_attention_heads
        self.rotary = RotaryEmbedding(channels, rotary_percent=1.0, use_cpu_initialization=True) if rope else None

    def forward(self, hidden_TBH: Tensor) -> Tensor:
        """Hidden states [T, B, H] of the next layer."""
        rotary = None if self.rotary is None else self.rotary(len(hidden_TBH))
        output: Any = self.layer(hidden_states=hidden_TBH, attention_mask=None, rotary_pos_emb=rotary)
        return output[0]

    @override
    def keyed_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.layer.named_parameters():
            yield f"decoder.layers.{self.number}.{name}", weight


class FinalNorm(KeyedModule):
    """The norm after the last layer."""

    def __init__(self, config: TransformerConfig) -> None:
        """Make it; its weights are ones."""
        super().__init__()
        self.norm = WrappedTorchNorm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden_TBH: Tensor) -> Tensor:
        """Normalised hidden states [T, B, H]."""
        return self.norm(hidden_TBH)  # pyright: ignore[reportCallIssue]

    @override
    def keyed_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.norm.named_parameters():  # pyright: ignore[reportAttributeAccessIssue]
            yield f"decoder.final_layernorm.{name}", weight


class Output(KeyedModule):
    """The output layer where it is not tied to the embedding."""

    def __init__(self, config: TransformerConfig, rows: int) -> None:
        """Make it; weights are set later."""
        super().__init__()
        self.linear = tensor_parallel.ColumnParallelLinear(
            config.hidden_size, rows, config=config, init_method=leave_uninitialized, bias=False, gather_output=False
        )

    def forward(self, hidden_TBH: Tensor) -> Tensor:
        """This rank's share of the logits, [T, B, V]."""
        return self.linear(hidden_TBH)[0]

    @override
    def keyed_weights(self) -> Iterator[tuple[str, Tensor]]:
        weight: Any = self.linear.weight
        yield "output_layer.weight", weight


def tied_logits(embedding: Embedding, hidden_TBH: Tensor) -> Tensor:
    """This rank's share of the logits, [T, B, V], with the embedding's weight."""
    copied: Any = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_TBH)
    return F.linear(copied, embedding.word_embeddings.weight)
