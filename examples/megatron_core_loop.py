"""A training loop of one's own around Megatron-Core: two pipeline stages, its 1F1B schedule, its optimizer.

torchrun --standalone --nproc-per-node 2 examples/megatron_core_loop.py
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from es_megatron.testing import cpu

cpu.install()  # on a machine without CUDA; before megatron is imported

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from tokens import SEQ_LENGTH, VOCABULARY, make_blend  # noqa: E402

from es_megatron import EvolvedSamplingConfig, attach  # noqa: E402

META_BATCH, MICRO_BATCH, STAGES = 32, 4, 2


def loss_of(mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a micro-batch; the mask is the first argument, where `attach` looks for it."""
    loss = (losses.float() * mask).sum() / mask.sum().clamp(min=1)
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place


def forward_step(iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, functools.partial(loss_of, batch["loss_mask"])


def main() -> None:
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=STAGES)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        pipeline_model_parallel_size=STAGES,
        pipeline_dtype=torch.float32,
    )
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        VOCABULARY,
        SEQ_LENGTH,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampling = attach(
        model,
        make_blend(),
        train_samples=1200,
        config=EvolvedSamplingConfig.from_mapping({"selection": {"keep_ratio": 0.25}}, "example"),
        global_batch_size=META_BATCH,
        micro_batch_size=MICRO_BATCH,
    )
    schedule = sampling.wrap(get_forward_backward_func())
    while not sampling.done:
        optimizer.zero_grad()
        found = schedule(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[model],
            num_microbatches=META_BATCH // MICRO_BATCH,
            seq_length=SEQ_LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        sampling.finish(succeeded=True)
        if last and sampling.iteration % 10 == 0:
            loss = sum(each["loss"] for each in found) / len(found)
            print(f"iteration {sampling.iteration} of {sampling.plan.iterations}: loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
