"""A DeepSpeed pipeline of one's own layers over two stages.

torchrun --standalone --nproc-per-node 2 examples/deepspeed_pipeline.py
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from tokens import VOCABULARY, make_blend
from torch import Tensor

from es_megatron import attach
from es_megatron.frameworks.deepspeed_common import mean_loss, prepare

WIDTH = 32
DEEPSPEED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "steps_per_print": 1000,
    "evolved_sampling": {"selection": {"keep_ratio": 0.25}},
}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.output = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], device=hidden.device)
        seen, _ = self.attention(hidden, hidden, hidden, attn_mask=mask, need_weights=False)
        return hidden + self.output(torch.nn.functional.gelu(seen))


def token_losses(logits: Tensor, labels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of each token, and which count; on the last stage."""
    targets, mask = labels
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses, mask


def pack(batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What the first stage takes, and what the last one's loss takes."""
    return batch["tokens"], (batch["labels"], batch["loss_mask"])


def main() -> None:
    prepare()  # on a machine without CUDA
    deepspeed.init_distributed()
    layers = [LayerSpec(torch.nn.Embedding, VOCABULARY, WIDTH)]
    layers += [LayerSpec(Block), LayerSpec(Block), LayerSpec(torch.nn.Linear, WIDTH, VOCABULARY)]
    network = PipelineModule(
        layers, num_stages=2, loss_fn=lambda logits, labels: mean_loss(*token_losses(logits, labels))
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=DEEPSPEED)
    sampling = attach(engine, make_blend(), train_samples=1200, token_losses=token_losses, pack=pack)
    while not sampling.done:
        loss = sampling.step()
        if engine.global_rank == 0 and sampling.iteration % 10 == 0:
            print(f"iteration {sampling.iteration} of {sampling.plan.iterations}: loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
