"""The GPT of the reference trainer: process groups, model chunks and the forward step.

Shape suffixes: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the name everybody gives it
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as layer_specs
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from es_megatron.errors import ConfigError, DataError, PeerError
from es_megatron.testing import cpu
from es_megatron.trainer.alarm import brief
from es_megatron.trainer.initial_weights import leave_uninitialized, set_initial_weights
from es_megatron.trainer.launched import launched_ranks
from es_megatron.trainer.settings import PretrainSettings, check_layout

Batch = Mapping[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def initialize(settings: PretrainSettings, *, stages_elsewhere: bool = False) -> None:
    """Join the run: torch.distributed, Megatron's process groups and the seeds of every generator.

    Uses the process group there is, else that of torchrun's environment, else one of this process alone.

    Args:
        settings: of the run.
        stages_elsewhere: whether another framework runs the pipeline stages, so that Megatron knows of none.

    Raises:
        LayoutError: the world cannot hold the layout; raised on every rank, before any group is made. Or the
            environment is half a launcher's.
    """
    cpu.install()
    world_size = dist.get_world_size() if dist.is_initialized() else launched_ranks(os.environ)
    check_layout(settings, world_size)
    if not dist.is_initialized():
        _join_process_group(timedelta(minutes=settings.parallel.timeout_minutes))
    parallel = settings.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=1 if stages_elsewhere else parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.timeout_minutes,
    )
    # Stages differ, so that their dropout does; data-parallel ranks do not, as in Megatron-LM.
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if stages_elsewhere:
        stage = dist.get_rank() * parallel.pipeline // world_size  # DeepSpeed's stages are the outermost axis
    seed = settings.training.seed + 100 * stage
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 - for libraries that draw from the global state
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave the run: forget Megatron's groups, and end torch.distributed.

    A gloo group's threads poll until nothing refers to the group, and models refer to them in circles: without the
    collection a process that trains one run after the other slows down from run to run.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def data_parallel_size() -> int:
    """Copies of the model in this run."""
    return parallel_state.get_data_parallel_world_size()


def padded_vocab_size(settings: PretrainSettings, vocab_size: int) -> int:
    """Rows of the embedding: the vocabulary padded to what tensor-parallel ranks can share."""
    multiple = int(np.lcm(settings.model.vocab_multiple, settings.parallel.tensor))
    return -(-vocab_size // multiple) * multiple


def build_model(settings: PretrainSettings, vocab_size: int) -> list[DistributedDataParallel]:
    """Build this rank's model chunks, with initial weights that do not depend on the layout.

    Args:
        settings: of the run; `initialize` has been called with them.
        vocab_size: tokens of the tokenizer.

    Returns:
        One chunk, or one for each virtual pipeline stage of the rank. They share a config that is ready for
        Megatron-Core's schedules.

    Raises:
        ConfigError: the settings need Transformer Engine, which is not installed.
    """
    config = transformer_config(settings)
    chunks: list[DistributedDataParallel] = []
    virtual = settings.parallel.virtual_pipeline
    for index in range(settings.parallel.chunks):
        model: torch.nn.Module = build_chunk(settings, config, vocab_size, None if virtual is None else index)
        set_initial_weights(model, settings.model)
        model.cuda(torch.cuda.current_device())
        if settings.training.precision == "bf16":
            model = Float16Module(config, model)
        # Only the first chunk's gradients come last in the backward pass, where smaller buckets overlap better.
        chunks.append(DistributedDataParallel(config, _ddp_config(settings), model, disable_bucketing=index > 0))
    for chunk in chunks:
        chunk.broadcast_params()
    _connect_schedules(config, chunks, settings)
    return chunks


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """Take the wrappers off a model chunk."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module  # pyright: ignore[reportAssignmentType]
    return chunk


def reads_data(chunk: torch.nn.Module) -> bool:
    """Whether a chunk takes a batch itself: the first and the last stage do, those between only hidden states."""
    model = unwrap(chunk)
    return bool(model.pre_process or model.post_process)


def forward_step(data_iterator: Iterator[Batch] | None, model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
    """Run one micro-batch forward, in the shape Megatron's schedules ask for.

    Args:
        data_iterator: gives batches of `tokens_BT, labels_BT, position_ids_BT` (int64) and `loss_mask_BT` (float32);
            not read, and may be None, on stages that do not read data.
        model: a chunk of `build_model`.

    Returns:
        The stage's output (on the last stage the losses of tokens, [B, T]), and the function that makes the loss of it,
        a `functools.partial` whose first argument is `loss_mask_BT` (None on stages that do not read data).

    Raises:
        DataError: the stage reads data, and there is no iterator.
    """
    if not reads_data(model):
        return model(input_ids=None, position_ids=None, attention_mask=None), functools.partial(loss_of, None)
    if data_iterator is None:
        raise DataError("A first or last pipeline stage must get a data iterator, but got None instead. Pass one.")
    device = "cpu" if cpu.installed() else torch.cuda.current_device()
    batch = {key: value.to(device, non_blocking=True) for key, value in next(data_iterator).items()}
    counted = batch["loss_mask"].sum(dtype=torch.float32)
    batch = own_part(batch)
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,  # the model makes the causal one
        labels=batch["labels"],
    )
    return output, functools.partial(loss_of, batch["loss_mask"], counted=counted)


def own_part(batch: Batch) -> Batch:
    """This rank's tokens of each sequence, as upstream's attention and position embeddings cut it.

    An early and a late piece, so that causal attention costs every rank the same.
    """
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return batch
    tokens = batch["tokens"]
    pieces = torch.arange(tokens.shape[1], device=tokens.device).view(2 * size, -1)
    index = torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])
    return {name: tensor.index_select(1, index) for name, tensor in batch.items()}


def loss_of(
    loss_mask_BT: torch.Tensor | None, losses_BT: torch.Tensor, *, counted: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss over the unmasked tokens of a micro-batch (0 where all are masked), to train on and to report.

    Args:
        loss_mask_BT: of this rank's tokens.
        losses_BT: of its tokens.
        counted: unmasked tokens of the micro-batch on all ranks that share it, float32.

    Returns:
        This rank's part of the mean, and the mean.
    """
    if loss_mask_BT is None or counted is None:
        raise DataError("Only the last pipeline stage, which reads data, has a loss to average.")
    loss = torch.sum(losses_BT.reshape(-1).float() * loss_mask_BT.reshape(-1).float()) / counted.clamp(min=1)
    whole = loss.detach().clone()  # a copy: the schedule divides the loss in place
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    return loss, {"lm loss": whole}


@contextlib.contextmanager
def settled_weights(chunks: Sequence[DistributedDataParallel]) -> Generator[None, None, None]:
    """Have every rank's weights up to date inside the block; collective, may be nested. Evaluate and save only there.

    With `overlap_param_gather` the optimizer leaves each rank with its own shard updated, and the rest is gathered only
    by the next forward pass after the gradient buffers were zeroed.
    """
    overlapping = [chunk for chunk in chunks if chunk.use_forward_hook and chunk.remove_forward_pre_hook_handles]
    for chunk in overlapping:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapping:
            chunk.enable_forward_pre_hook()


def transformer_config(settings: PretrainSettings, *, pipeline: int | None = None) -> TransformerConfig:
    """Say the settings in Megatron-Core's words; `pipeline` overrides the number of stages that it knows of."""
    model, parallel = settings.model, settings.parallel
    dtype = torch.bfloat16 if settings.training.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        ffn_hidden_size=model.ffn_size,
        normalization=model.normalization,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        add_bias_linear=model.bias,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        init_method=leave_uninitialized,
        output_layer_init_method=leave_uninitialized,
        embedding_init_method=leave_uninitialized,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=pipeline or parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=settings.training.precision == "bf16",
        recompute_granularity="full" if model.recompute == "full" else None,
        recompute_method="uniform" if model.recompute == "full" else None,
        recompute_num_layers=1 if model.recompute == "full" else None,
        **_platform_settings(interleaved=parallel.virtual_pipeline is not None),
    )


def _platform_settings(*, interleaved: bool) -> dict[str, Any]:
    """Give the switches of TransformerConfig that depend on the machine."""
    if not cpu.installed():
        return {
            "deallocate_pipeline_outputs": True,
            "batch_p2p_comm": not interleaved,
            "overlap_p2p_comm": interleaved,
            "masked_softmax_fusion": False,
        }
    return {
        # On gloo, batched messages of the interleaved schedule between two ranks get mixed up, and with outputs
        # deallocated a message still under way may carry other data.
        "deallocate_pipeline_outputs": False,
        "batch_p2p_comm": False,
        "overlap_p2p_comm": False,
        # kernels that exist only for CUDA, or only gain there
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
    }


def _join_process_group(timeout: timedelta) -> None:
    backend = "gloo" if cpu.installed() else "nccl"
    if not cpu.installed():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's order of communication and compute
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if os.environ.get("RANK"):
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise PeerError(
                f"The {os.environ.get('WORLD_SIZE')} ranks did not meet at {where}: {brief(error)}. Look for the first "
                "error of the others, which may have ended before; if they only start slowly, raise "
                "`parallel.timeout_minutes`."
            ) from error
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def build_chunk(settings: PretrainSettings, config: TransformerConfig, vocab_size: int, stage: int | None) -> GPTModel:
    """Build one chunk without wrappers and without initial weights; `stage` is its number where a rank has several."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage)
    model = settings.model
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(settings),
        vocab_size=padded_vocab_size(settings, vocab_size),
        max_sequence_length=model.seq_length,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope" if model.position_embedding == "rope" else "learned_absolute",
        vp_stage=stage,
    )


def layer_spec(settings: PretrainSettings) -> ModuleSpec:
    """Choose Transformer Engine's layers on CUDA where it is installed, else Megatron-Core's own."""
    if layer_specs.HAVE_TE and not cpu.installed():
        return layer_specs.get_gpt_layer_with_transformer_engine_spec()
    if settings.parallel.sequence_parallel:
        raise ConfigError(
            "`sequence_parallel` must be off without CUDA and Transformer Engine: Megatron-Core's norms cannot split "
            "a sequence. Turn it off, or install transformer-engine."
        )
    if settings.parallel.context > 1:
        raise ConfigError(
            "`context` must be 1 without CUDA and Transformer Engine, whose attention alone reaches over the ranks "
            f"that share a sequence, but is {settings.parallel.context} instead. Use 1, or install transformer-engine."
        )
    return layer_specs.get_gpt_layer_local_spec(normalization=settings.model.normalization)


def _ddp_config(settings: PretrainSettings) -> DistributedDataParallelConfig:
    parallel = settings.parallel
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
    )


def _connect_schedules(
    config: TransformerConfig, chunks: Sequence[DistributedDataParallel], settings: PretrainSettings
) -> None:
    """Tell the schedules how gradients are finished, and when they must not be reduced yet."""
    config.finalize_model_grads_func = finalize_model_grads
    if settings.parallel.overlap_grad_reduce:
        functions: Any = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = functions[0] if len(functions) == 1 else functions
