"""The reference GPT on real megatron-core: layouts train alike, scoring leaves no trace, the CPU layer."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from es_megatron.errors import ConfigError, DataError, LayoutError
from es_megatron.frameworks.adam import GroupAdam
from es_megatron.testing import cpu
from es_megatron.trainer.initial_weights import global_name
from es_megatron.trainer.model import (
    forward_step,
    initialize,
    padded_vocab_size,
    settled_weights,
    unwrap,
)
from es_megatron.trainer.model_settings import ParallelSettings
from es_megatron.trainer.optimizer import learning_rate, step, zero_gradients
from tests.gpt_helper import (
    GPT2,
    LARGE_LAYOUTS,
    LAYOUTS,
    META_BATCH,
    OVERLAPPING,
    PLAIN,
    VOCABULARY,
    Run,
    settings_of,
    train,
)
from tests.ranks_helper import on_ranks, run_on_ranks

every_layout = pytest.mark.parametrize(
    "layout",
    LAYOUTS + [pytest.param(layout, marks=pytest.mark.slow) for layout in LARGE_LAYOUTS],
    ids=lambda layout: layout.name,
)


@pytest.fixture(scope="module")
def reference():
    return {
        name: run_on_ranks(1, train, settings_of(**model))[0] for name, model in {"llama": {}, "gpt2": GPT2}.items()
    }


# --- training ---


@every_layout
def test_layouts_train_alike(layout, reference):
    for history in run_on_ranks(layout.ranks, train, settings_of(layout.parallel)):
        assert history == [pytest.approx(expected, rel=1e-5) for expected in reference["llama"]]
    assert reference["llama"][-1][0] < reference["llama"][0][0] - 0.1


@pytest.mark.parametrize(
    "layout", [LAYOUTS[1], LAYOUTS[2], pytest.param(LARGE_LAYOUTS[0], marks=pytest.mark.slow)], ids=lambda one: one.name
)
def test_layouts_train_alike_with_biases_norms_and_untied_embeddings(layout, reference):
    history = run_on_ranks(layout.ranks, train, settings_of(layout.parallel, **GPT2))[0]
    assert history == [pytest.approx(expected, rel=1e-5) for expected in reference["gpt2"]]


def test_recomputing_activations_changes_nothing(reference):
    assert run_on_ranks(1, train, settings_of(recompute="full"))[0] == reference["llama"]


@pytest.mark.parametrize("parallel", [PLAIN, OVERLAPPING], ids=["plain", "overlapping"])
def test_bf16_trains(parallel, reference):
    history = run_on_ranks(2, train, settings_of(parallel, precision="bf16"))[0]
    assert [loss for loss, _, _ in history] == pytest.approx([loss for loss, _, _ in reference["llama"]], rel=2e-3)
    assert history != reference["llama"]


@on_ranks(1)
def test_initial_loss_is_that_of_guessing():
    run = Run(settings_of())
    found = run.pass_over(run.own_batches(0), forward_only=True)
    losses = [each["lm loss"].item() for each in found]
    assert len(losses) == META_BATCH
    assert sum(losses) / META_BATCH == pytest.approx(math.log(padded_vocab_size(run.settings, VOCABULARY)), abs=0.1)


@on_ranks(2)
def test_padding_of_the_vocabulary_does_not_depend_on_tensor_parallelism():
    assert padded_vocab_size(settings_of(ParallelSettings(tensor=2)), 60) == padded_vocab_size(settings_of(), 60) == 128
    assert padded_vocab_size(settings_of(vocab_multiple=10), 61) == 70


@on_ranks(1)
def test_loss_counts_unmasked_tokens_only():
    run = Run(settings_of())
    batch = run.own_batches(0)[0]
    for chunk in run.chunks:
        chunk.eval()
    with torch.no_grad():
        losses, loss_of = forward_step(iter([batch]), run.chunks[0])
    assert loss_of.args[0] is batch["loss_mask"]
    assert losses.shape == batch["labels"].shape
    loss, report = loss_of(losses)
    assert loss.item() == pytest.approx(losses[batch["loss_mask"] > 0].mean().item(), rel=1e-6)
    loss /= 4  # as the schedule does
    assert report["lm loss"].item() == pytest.approx(4 * loss.item())
    batch["loss_mask"].zero_()
    assert loss_of(losses)[0].item() == 0.0


@on_ranks(1)
def test_a_stage_that_reads_data_needs_an_iterator():
    run = Run(settings_of())
    with pytest.raises(DataError, match="data iterator"):
        forward_step(None, run.chunks[0])


@on_ranks(2)
def test_chunks_name_layers_over_all_stages():
    run = Run(settings_of(ParallelSettings(pipeline=2, virtual_pipeline=2)))
    names = [global_name(unwrap(chunk), "decoder.layers.0.mlp.linear_fc1.weight") for chunk in run.chunks]
    rank = dist.get_rank()
    assert names == [f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in (rank, rank + 2)]


def test_a_world_that_cannot_hold_the_layout_is_refused_on_every_rank():
    def refused():
        with pytest.raises(LayoutError, match="tensor x pipeline = 2 x 1"):
            initialize(settings_of(ParallelSettings(tensor=2)))
        assert not parallel_state.is_initialized()
        return True

    assert run_on_ranks(3, refused) == [True] * 3


# --- scoring between zeroing and training ---


def score_first(run, iteration):
    for chunk in run.chunks:
        chunk.eval()
    with torch.no_grad():
        found = run.pass_over(run.own_batches(iteration, size=2), forward_only=True)
    for chunk in run.chunks:
        chunk.train()
    assert bool(found) == parallel_state.is_pipeline_last_stage()


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, ParallelSettings()), (2, LAYOUTS[3].parallel), (2, OVERLAPPING)],
    ids=["one", "vpp2", "dp2-overlapping"],
)
def test_a_larger_forward_pass_in_eval_mode_leaves_no_trace(ranks, parallel):
    settings = settings_of(parallel, dropout=0.1)
    assert run_on_ranks(ranks, train, settings, 0, 2, score_first) == run_on_ranks(ranks, train, settings, 0, 2)


def weights_of(run):
    return torch.cat([weight.detach().flatten() for chunk in run.chunks for weight in chunk.parameters()])


def all_equal(tensor):
    highest, lowest = tensor.clone(), tensor.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return torch.equal(highest, lowest)


@on_ranks(2)
def test_weights_settle_only_where_asked_when_gathers_overlap():
    run = Run(settings_of(OVERLAPPING))
    run.train(0, 1)
    assert not all_equal(weights_of(run))
    with settled_weights(run.chunks):
        assert all_equal(weights_of(run))
        with settled_weights(run.chunks):
            assert all_equal(weights_of(run))
    run.train(1, 2)


# --- optimizer ---


@pytest.mark.parametrize("parallel", [PLAIN, OVERLAPPING], ids=["plain", "overlapping"])
def test_a_gradient_that_is_not_finite_changes_nothing(parallel):
    def spoiled():
        run = Run(settings_of(parallel))
        run.train(0, 1)
        with settled_weights(run.chunks):
            before = weights_of(run).clone()
        zero_gradients(run.chunks, run.optimizer)
        run.pass_over(run.own_batches(1))
        if dist.get_rank() == 1:  # one rank of two sees the NaN
            run.chunks[0].buffers[0].grad_data[-1] = math.nan
            run.chunks[0].buffers[0].grad_data[0] = math.nan
        elif not parallel.distributed_optimizer:
            run.chunks[0].buffers[0].grad_data[0] = math.nan  # gradients are whole, and the same everywhere
        succeeded, norm = step(run.optimizer)
        with settled_weights(run.chunks):
            unchanged = torch.equal(before, weights_of(run))
        history = run.train(2, 3)
        return succeeded, math.isnan(norm), unchanged, history[-1][2]

    assert run_on_ranks(2, spoiled) == [(False, True, True, True)] * 2


@on_ranks(1)
def test_the_schedule_warms_up_and_decays():
    settings = settings_of()
    settings = replace(settings, training=replace(settings.training, warmup=0.2, min_lr=1e-3))
    run = Run(settings)
    rates = []
    for _ in range(10):
        run.scheduler.step(1)
        rates.append(learning_rate(run.optimizer))
    assert rates[:2] == pytest.approx([0.005, 0.01])
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[5] == pytest.approx((1e-2 + 1e-3) / 2)
    assert rates[-1] == pytest.approx(1e-3)


def test_group_adam_equals_torchs_adamw_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in ((7, 5), (3,), (64, 33))]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    group_adam = GroupAdam([{"params": ours[:2]}, {"params": ours[2:]}, {"params": []}], **options)
    adamw = torch.optim.AdamW(theirs, fused=True, **options)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        group_adam.step()
        adamw.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert [group["step"] for group in group_adam.param_groups] == [5, 5, 5]


def test_group_adam_takes_switches_that_are_off_and_refuses_others_by_name():
    """Megatron-Core hands over `capturable` since 0.17, and may hand over more."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    weights = [torch.ones(2, requires_grad=True)]
    GroupAdam(weights, **options, capturable=False, of_next_year=None)
    with pytest.raises(ConfigError, match=r"`capturable` must be off .* \(`--optimizer-cuda-graph`\) off, or install"):
        GroupAdam(weights, **options, capturable=True)
    with pytest.raises(ConfigError, match=r"`of_next_year` must be off .* but is 3 instead: .* Switch it off"):
        GroupAdam(weights, **options, of_next_year=3)


# --- the CPU layer ---


def test_the_layer_can_be_taken_off_again():
    def on_and_off():
        cpu.uninstall()  # another test file may have put it on
        before = (torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device, torch.compile)
        assert cpu.install()
        during = (torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device, torch.compile)
        assert cpu.install()
        assert torch.ones(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=0).to("cuda:0").cuda().pin_memory().device.type == "cpu"
        assert torch.ones(1).new_empty(2, device=0).new_zeros(1, device="cuda").device.type == "cpu"
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.int64).dtype == torch.int64
        cpu.uninstall()
        assert not cpu.installed()
        after = (torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device, torch.compile)
        assert torch.ones(1).type() == "torch.FloatTensor"
        return before == after, any(old is new for old, new in zip(before, during, strict=True))

    assert run_on_ranks(1, on_and_off) == [(True, False)]


def test_optimizers_step_where_torch_is_built_for_cuda(monkeypatch):
    """Megatron-LM's layer says that there is CUDA, and torch's optimizers then ask whether a graph is captured."""

    def step():
        cpu.install()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        weight = torch.ones(1, requires_grad=True)
        weight.grad = torch.ones(1)
        torch.optim.AdamW([weight], lr=0.1).step()
        return float(weight)

    assert run_on_ranks(1, step) == [pytest.approx(0.899)]


@on_ranks(2)
def test_experts_tokens_are_exchanged_by_tensors_of_sizes():
    """Megatron-Core's dispatcher keeps sizes as tensors, and makes arrays of them only where they are on a GPU."""
    cpu.install()
    rank = dist.get_rank()
    sent, received = torch.full((3,), float(rank)), torch.empty(2 if rank == 0 else 4)
    splits = torch.tensor([[1, 2], [1, 2]])
    dist.all_to_all_single(received, sent, splits[:, rank].clone(), input_split_sizes=splits[rank])
    assert received.tolist() == ([0.0, 1.0] if rank == 0 else [0.0, 0.0, 1.0, 1.0])


def test_the_layer_keeps_away_from_cuda(monkeypatch):
    def with_cuda():
        cpu.uninstall()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        before = dict(vars(torch)), dict(vars(torch.cuda)), torch.Tensor.to
        assert not cpu.install()
        return before == (dict(vars(torch)), dict(vars(torch.cuda)), torch.Tensor.to) and not cpu.installed()

    assert run_on_ranks(1, with_cuda) == [True]


SCRIPT = """
import es_megatron.trainer.settings, torch
before = torch.empty
import es_megatron.trainer.model_state, es_megatron.trainer.optimizer
assert torch.empty is before, "importing changed torch"
"""

INSTALLED_FIRST = """
from es_megatron.testing import cpu
cpu.install()
from tests import gpt_helper as here
print(here.train(here.settings_of()))
from es_megatron.trainer.model import shutdown
shutdown()
"""


def python(script):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=root, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_importing_changes_nothing():
    python(SCRIPT)


@pytest.mark.slow
def test_without_a_launcher_and_with_the_layer_first_training_is_the_same(reference, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert python(INSTALLED_FIRST).splitlines()[-1] == str(reference["llama"])
