"""The reference GPT on real megatron-core: layouts train alike, scoring leaves no trace, checkpoints come back."""

import math
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from es_megatron.errors import CheckpointError, DataError, LayoutError
from es_megatron.frameworks import cpu
from es_megatron.frameworks.adam import GroupAdam
from es_megatron.trainer import model_state
from es_megatron.trainer.initial_weights import global_name
from es_megatron.trainer.model import (
    build_model,
    data_parallel_size,
    forward_step,
    initialize,
    padded_vocab_size,
    rank_grid,
    reads_data,
    settled_weights,
    unwrap,
)
from es_megatron.trainer.model_state import load_model, save_model
from es_megatron.trainer.optimizer import build_optimizer, build_scheduler, learning_rate, step, zero_gradients
from es_megatron.trainer.settings import (
    DataSettings,
    ModelSettings,
    ParallelSettings,
    PretrainSettings,
    TrainingSettings,
)
from tests.ranks_helper import on_ranks, run_on_ranks

VOCABULARY = 60
META_BATCH = 8
STEPS = 3
PLAIN = ParallelSettings()
OVERLAPPING = ParallelSettings(
    distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=5000
)
"""Buckets small enough that the tiny model has several, with padding between them."""

Layout = namedtuple("Layout", "name ranks parallel")
LAYOUTS = [
    Layout("dp2", 2, ParallelSettings()),
    Layout("tp2", 2, ParallelSettings(tensor=2)),
    Layout("pp2", 2, ParallelSettings(pipeline=2)),
    Layout("vpp2", 2, ParallelSettings(pipeline=2, virtual_pipeline=2)),
    Layout("dp2-sharded", 2, ParallelSettings(distributed_optimizer=True)),
    Layout("dp2-overlapping", 2, OVERLAPPING),
]
LARGE_LAYOUTS = [
    Layout("tp2-pp2", 4, ParallelSettings(tensor=2, pipeline=2)),
    Layout("pp2-dp2-overlapping", 4, replace(OVERLAPPING, pipeline=2)),
    Layout("vpp2-dp2-overlapping", 4, replace(OVERLAPPING, pipeline=2, virtual_pipeline=2)),
    Layout("pp4", 4, ParallelSettings(pipeline=4)),
]
every_layout = pytest.mark.parametrize(
    "layout",
    LAYOUTS + [pytest.param(layout, marks=pytest.mark.slow) for layout in LARGE_LAYOUTS],
    ids=lambda layout: layout.name,
)


def settings_of(parallel=PLAIN, *, precision="fp32", **model):
    tiny = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
    return PretrainSettings(
        model=ModelSettings(**{**tiny, **model}),
        parallel=parallel,
        data=DataSettings(blend=Path("unused.yaml")),
        training=TrainingSettings(
            train_samples=100, global_batch_size=META_BATCH, micro_batch_size=1, lr=1e-2, precision=precision
        ),
    )


GPT2 = {
    "swiglu": False,
    "bias": True,
    "normalization": "LayerNorm",
    "position_embedding": "learned",
    "tie_embeddings": False,
}


def batches_of(iteration, size, length, first=0, last=META_BATCH):
    """Micro-batches of rows first to last of a random meta-batch; a third of the tokens do not count."""
    generator = torch.Generator().manual_seed(iteration)
    tokens = torch.randint(0, VOCABULARY, (META_BATCH, length + 1), generator=generator)
    mask = (torch.rand((META_BATCH, length), generator=generator) < 2 / 3).float()
    positions = torch.arange(length).expand(META_BATCH, -1)
    return [
        {
            "tokens": tokens[row : row + size, :-1],
            "labels": tokens[row : row + size, 1:],
            "loss_mask": mask[row : row + size],
            "position_ids": positions[row : row + size],
        }
        for row in range(first, last, size)
    ]


@dataclass
class Run:
    """A run in this process; its group and layout are of the rank."""

    settings: PretrainSettings
    history: list = field(default_factory=list)

    def __post_init__(self):
        initialize(self.settings)
        self.chunks = build_model(self.settings, VOCABULARY)
        self.optimizer = build_optimizer(self.settings, self.chunks)
        self.scheduler = build_scheduler(self.settings, self.optimizer, 10)

    def own_batches(self, iteration, size=1):
        share = META_BATCH // data_parallel_size()
        first = share * parallel_state.get_data_parallel_rank()
        return batches_of(iteration, size, self.settings.model.seq_length, first, first + share)

    def pass_over(self, batches, **changes):
        feeds = [iter(batches) if reads_data(chunk) else None for chunk in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=feeds if len(feeds) > 1 else feeds[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=self.settings.model.seq_length,
            micro_batch_size=len(batches[0]["tokens"]),
            **{"forward_only": False, **changes},
        )

    def train(self, start, stop, before=lambda run, iteration: None):
        for iteration in range(start, stop):
            self.scheduler.step(1)
            zero_gradients(self.chunks, self.optimizer)
            before(self, iteration)
            found = self.pass_over(self.own_batches(iteration))
            total = torch.stack([each["lm loss"] for each in found]).sum() if found else torch.zeros(())
            dist.all_reduce(total)  # tensor-parallel ranks of the last stage all have it
            succeeded, norm = step(self.optimizer)
            self.history.append((total.item() / META_BATCH / self.settings.parallel.tensor, norm, succeeded))
        return self.history


def train(settings, start=0, stop=STEPS, before=lambda run, iteration: None):
    return Run(settings).train(start, stop, before)


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


@on_ranks(4)
def test_rank_grid_lists_data_parallel_rows():
    initialize(settings_of(ParallelSettings(pipeline=2)))
    assert rank_grid() == [[0, 2], [1, 3]]


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


# --- checkpoints ---


def train_and_save(settings, directory, at, stop):
    run = Run(settings)
    run.train(0, at)
    save_model(directory, run.chunks, run.optimizer, run.scheduler, at)
    return run.train(at, stop)[at:]


def load_and_train(settings, directory, at, stop):
    run = Run(settings)
    torch.manual_seed(99)  # what a checkpoint must put back
    assert load_model(directory, run.chunks, run.optimizer, run.scheduler) == at
    return run.train(at, stop)


EXACT = [
    Layout("one-dropout", 1, ParallelSettings()),
    Layout("dp2-sharded", 2, ParallelSettings(distributed_optimizer=True)),
    Layout("dp2-overlapping", 2, OVERLAPPING),
    Layout("tp2", 2, ParallelSettings(tensor=2)),
    Layout("vpp2", 2, ParallelSettings(pipeline=2, virtual_pipeline=2)),
]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout",
    EXACT + [pytest.param(layout, marks=pytest.mark.slow) for layout in LARGE_LAYOUTS[:3]],
    ids=lambda layout: layout.name,
)
def test_resume_is_exact_on_the_same_layout(layout, precision, tmp_path):
    settings = settings_of(layout.parallel, precision=precision, dropout=0.2)
    directory = tmp_path / "model"
    uninterrupted = run_on_ranks(layout.ranks, train_and_save, settings, directory, 2, 4)
    assert run_on_ranks(layout.ranks, load_and_train, settings, directory, 2, 4) == uninterrupted


MOVES = [
    ("dp2-to-one", LAYOUTS[0], Layout("one", 1, ParallelSettings())),
    ("one-to-tp2", Layout("one", 1, ParallelSettings()), LAYOUTS[1]),
    ("overlapping-to-one", LAYOUTS[5], Layout("one", 1, ParallelSettings(distributed_optimizer=True))),
    ("vpp2-to-dp2", LAYOUTS[3], LAYOUTS[0]),
    ("overlapping-to-pp2-dp2", LAYOUTS[5], LARGE_LAYOUTS[1]),
]


@pytest.mark.parametrize(
    ("old", "new"),
    [pytest.param(old, new, id=name, marks=[pytest.mark.slow] * (name[-3:] == "dp2")) for name, old, new in MOVES],
)
def test_resume_on_another_layout(old, new, tmp_path):
    uninterrupted = run_on_ranks(old.ranks, train_and_save, settings_of(old.parallel), tmp_path / "model", 2, 4)[0]
    moved = run_on_ranks(new.ranks, load_and_train, settings_of(new.parallel), tmp_path / "model", 2, 4)[0]
    assert moved == [pytest.approx(expected, rel=1e-5) for expected in uninterrupted]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    run_on_ranks(1, train_and_save, settings_of(), directory, 1, 1)
    return directory


def test_loading_into_a_run_that_has_gone_on_winds_it_back(checkpoint):
    def wind_back():
        run = Run(settings_of())
        first = run.train(0, 1)[0]
        ahead = run.train(1, 3)[1:]
        load_model(checkpoint, run.chunks, run.optimizer, run.scheduler)
        return first, ahead, run.train(1, 3)[3:]

    _, ahead, again = run_on_ranks(1, wind_back)[0]
    assert again == ahead


def message_of_loading(settings, directory):
    run = Run(settings)
    with pytest.raises(CheckpointError) as raised:
        load_model(directory, run.chunks, run.optimizer, run.scheduler)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": ParallelSettings(distributed_optimizer=True)}, "distributed_optimizer: false"),
        ({"hidden_size": 64}, "could not be loaded"),
        ({"num_layers": 8}, "could not be loaded"),
    ],
    ids=["sharding", "width", "depth"],
)
def test_the_checkpoint_of_another_run_is_refused_on_every_rank(changes, message, checkpoint):
    for told in run_on_ranks(2, message_of_loading, settings_of(**changes), checkpoint):
        assert message in told
        assert str(checkpoint) in told


def test_a_checkpoint_that_lacks_files_is_refused_on_every_rank(checkpoint, tmp_path):
    assert "no complete" in run_on_ranks(1, message_of_loading, settings_of(), tmp_path / "none")[0]
    for pattern in ("common.pt", "*.distcp"):
        damaged = tmp_path / pattern.strip("*.")
        shutil.copytree(checkpoint, damaged)
        for path in damaged.glob(pattern):
            path.write_bytes(path.read_bytes()[:100])
        for told in run_on_ranks(2, message_of_loading, settings_of(), damaged):
            assert "could not be loaded" in told


def test_too_little_space_on_one_rank_is_seen_on_every_rank_before_anything_is_written(tmp_path, monkeypatch):
    def save():
        run = Run(settings_of())
        if dist.get_rank() == 1:
            monkeypatch.setattr(model_state.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
        with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, but 10 are free \(rank 1\)"):
            save_model(tmp_path / "model", run.chunks, run.optimizer, run.scheduler, 0)
        return list((tmp_path / "model").iterdir())

    assert run_on_ranks(2, save) == [[], []]


def test_the_space_asked_for_is_that_of_the_files(checkpoint, monkeypatch):
    asked = []

    def save():
        run = Run(settings_of())
        run.train(0, 1)
        monkeypatch.setattr(model_state, "_make_room", lambda _, size: asked.append(size) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_model(checkpoint, run.chunks, run.optimizer, run.scheduler, 0)
        return asked[0]

    stored = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert run_on_ranks(1, save)[0] == pytest.approx(stored, rel=0.25)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    def save():
        run = Run(settings_of())
        with pytest.raises(CheckpointError, match="cannot be made"):
            save_model(tmp_path / "file" / "model", run.chunks, run.optimizer, run.scheduler, 0)
        return True

    assert run_on_ranks(2, save) == [True, True]


# --- the CPU layer ---


def test_the_layer_can_be_taken_off_again():
    def on_and_off():
        before = (torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device, torch.compile)
        assert cpu.install()
        during = (torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device, torch.compile)
        assert cpu.install()
        assert torch.ones(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=0).to("cuda:0").cuda().pin_memory().device.type == "cpu"
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.int64).dtype == torch.int64
        cpu.uninstall()
        assert not cpu.installed()
        after = (torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device, torch.compile)
        assert torch.ones(1).type() == "torch.FloatTensor"
        return before == after, any(old is new for old, new in zip(before, during, strict=True))

    assert run_on_ranks(1, on_and_off) == [(True, False)]


def test_the_layer_keeps_away_from_cuda(monkeypatch):
    def with_cuda():
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
from es_megatron.frameworks import cpu
cpu.install()
from tests.contract import test_megatron_model as here
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
