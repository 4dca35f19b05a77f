"""Invariant 5: with Evolved Sampling off, losses are bit for bit those of a script that never imports the package.

The script knows Megatron-Core, torch, and a file with the settings, the initial weights and the batches of every rank.
It brings the few stand-ins for CUDA that Megatron-Core asks for itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from es_megatron.trainer.model import unwrap
from tests.ranks_helper import run_on_ranks
from tests.small_run import META_BATCH, VOCABULARY, History, T, Trainer, chunks_of, settings_of, watch, write_blend

ITERATIONS = 12

SCRIPT = r"""
import json, math, os, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F

folder, world = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
generator = torch.default_generator
torch.compile = lambda function=None, **_: function if function else (lambda inner: inner)
torch.cuda.current_device = lambda: torch.device("cpu")
for owner in (torch.cuda, torch.cuda.random):
    owner.get_rng_state = lambda device=None: generator.get_state()
    owner.set_rng_state = lambda state, device=None: generator.set_state(state)
    owner.manual_seed = lambda seed: generator.manual_seed(seed)
torch.cuda.set_device = lambda device: None
torch.cuda.current_stream = lambda device=None: None
torch.cuda.default_generators = {torch.device("cpu"): generator}
torch.cuda._lazy_call = lambda call, **_: call()
def on_cpu(make):
    return lambda *a, **k: make(*a, **{**k, "device": "cpu"} if k.get("device") == "cuda" else k)
for name in ("zeros", "empty", "ones", "full", "tensor", "arange"):
    setattr(torch, name, on_cpu(getattr(torch, name)))
torch.Tensor.cuda = lambda self, *_, **__: self
device_type = torch.Tensor.type
def type_of(self, *a, **k):
    return device_type(self, *a, **k) if a or k else device_type(self).replace("torch.", "torch.cuda.")
torch.Tensor.type = type_of

from functools import partial
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

rank = 0
for other in range(1, world):
    if rank == 0 and os.fork() == 0:
        rank = other
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
given = torch.load(f"{folder}/rank{rank}.pt", weights_only=True)
config = TransformerConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=4, ffn_hidden_size=64,
    normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
    hidden_dropout=0.1, attention_dropout=0.1,
    use_cpu_initialization=True, params_dtype=torch.float32, pipeline_dtype=torch.float32, persist_layer_norm=False,
    masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
    gradient_accumulation_fusion=False, apply_rope_fusion=False,
)
model = GPTModel(
    config=config, transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
    vocab_size=given["vocabulary"], max_sequence_length=given["length"], share_embeddings_and_output_weights=True,
    position_embedding_type="rope",
)
told = model.load_state_dict(given["weights"], strict=False)
assert not told.unexpected_keys and all(name.endswith("_extra_state") for name in told.missing_keys), told
ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
config.finalize_model_grads_func = finalize_model_grads
weights = list(ddp.parameters())
groups = [
    {"params": [w for w in weights if w.dim() > 1], "wd_mult": 1.0, "lr_mult": 1.0},
    {"params": [w for w in weights if w.dim() == 1], "wd_mult": 0.0, "lr_mult": 1.0},
]
optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
steps = len(given["batches"])
scheduler = OptimizerParamScheduler(
    optimizer, init_lr=0.0, max_lr=3e-3, min_lr=1e-4, lr_warmup_steps=int(0.05 * steps), lr_decay_steps=steps,
    lr_decay_style="cosine", start_wd=0.1, end_wd=0.1, wd_incr_steps=steps, wd_incr_style="constant",
)
torch.manual_seed(1234)  # building the model has drawn
tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)

def forward_step(iterator, model):
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    def loss_of(mask, losses):
        mask = mask.reshape(-1)
        loss = torch.sum(losses.reshape(-1) * mask) / mask.sum()
        return loss, {"lm loss": loss.detach().clone()}
    return output, partial(loss_of, batch["loss_mask"])

history = []
for batches in given["batches"]:
    ddp.zero_grad_buffer()
    results = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches), model=[ddp], num_microbatches=len(batches),
        seq_length=given["length"], micro_batch_size=1, forward_only=False,
    )
    for weight in weights:
        weight.grad = weight.main_grad
    norm = math.sqrt(sum(float(weight.grad.double().square().sum()) for weight in weights))
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step(1)
    history.append([sum(float(result["lm loss"]) for result in results), norm])
assert not any(name.split(".")[0] == "es_megatron" for name in sys.modules)
with open(f"{folder}/history{rank}.json", "w") as file:
    json.dump(history, file)
dist.barrier()
if rank:
    os._exit(0)
for _ in range(1, world):
    assert os.wait()[1] == 0
"""


def train_and_export(settings: Any, folder: Path) -> list[list[float]]:
    """Run the plain arm, and write what the script needs: the weights it began with and the batches it saw."""
    from es_megatron.trainer import megatron_backend

    trainer = Trainer(settings)
    model = unwrap(chunks_of(trainer)[0])
    given: dict[str, Any] = {
        "vocabulary": VOCABULARY,
        "length": T,
        "weights": {name: weight.detach().clone() for name, weight in model.named_parameters()},
        "batches": [],
    }
    forward_step = megatron_backend.forward_step

    def noting_step(iterator: Any, chunk: Any) -> Any:
        batch = {name: tensor.clone() for name, tensor in next(iterator).items()}
        given["batches"][-1].append(batch)
        return forward_step(iter([batch]), chunk)

    megatron_backend.forward_step = noting_step
    history = History()
    watch(trainer, history, before_step=lambda *_: None, after=lambda *_: given["batches"].append([]))
    given["batches"].append([])
    trainer.run()
    assert not given["batches"].pop()
    torch.save(given, folder / f"rank{trainer.grid.world_rank}.pt")
    return [list(pair) for pair in zip(history.reported, history.norm, strict=True)]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_off_equals_a_script_that_never_imports_the_package(ranks: int, tmp_path: Path) -> None:
    settings = settings_of(
        write_blend(tmp_path / "data"),
        tmp_path / "run",
        "evolved_sampling.arm=plain",
        "model.dropout=0.1",
        "training.clip_grad=0",
        f"training.train_samples={ITERATIONS * META_BATCH}",
    )
    ours = run_on_ranks(ranks, train_and_export, settings, tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(ranks)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = [json.loads((tmp_path / f"history{rank}.json").read_text()) for rank in range(ranks)]
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == ITERATIONS
        assert [loss for loss, _ in mine] == [loss for loss, _ in other]
        assert [norm for _, norm in mine] == pytest.approx([norm for _, norm in other], rel=1e-6)
