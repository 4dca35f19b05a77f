"""A Llama of Hugging Face's on DeepSpeed: by `attach`, prepared by accelerate, and in a Trainer."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch

from es_megatron import ConfigError, DataError, attach, blend_of, plan_run
from es_megatron.frameworks.deepspeed_common import prepare
from es_megatron.frameworks.deepspeed_engine import huggingface_token_losses
from tests.ranks_helper import run_on_ranks

deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: install es_megatron[deepspeed]")
transformers = pytest.importorskip("transformers", reason="not installed: install es_megatron[huggingface]")
accelerate = pytest.importorskip("accelerate", reason="not installed: install es_megatron[huggingface]")

from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments  # noqa: E402

from es_megatron.frameworks.huggingface import EvolvedTrainer  # noqa: E402

VOCABULARY, T, B, MICRO, SECONDS = 31, 8, 16, 2, 250
SAMPLES = 5 * B
EVOLVED = {"preset": "paper", "selection": {"keep_ratio": 0.5, "anneal": 0.1}, "pruning": {"ratio": 0.25}, "seed": 3}

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(2 * SECONDS + 20)


class Texts:
    """A map-style dataset: `input_ids` of T or T - 2 tokens, and labels that leave the first ones out."""

    def __init__(self, count: int, seed: int, masked: tuple[int, ...] = ()) -> None:
        self.count, self.seed, self.masked = count, seed, masked

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        random = np.random.default_rng((self.seed, index))
        tokens = random.integers(1, VOCABULARY, T - 2 * (index % 3 == 0)).tolist()
        labels = [-100] * len(tokens) if index in self.masked else [-100, *tokens[1:]]
        return {"input_ids": tokens, "labels": labels, "attention_mask": [1] * len(tokens)}


DATASETS = {"a": Texts(40, 1), "b": Texts(12, 2, masked=(0, 5, 7))}


def model_of() -> Any:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=T, **sizes))


def optimizer_of(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)  # what a Trainer makes by itself


def json_of(stage: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": B,
        "train_micro_batch_size_per_gpu": MICRO,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 1 << 40,
        "evolved_sampling": EVOLVED,
        **more,
    }


def blend() -> Any:
    return blend_of(DATASETS, T, shift_labels=True)


def start() -> None:
    if not deepspeed.comm.is_initialized():
        prepare()
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def engine_of(stage: int = 1) -> Any:
    start()
    model = model_of()
    return deepspeed.initialize(
        model=model, optimizer=optimizer_of(model), config=json_of(stage), dist_init_required=False
    )[0]


def prepared_of(stage: int = 1) -> tuple[Any, Any]:
    """Accelerate's object, and the engine that it prepares."""
    start()
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=json_of(stage, gradient_accumulation_steps=B // MICRO // 2))
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
    model = model_of()
    engine, _ = accelerator.prepare(model, optimizer_of(model))
    return accelerator, engine


def weights_of(engine: Any) -> torch.Tensor:
    return torch.cat([each.detach().float().flatten() for each in engine.module.parameters()]).clone()


def train(engine: Any, before: Any = lambda engine: None) -> tuple[list[list[int]], torch.Tensor, Any]:
    """Chosen ids, weights at the end, and the handle."""
    sampling = attach(engine, blend(), train_samples=SAMPLES, per_token=True, show_plan=False)
    chosen = []
    while not sampling.done:
        before(engine)
        assert np.isfinite(sampling.step())
        chosen.append(sampling.engine.last.chosen.tolist())
    return chosen, weights_of(engine), sampling


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    assert one[0] == other[0]
    return torch.equal(one[1], other[1])


def test_attach_prints_the_plan_and_knows_the_model(capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> Any:
        engine = engine_of()
        known = plan_run(blend(), train_samples=SAMPLES, deepspeed=json_of())
        sampling = attach(engine, blend(), train_samples=SAMPLES)
        assert sampling.plan.iterations == known.iterations
        assert sampling.token_losses is huggingface_token_losses
        sampling.step()
        return known.iterations

    iterations, other = run_on_ranks(2, body, timeout=SECONDS)
    assert iterations == other
    out = capfd.readouterr().out
    assert out.count("plan: arm es, B = 16, b = 8") == 1, "on the first rank only"
    assert f"iterations        {iterations} (plain: 5)" in out
    assert "learning rate     lr x sqrt(b/B) = lr x 0.707" in out


def test_rows_that_are_all_masked_are_counted_apart_and_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    def body() -> Any:
        with caplog.at_level(logging.WARNING):
            chosen, _, sampling = train(engine_of())
        assert sampling.totals.bad == 0
        assert sampling.totals.masked > 0
        selecting = {n for ids in chosen if len(ids) < B for n in ids}
        assert not selecting & {40, 45, 47}
        return [message for message in caplog.messages if "non-finite" in message]

    assert run_on_ranks(1, body, timeout=SECONDS) == [[]]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=slow), 1, pytest.param(2, marks=slow)])
def test_a_boundary_that_somebody_has_pinned_changes_nothing(stage: int) -> None:
    """Accelerate pins it in every `backward`; then nothing was trained, or each micro-batch was a step."""

    def body() -> Any:
        plain = train(engine_of(stage))
        for pinned in (False, True):
            found = train(engine_of(stage), lambda engine, to=pinned: engine.set_gradient_accumulation_boundary(to))
            assert same(plain, found)
            assert found[2].deepspeed._is_gradient_accumulation_boundary is pinned, "given back"
            assert found[2].deepspeed.global_steps == len(plain[0])
        return True

    assert all(run_on_ranks(2, body, timeout=SECONDS))


@pytest.mark.parametrize("pinned", [False, True])
def test_a_boundary_that_is_moved_inside_a_step_is_refused(pinned: bool) -> None:
    def moving(engine: Any, batch: Any) -> torch.Tensor:
        engine.set_gradient_accumulation_boundary(pinned)
        return huggingface_token_losses(engine, batch)

    def body() -> bool:
        sampling = attach(engine_of(), blend(), train_samples=SAMPLES, token_losses=moving, show_plan=False)
        with pytest.raises(ConfigError, match=f"must be called once for a meta-batch, but was called {8 * pinned} tim"):
            sampling.step()
        return True

    assert run_on_ranks(1, body, timeout=SECONDS) == [True]


def test_a_step_that_deepspeed_skips_is_counted_and_told(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    def spoiled(engine: Any, batch: Any) -> torch.Tensor:
        losses = huggingface_token_losses(engine, batch)
        return losses * float("inf") if torch.is_grad_enabled() and engine.global_steps == 1 else losses

    def body() -> Any:
        sampling = attach(engine_of(), blend(), train_samples=SAMPLES, token_losses=spoiled, show_plan=False)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                sampling.step()
        assert sampling.totals.skipped == 1
        sampling.deepspeed.save_checkpoint(str(tmp_path))
        again = attach(engine_of(), blend(), train_samples=SAMPLES, show_plan=False)
        again.deepspeed.load_checkpoint(str(tmp_path))
        for name in ("sequences_scored", "sequences_trained", "masked", "skipped"):
            assert getattr(again.totals, name) == getattr(sampling.totals, name) > 0
        return [message for message in caplog.messages if "skipped the optimizer's step" in message]

    told = run_on_ranks(2, body, timeout=SECONDS)
    assert [len(messages) for messages in told] == [1, 0]
    assert "of iteration 1, since a gradient is not finite" in told[0][0]
    assert "(1 of 2 iterations so far)" in told[0][0]


def test_an_engine_that_accelerate_has_prepared_trains_like_one_of_ones_own(tmp_path: Any) -> None:
    def body() -> Any:
        plain = train(engine_of())
        accelerator, engine = prepared_of()
        micro = next(iter(torch.utils.data.DataLoader(blend().rows, batch_size=MICRO)))
        loss = huggingface_token_losses(engine, micro).mean() * 0.0
        accelerator.backward(loss)  # pins the boundary: a step with gradients of 0 and the optimizer's decay
        sampling = attach(engine, blend(), train_samples=SAMPLES, per_token=True, show_plan=False)
        for _ in range(3):
            sampling.step()
        accelerator.save_state(str(tmp_path))
        chosen = []
        while not sampling.done:
            sampling.step()
            chosen.append(sampling.engine.last.chosen.tolist())
        assert engine.global_steps == 1 + sampling.iteration
        assert len(plain[0]) == sampling.iteration
        last = weights_of(engine)

        accelerator.load_state(str(tmp_path))
        assert sampling.iteration == 3
        again = []
        while not sampling.done:
            sampling.step()
            again.append(sampling.engine.last.chosen.tolist())
        return same((chosen, last), (again, weights_of(engine)))

    assert all(run_on_ranks(2, body, timeout=SECONDS))


def arguments_of(folder: Any, **more: Any) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": B // MICRO // 2,
        "save_strategy": "no",
        **more,
    }
    auto = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return TrainingArguments(
        str(folder),
        deepspeed=json_of(**auto),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        **options,
    )


def trainer_of(folder: Any, **more: Any) -> EvolvedTrainer:
    start()
    args = arguments_of(folder, **more)
    return EvolvedTrainer(model_of(), args, train_dataset=copy.copy(DATASETS), seq_length=T)


def test_a_trainer_of_hugging_face_does_what_attach_does(tmp_path: Any) -> None:
    def body() -> Any:
        plain = train(engine_of())
        trainer = trainer_of(tmp_path, max_steps=SAMPLES // B, save_strategy="steps", save_steps=3)
        assert trainer.args.max_steps == trainer.plan.iterations == len(plain[0])
        done = trainer.train()
        assert done.global_step == len(plain[0])
        assert trainer.deepspeed.global_steps == len(plain[0])
        assert trainer.sampling.done
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == len(plain[0])
        assert logged[-1]["es_sequences_trained"] == sum(map(len, plain[0]))
        torch.testing.assert_close(weights_of(trainer.deepspeed), plain[1], atol=1e-5, rtol=0)
        before = weights_of(trainer.deepspeed)

        resumed = trainer_of(tmp_path, max_steps=SAMPLES // B)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert resumed.sampling.done
        assert resumed.sampling.totals.sequences_trained == sum(map(len, plain[0]))
        torch.testing.assert_close(weights_of(resumed.deepspeed), before, atol=1e-5, rtol=0)
        return True

    assert all(run_on_ranks(2, body, timeout=SECONDS))


def test_a_trainer_refuses_what_it_would_pass_over(tmp_path: Any) -> None:
    def body() -> Any:
        start()
        model = model_of()

        def refused(message: str, kind: Any = ConfigError, args: Any = None, smoothing: float = 0, **more: Any) -> None:
            args = args or arguments_of(tmp_path, max_steps=5, label_smoothing_factor=smoothing)
            with pytest.raises(kind, match=message):
                EvolvedTrainer(model, args, **{"train_dataset": DATASETS, "seq_length": T, **more})

        refused("`train_dataset` must be given", train_dataset=None)
        refused("at most 4, the `seq_length` of the blend", DataError, seq_length=4)
        refused("`compute_loss_func` must be off", compute_loss_func=lambda *_: None)
        refused("`label_smoothing_factor` must be off", smoothing=0.1)
        model.config.output_router_logits = True
        refused("`model.config.output_router_logits` must be off")
        model.config.output_router_logits = False
        refused("must have `deepspeed=`", args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
        return True

    assert run_on_ranks(1, body, timeout=SECONDS) == [True]
