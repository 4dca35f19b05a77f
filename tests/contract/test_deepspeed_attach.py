"""`attach` on a `DeepSpeedEngine` of one's own: a model that is not Megatron's, settings from the JSON, checkpoints."""

import importlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from es_megatron.checkpoint import disk
from es_megatron.checks.deepspeed_config import REMOVED
from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import CheckpointError, ConfigError, DataError, LossError
from es_megatron.frameworks.deepspeed_common import check_engine, mean_loss, newest_tag, prepare
from es_megatron.frameworks.deepspeed_engine import attach, logits_token_losses
from es_megatron.frameworks.deepspeed_pipe import attach as attach_pipe
from tests.es_config import es_config
from tests.ranks_helper import run_on_ranks

deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: install es_megatron[deepspeed]")

VOCABULARY, T, B, MICRO = 23, 8, 16, 2
MANIFEST = Manifest((Component("a", "", 40, 40.0, "x"), Component("b", "", 12, 12.0, "y")), T)
SAMPLES = 12 * B
SECONDS = 200
"""Time-out of a test's ranks; they take a few seconds on an idle machine."""
EVOLVED = {"preset": "paper", "keep_ratio": 0.5, "pruning_ratio": 0.25, "mask_lag": 2, "anneal": 0.1, "seed": 3}

pytestmark = pytest.mark.timeout(2 * SECONDS + 20)


class Rows:
    """Random tokens and masks, a pure function of the id."""

    def __getitem__(self, sample_id):
        random = np.random.default_rng(sample_id)
        tokens = torch.from_numpy(random.integers(0, VOCABULARY, T + 1))
        mask = torch.from_numpy((random.random(T) < 0.7).astype(np.float32))
        mask[0] = 1.0
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask, "position_ids": torch.arange(T)}


def model_of():
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, 16),
        torch.nn.Linear(16, 32),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(32, VOCABULARY),
    )


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def json_of(stage=1, evolved=EVOLVED, **more):
    return {
        "train_batch_size": B,
        "train_micro_batch_size_per_gpu": MICRO,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1 << 40,
        **({} if evolved is None else {"evolved_sampling": evolved}),
        **more,
    }


def engine_of(settings):
    """A DeepSpeed engine in this rank's process group, as a user's script makes it."""
    if not deepspeed.comm.is_initialized():
        prepare()
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    model = model_of()
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings, dist_init_required=False)[
        0
    ]


def attached(settings, **options):
    return attach(
        engine_of(settings), MANIFEST, Rows(), train_samples=SAMPLES, token_losses=logits_token_losses, **options
    )


def weights_of(engine):
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return torch.cat([parameter.detach().float().flatten() for parameter in parameters]).clone()


def watch(sampling):
    """Note the micro-batches that are trained on, by iteration."""
    seen, train, micro_batches = [], sampling.train, sampling._micro_batches

    def watched(work):
        seen.append([])

        def noting(positions, size):
            seen[-1].extend(micro_batches(positions, size))
            return micro_batches(positions, size)

        sampling._micro_batches = noting
        try:
            return train(work)
        finally:
            sampling._micro_batches = micro_batches

    sampling.train = watched
    return seen


def train_plainly(iterations, *, per_token):
    """The same optimizer steps with torch alone, each rank on its own micro-batches."""
    model = model_of()
    optimizer = optimizer_of(model)
    torch.manual_seed(100 + dist.get_rank())
    model.train()
    for batches in iterations:
        tokens = torch.tensor(float(sum(batch["loss_mask"].sum() for batch in batches)))
        dist.all_reduce(tokens)
        optimizer.zero_grad()
        for batch in batches:
            losses = logits_token_losses(model, batch)
            if per_token:
                (losses * batch["loss_mask"]).sum().mul(dist.get_world_size() / tokens).backward()
            else:
                (mean_loss(losses, batch["loss_mask"]) / len(batches)).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("ranks", "stage", "more", "per_token"),
    [
        (1, 0, {}, False),
        (2, 0, {}, True),
        (2, 1, {}, False),
        (2, 2, {"managed_gradient_accumulation": False}, False),
        pytest.param(2, 2, {}, True, marks=pytest.mark.slow),
        pytest.param(2, 3, {}, False, marks=pytest.mark.slow),
    ],
)
def test_it_trains_as_torch_does_on_the_chosen_rows_and_steps_once_a_meta_batch(ranks, stage, more, per_token):
    def body():
        sampling = attached(json_of(stage, **more), per_token=per_token)
        seen = watch(sampling)
        torch.manual_seed(100 + dist.get_rank())  # for dropout: scoring must not draw
        while not sampling.engine.done:
            sampling.step()
        engine = sampling.deepspeed
        assert engine.global_steps == sampling.engine.iteration == len(seen)
        assert engine.train_batch_size() == B
        assert {len(batches) for batches in seen} == {B // MICRO // ranks, B // MICRO // ranks // 2}
        difference = (weights_of(engine) - train_plainly(seen, per_token=per_token)).abs().max()
        assert float(difference) < 2e-6
        return True

    assert all(run_on_ranks(ranks, body, timeout=SECONDS))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_never_reaches_the_weights_of_a_run_that_goes_on(stage):
    def spoiled(engine, batch):
        losses = logits_token_losses(engine, batch)
        return losses * float("nan") if torch.is_grad_enabled() and engine.global_steps == 1 else losses

    def body():
        sampling = attach(engine_of(json_of(stage)), MANIFEST, Rows(), train_samples=SAMPLES, token_losses=spoiled)
        sampling.step()
        before, scores = weights_of(sampling.deepspeed), sampling.engine.store.score.copy()
        if stage == 0:  # DeepSpeed does not look
            with pytest.raises(LossError, match="not finite, and DeepSpeed has applied it"):
                sampling.step()
            return True
        sampling.step()
        assert torch.equal(weights_of(sampling.deepspeed), before)
        assert sampling.deepspeed.skipped_steps == 1
        return bool((sampling.engine.store.score == scores).all())

    assert run_on_ranks(2, body, timeout=SECONDS) == [True, True]


def test_bf16_with_zero_trains():
    def body():
        sampling = attached(json_of(2, bf16={"enabled": True}))
        losses = [sampling.step() for _ in range(4)]
        return all(np.isfinite(losses))

    assert run_on_ranks(2, body, timeout=SECONDS) == [True, True]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_checkpoint_carries_the_es_state_before_latest_names_it(stage, tmp_path, monkeypatch):
    order = []
    replace = disk.replace_file

    def watched(path, content):
        order.append((path.name, (tmp_path / content.decode() / "es_state" / "manifest.json").exists()))
        replace(path, content)

    monkeypatch.setattr(disk, "replace_file", watched)

    def train():
        sampling = attached(json_of(stage))
        for _ in range(6):
            sampling.step()
        sampling.deepspeed.save_checkpoint(str(tmp_path), client_state={"mine": 1})
        random = torch.get_rng_state()
        chosen = []
        while not sampling.engine.done:
            sampling.step()
            chosen.append(sampling.engine.last.chosen.tolist())
        return list(order), random, chosen, weights_of(sampling.deepspeed)

    def go_on(states):
        sampling = attached(json_of(stage))
        path, state = sampling.deepspeed.load_checkpoint(str(tmp_path))
        assert state["mine"] == 1
        assert sampling.engine.iteration == 6
        torch.set_rng_state(states[dist.get_rank()])
        chosen = []
        while not sampling.engine.done:
            sampling.step()
            chosen.append(sampling.engine.last.chosen.tolist())
        return path, chosen, weights_of(sampling.deepspeed)

    first = run_on_ranks(2, train, timeout=SECONDS)
    assert first[0][0] == [("latest", True)]
    assert (tmp_path / "latest").read_text() == "global_step6"
    again = run_on_ranks(2, go_on, [each[1] for each in first], timeout=SECONDS)
    for (_, _, chosen, weights), (path, chosen_again, weights_again) in zip(first, again, strict=True):
        assert "global_step6" in path
        assert chosen_again == chosen
        assert torch.equal(weights, weights_again)


@pytest.mark.parametrize("spoiled", ["deleted", "folder", "outside"])
def test_latest_that_names_nothing_falls_back_to_the_newest_tag(spoiled, tmp_path):
    def body():
        sampling = attached(json_of(1))
        for _ in range(4):
            sampling.step()
            sampling.deepspeed.save_checkpoint(str(tmp_path), tag=f"after{sampling.engine.iteration}")
        if dist.get_rank() == 0:
            if spoiled == "deleted":
                shutil.rmtree(tmp_path / "after4")
            else:
                (tmp_path / "latest").unlink()
                (tmp_path / "latest").mkdir() if spoiled == "folder" else (tmp_path / "latest").write_text("../after4")
        dist.barrier()
        sampling = attached(json_of(1))
        path, _ = sampling.deepspeed.load_checkpoint(str(tmp_path))
        return path, sampling.engine.iteration

    expected = 3 if spoiled == "deleted" else 4
    for path, iteration in run_on_ranks(2, body, timeout=SECONDS):
        assert f"after{expected}" in path
        assert iteration == expected


def test_latest_that_names_nothing_where_nothing_is_left_is_refused(tmp_path):
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match=r"latest names 'global_step7', which is missing, and no other tag"):
        newest_tag(tmp_path, universal=False)


class Own:
    """What a user may have in their client state."""


def test_a_class_of_the_user_is_loaded_once_they_allow_it(tmp_path):
    def body():
        sampling = attached(json_of(1))
        sampling.step()
        sampling.deepspeed.save_checkpoint(str(tmp_path), tag="mine", client_state={"own": Own()})
        with pytest.raises(CheckpointError, match=r"model_states\.pt must hold data alone, but asks for `.*Own`"):
            sampling.deepspeed.load_checkpoint(str(tmp_path))
        with torch.serialization.safe_globals([Own]):
            _, state = sampling.deepspeed.load_checkpoint(str(tmp_path))
        return isinstance(state["own"], Own)

    assert run_on_ranks(2, body, timeout=SECONDS) == [True, True]


def test_a_checkpoint_without_es_state_is_refused_unless_asked_for(tmp_path):
    def body():
        sampling = attached(json_of(1))
        sampling.detach()
        sampling.deepspeed.save_checkpoint(str(tmp_path), tag="plain")
        assert not (tmp_path / "plain" / "es_state").exists()
        sampling = attached(json_of(1))
        with pytest.raises(CheckpointError, match=r"holds no `es_state`.*es_state=False"):
            sampling.deepspeed.load_checkpoint(str(tmp_path))
        assert sampling.deepspeed.load_checkpoint(str(tmp_path), es_state=False)[0] is not None
        return sampling.engine.iteration

    assert run_on_ranks(2, body, timeout=SECONDS) == [0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (json_of(evolved=None), r'must have a block `"evolved_sampling"'),
        (json_of(evolved={"keep_ration": 0.5}), "Unknown key `keep_ration`.*Did you mean `selection.keep_ratio`"),
        (json_of(evolved={"keep_ratio": 2.0}), r"`selection.keep_ratio` must be in \(0, 1\]"),
        (json_of(evolved={"keep_ratio": 0.2}), "`selection.keep_ratio` times the meta-batch must be a multiple of 2"),
        (json_of(evolved={**EVOLVED, "scoring_micro_batch_size": 5}), r"must divide a rank's 16.*\[1, 2, 4, 8, 16\]"),
        (json_of(0, bf16={"enabled": True}), r"must be 1 or more with bf16 and Adam"),
        (
            json_of(evolved={"scorer": {"kind": "fresh", "overlap": "merged"}}),
            "`scorer.overlap` must be `none` without a `PipelineEngine`",
        ),
    ],
    ids=["no-block", "unknown-key", "range", "indivisible", "scoring-size", "bf16-zero0", "merged-without-stages"],
)
def test_what_cannot_work_is_refused_before_the_first_iteration(settings, message):
    def body():
        with pytest.raises(ConfigError, match=message):
            attached(settings)
        return True

    assert run_on_ranks(1, body, timeout=SECONDS) == [True]


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        ({"curriculum_learning_enabled": lambda: True}, "curriculum_learning"),
        ({"random_ltd_enabled": lambda: True}, "random_ltd"),
        (
            {
                "_config": SimpleNamespace(
                    _param_dict={"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True}}}}
                ),
                "curriculum_learning_enabled": lambda: True,
            },
            "data_efficiency",
        ),
        (
            {"_config": SimpleNamespace(_param_dict={"progressive_layer_drop": {"enabled": True}})},
            "progressive_layer_drop",
        ),
        (
            {
                "_config": SimpleNamespace(
                    _param_dict={
                        "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}
                    }
                )
            },
            "compression_training",
        ),
        ({"has_moe_layers": True}, "moe_layers"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_a_scoring_pass_would_get_wrong_are_refused(feature, name):
    usual = {
        "bfloat16_enabled": lambda: False,
        "curriculum_learning_enabled": lambda: False,
        "random_ltd_enabled": lambda: False,
        "has_moe_layers": False,
        "sequence_parallel_size": 1,
        "_config": SimpleNamespace(_param_dict={"autotuning": None, "hybrid_engine": {"enabled": False}}),
    }
    check_engine(SimpleNamespace(**usual), es_config(preset="paper"))
    engine = SimpleNamespace(**{**usual, **feature})
    if name not in ("sequence_parallel_size", "data_efficiency"):  # whatever the arm, the order is ours
        check_engine(engine, es_config(preset="paper", arm="plain"))
    with pytest.raises(ConfigError, match=f"`{name}` must be (off|1) (with|where) .* [Ss]witch it off"):
        check_engine(engine, es_config(preset="paper"))


def test_keys_that_deepspeed_refuses_are_known():
    removed = getattr(importlib.import_module("deepspeed.runtime.config"), "_REMOVED_TOP_LEVEL_CONFIG_KEYS", None)
    if removed is None:
        pytest.skip("this DeepSpeed still takes them")
    assert set(removed) <= set(REMOVED)


def test_settings_may_be_a_json_file_or_passed(tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(json_of(1)))

    def body():
        from_file = attached(str(path)).engine.config
        given = attached(json_of(1, evolved=None), config=es_config(**EVOLVED)).engine.config
        return from_file == given

    assert run_on_ranks(1, body, timeout=SECONDS) == [True]


def test_losses_of_another_shape_are_refused_before_anything_is_trained():
    def mean_of(engine, batch):
        return logits_token_losses(engine, batch).mean()

    def asking(engine, batch):
        return logits_token_losses(engine, batch) * batch["weights"]

    def body():
        told = []
        for wrong, kind in ((mean_of, ConfigError), (asking, DataError)):
            sampling = attach(engine_of(json_of(1)), MANIFEST, Rows(), train_samples=SAMPLES, token_losses=wrong)
            before = weights_of(sampling.deepspeed)
            with pytest.raises(kind) as raised:
                sampling.step()
            assert torch.equal(weights_of(sampling.deepspeed), before)
            told.append(str(raised.value))
        return told

    told = run_on_ranks(2, body, timeout=SECONDS)
    assert told[0] == told[1]
    assert told[0][0].startswith(
        "`token_losses` must give the loss of each token, a tensor [B, T] = [2, 8], but gives []"
    )
    assert "asks a micro-batch for `weights`, but samples have ['labels', 'loss_mask'" in told[0][1]


def test_a_pipeline_refuses_losses_without_their_mask():
    from deepspeed.pipe import LayerSpec, PipelineModule

    def body():
        engine_of(json_of(1))  # joins the process group
        for given, part in (
            (lambda losses, mask: losses, "but gives"),
            (lambda losses, mask: (losses[0], mask), "[8]"),
        ):

            def token_losses(logits, labels, given=given):
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[0].flatten(), reduction="none"
                ).view(labels[0].shape)
                return given(losses, labels[1])

            layers = [LayerSpec(torch.nn.Embedding, VOCABULARY, 16), LayerSpec(torch.nn.Linear, 16, VOCABULARY)]
            network = PipelineModule(layers=layers, num_stages=1, loss_fn=lambda *_: None)
            sampling = attach_pipe(
                deepspeed.initialize(
                    model=network, optimizer=optimizer_of(network), config=json_of(1), dist_init_required=False
                )[0],
                MANIFEST,
                Rows(),
                train_samples=SAMPLES,
                token_losses=token_losses,
                pack=lambda batch: (batch["tokens"], (batch["labels"], batch["loss_mask"])),
            )
            with pytest.raises(ConfigError, match="`token_losses` must give the loss") as raised:
                sampling.step()
            assert part in str(raised.value)
        return True

    assert run_on_ranks(1, body, timeout=SECONDS) == [True]
