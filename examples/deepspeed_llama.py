"""A DeepSpeed loop around a Llama of Hugging Face's, with random weights.

torchrun --standalone --nproc-per-node 2 examples/deepspeed_llama.py
"""

from __future__ import annotations

import deepspeed
import torch
from tokens import SEQ_LENGTH, VOCABULARY, make_blend
from transformers import LlamaConfig, LlamaForCausalLM

from es_megatron import attach, plan_run
from es_megatron.frameworks.deepspeed_common import prepare

DEEPSPEED = {
    "train_batch_size": 32,  # the meta-batch; 8 of it are trained on
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "steps_per_print": 1000,
    "evolved_sampling": {"selection": {"keep_ratio": 0.25}},
}
SAMPLES = 1200  # two passes


def main() -> None:
    prepare()  # on a machine without CUDA
    deepspeed.init_distributed()
    blend = make_blend()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQ_LENGTH,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = plan_run(blend, train_samples=SAMPLES, deepspeed=DEEPSPEED)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.iterations)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=DEEPSPEED)
    sampling = attach(engine, blend, train_samples=SAMPLES)
    while not sampling.done:
        loss = sampling.step()
        if engine.global_rank == 0 and sampling.iteration % 10 == 0:
            print(f"iteration {sampling.iteration} of {plan.iterations}: loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
