"""The GPT of a pretraining run, and its layout over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from es_megatron.config import require
from es_megatron.config.fields import Spec, check_fields
from es_megatron.errors import ConfigError

Normalization = Literal["LayerNorm", "RMSNorm"]
PositionEmbedding = Literal["rope", "learned"]
Recompute = Literal["none", "full"]


@dataclass(frozen=True)
class ModelSettings:
    """A GPT; the vocabulary comes from the tokenizer of the blend."""

    num_layers: Annotated[int, Spec(">= 1", "layers", ("n_layer", "n_layers", "num_hidden_layers", "layers"))] = 4
    """Transformer layers, >= 1."""

    hidden_size: Annotated[int, Spec(">= 1", "channels", ("d_model", "n_embd", "dim", "hidden_dim"))] = 128
    """Width of the residual stream, a multiple of `num_attention_heads`."""

    num_attention_heads: Annotated[int, Spec(">= 1", "heads", ("n_head", "num_heads", "n_heads"))] = 4
    """Attention heads of a layer, >= 1."""

    num_query_groups: Annotated[int | None, Spec(">= 1", "heads", ("num_key_value_heads", "n_kv_heads"))] = None
    """Heads of keys and values, shared by groups of query heads; None: one for each head."""

    ffn_hidden_size: Annotated[int | None, Spec(">= 1", "channels", ("intermediate_size", "d_ff"))] = None
    """Width of the feed-forward layer; None: 4 x hidden, or with `swiglu` 8/3 x hidden, rounded up to 64s."""

    seq_length: Annotated[
        int, Spec(">= 1", "tokens", ("max_seq_length", "seq_len", "sequence_length", "block_size", "context_length"))
    ] = 128
    """Tokens in a sample."""

    normalization: Annotated[Normalization, Spec(also=("norm",))] = "RMSNorm"
    """`LayerNorm` or `RMSNorm`."""

    position_embedding: Annotated[PositionEmbedding, Spec(also=("position_embedding_type",))] = "rope"
    """`rope` (rotary) or `learned`."""

    swiglu: bool = True
    """Gated SiLU in the feed-forward layer; otherwise GELU."""

    bias: bool = False
    """Bias terms in the linear layers."""

    tie_embeddings: Annotated[bool, Spec(also=("tie_word_embeddings",))] = True
    """Use the embedding as the output layer's weight."""

    dropout: Annotated[float, Spec("in [0, 1)", "share of the values", ("hidden_dropout", "attention_dropout"))] = 0.0
    """Dropout of attention and hidden states, in [0, 1). Scoring never drops."""

    init_std: Annotated[float, Spec("> 0", also=("init_method_std", "initializer_range"))] = 0.02
    """Standard deviation of the initial weights, > 0; divided by sqrt(2 layers) where they write to the residual."""

    init_seed: Annotated[int, Spec(">= 0")] = 1234
    """Seed of the initial weights, >= 0. They do not depend on the parallel layout."""

    weights: Annotated[Path | None, Spec(also=("finetune", "init_from", "pretrained_checkpoint"))] = None
    """Folder of a run with `backend: megatron`, or of one of its checkpoints, whose weights the model begins with; the
    optimizer, the schedule and the scores begin anew. None: weights are drawn at random."""

    vocab_multiple: Annotated[int, Spec(">= 1", "tokens", ("make_vocab_size_divisible_by",))] = 128
    """The vocabulary is padded to a multiple of this and of the tensor-parallel size, >= 1. Padded tokens take part in
    the softmax, so runs to be compared need the same padding: any tensor-parallel size that divides this gives it."""

    recompute: Annotated[
        Recompute, Spec(also=("recompute_granularity", "activation_checkpointing", "gradient_checkpointing"))
    ] = "none"
    """`none`, or `full`: keep only the input of each layer and compute it again in the backward pass."""

    def __post_init__(self) -> None:
        """Check every field and their combinations."""
        check_fields(self)
        heads = self.num_attention_heads
        require(self.hidden_size % heads == 0, "hidden_size", f"a multiple of {heads} heads", self.hidden_size)
        even = self.position_embedding != "rope" or self.hidden_size // heads % 2 == 0
        require(even, "hidden_size", f"an even multiple of {heads} heads with `rope`", self.hidden_size)
        require(heads % self.query_groups == 0, "num_query_groups", f"a divisor of {heads} heads", self.query_groups)

    @property
    def query_groups(self) -> int:
        """Heads of keys and values, filled in."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer, filled in."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64 if self.swiglu else 4 * self.hidden_size


@dataclass(frozen=True)
class ParallelSettings:
    """How the model is split over ranks; what is left of the world is data-parallel."""

    tensor: Annotated[int, Spec(">= 1", "ranks", ("tensor_model_parallel_size", "tp", "tensor_parallel_size"))] = 1
    """Ranks that share each layer, >= 1."""

    pipeline: Annotated[
        int, Spec(">= 1", "ranks", ("pipeline_model_parallel_size", "pp", "pipeline_parallel_size"))
    ] = 1
    """Ranks that share the layers among them, >= 1."""

    context: Annotated[int, Spec(">= 1", "ranks", ("context_parallel_size", "cp"))] = 1
    """Ranks that share each sequence, >= 1; needs Transformer Engine, and sequences that 2 x context cut evenly."""

    virtual_pipeline: Annotated[
        int | None, Spec(">= 2", "chunks of a rank", ("virtual_pipeline_model_parallel_size", "vpp"))
    ] = None
    """Model chunks of each pipeline rank, >= 2, for the interleaved schedule; None: one, without interleaving."""

    distributed_optimizer: Annotated[bool, Spec(also=("use_distributed_optimizer",))] = False
    """Shard the optimizer state over data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""

    overlap_param_gather: bool = False
    """Gather updated weights during the next forward pass; needs the two above."""

    bucket_size: Annotated[int | None, Spec(">= 1", "parameters", ("ddp_bucket_size",))] = None
    """Parameters reduced at a time when overlapping, >= 1; None: Megatron-Core's choice (40 million or more)."""

    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over tensor-parallel ranks; needs Transformer Engine."""

    timeout_minutes: Annotated[int, Spec(">= 1", "minutes")] = 10
    """How long a rank waits for another in a collective before it ends. It must be longer than anything that
    one rank does while the others wait, such as the conversion of a DeepSpeed checkpoint to another number of ranks."""

    def __post_init__(self) -> None:
        """Check every field and their combinations."""
        check_fields(self)
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise ConfigError(
                "`pipeline` must be above 1 with `virtual_pipeline`, but is 1 instead. "
                "Set `virtual_pipeline` to null or `pipeline` to 2 or more."
            )
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigError(
                "`overlap_param_gather` needs `distributed_optimizer` and `overlap_grad_reduce`. Set them."
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError("`sequence_parallel` must be off with `tensor: 1`, which splits nothing. Turn it off.")

    @property
    def chunks(self) -> int:
        """Model chunks on each rank."""
        return self.virtual_pipeline or 1

    @property
    def ranks(self) -> int:
        """Ranks that pass one copy of the data through one model."""
        return self.tensor * self.pipeline * self.context

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size in a world that `check_layout` accepts."""
        return world_size // self.ranks
