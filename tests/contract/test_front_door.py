"""`from es_megatron import attach`: one verb for every framework, and nothing imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import es_megatron
from es_megatron import ConfigError, EvolvedSamplingConfig, attach
from es_megatron.trainer.model import initialize
from es_megatron.trainer.optimizer import zero_gradients
from tests.contract.test_gradients import settings_for
from tests.ranks_helper import run_on_ranks
from tests.small_loop import MANIFEST, Loop, RandomRows

ITERATIONS = 6

# What stands in for machines without the frameworks: an importer that refuses them.
BARE = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
import es_megatron
assert not {"torch", "numpy"} & set(sys.modules), "importing the package imports nothing heavy"
for name in es_megatron.__all__:
    getattr(es_megatron, name)
from es_megatron import attach
try:
    attach(object(), None, train_samples=1)
except es_megatron.ConfigError as error:
    print(error)
"""


def test_the_front_door_opens_without_megatron_and_deepspeed() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("`attach` must be given a DeepSpeed engine, or a model of Megatron-Core")
    assert set(es_megatron.__all__) <= set(dir(es_megatron))
    with pytest.raises(AttributeError, match="has no attribute `atach`"):
        es_megatron.atach  # noqa: B018


BLEND = SimpleNamespace(manifest=MANIFEST, rows=RandomRows())


def evolve_by_hand(overrides: tuple[str, ...]) -> list[list[int]]:
    settings = settings_for(*overrides)
    initialize(settings)
    loop = Loop(settings, BLEND.rows)
    assert loop.sampling is not None
    chosen: list[list[int]] = []
    for _ in range(ITERATIONS):
        zero_gradients(loop.chunks, loop.optimizer)
        loop.run_passes()
        loop.sampling.finish(loop.optimizer.step()[0])
        chosen.append(chosen_of(loop.sampling))
    return chosen


def chosen_of(es: Any) -> list[int]:
    return es.engine.last.chosen.tolist()


def evolve_through_the_front_door(overrides: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """The same with the optimizer handed over; half-way the state goes to the disk and into another handle."""
    settings = settings_for(*overrides)
    initialize(settings)
    loop = Loop(settings, None)
    sizes = {"global_batch_size": settings.training.global_batch_size, "micro_batch_size": 1}
    more = {"config": settings.evolved_sampling, "train_samples": settings.training.train_samples or 0, **sizes}
    own = loop.optimizer.step
    chosen: list[list[int]] = []
    for half in range(2):
        es = attach(loop.chunks, BLEND, optimizer=loop.optimizer, **more)
        if half:
            assert es.load(folder / "es_state") == {"note": 3}
        loop.sampling = es
        for _ in range(ITERATIONS // 2):
            zero_gradients(loop.chunks, loop.optimizer)
            loop.run_passes()
            loop.optimizer.step()
            chosen.append(chosen_of(es))
        assert es.iteration == es.state_dict()["iteration"] == len(chosen)
        assert not es.done
        assert es.plan.kept == 4
        es.save(folder / "es_state", note=3)
        es.detach()
        assert loop.optimizer.step == own
    return {"chosen": chosen}


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(1, ()), (2, ()), (2, ("parallel.pipeline=2",))], ids=["one", "dp2", "pp2"]
)
def test_a_loop_around_megatron_core_that_hands_its_optimizer_over(
    ranks: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    expected = run_on_ranks(ranks, evolve_by_hand, overrides)
    found = run_on_ranks(ranks, evolve_through_the_front_door, overrides, tmp_path)
    assert [each["chosen"] for each in found] == expected
    assert len({tuple(ids) for ids in expected[0]}) == ITERATIONS


def test_sizes_that_are_missing_are_named() -> None:
    def body() -> None:
        settings = settings_for()
        initialize(settings)
        with pytest.raises(ConfigError, match="`global_batch_size` must be given"):
            attach(Loop(settings, None).chunks, BLEND, train_samples=64)

    run_on_ranks(1, body)


def test_a_step_of_torchs_optimizer_closes_the_iteration_too() -> None:
    from es_megatron.frameworks.megatron_core import MegatronCoreSampling

    told: list[bool] = []
    engine: Any = SimpleNamespace(finish=told.append)
    sampling = MegatronCoreSampling(engine, None, 0, lambda _: torch.ones(1))
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps `step` itself
    own = vars(optimizer)["step"]
    sampling.finish_with(optimizer)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert told == [True]
    sampling.detach()
    assert vars(optimizer)["step"] is own


@pytest.mark.parametrize("kind", ["engine", "pipeline"])
def test_deepspeed_engines(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: install es_megatron[deepspeed]")
    from tests.contract import test_deepspeed_attach as helper

    blend = SimpleNamespace(manifest=helper.MANIFEST, rows=helper.Rows())

    def through_the_front_door() -> list[Any]:
        es = attach(
            helper.engine_of(helper.json_of(1)),
            blend,
            train_samples=helper.SAMPLES,
            token_losses=helper.logits_token_losses,
        )
        chosen = []
        while not es.done:
            es.step()
            chosen.append(chosen_of(es))
        es.detach()
        return chosen

    def by_its_own_module() -> list[Any]:
        sampling = helper.attached(helper.json_of(1))
        chosen = []
        while not sampling.engine.done:
            sampling.step()
            chosen.append(chosen_of(sampling))
        return chosen

    if kind == "pipeline":
        run_on_ranks(1, pipeline_engine)
        return
    assert run_on_ranks(1, through_the_front_door) == run_on_ranks(1, by_its_own_module)


def pipeline_engine() -> None:
    """A `PipelineEngine` is known by its class, and gets the handle for pipelines."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from es_megatron.frameworks.deepspeed_common import prepare
    from es_megatron.frameworks.deepspeed_pipe import PipeSampling
    from tests.contract import test_deepspeed_attach as helper

    prepare()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    layers = list(helper.model_of())
    net = PipelineModule(layers=layers, num_stages=1, loss_fn=lambda outputs, labels: outputs.float().mean())
    settings = helper.json_of(1)
    engine = deepspeed.initialize(
        model=net, optimizer=helper.optimizer_of(net), config=settings, dist_init_required=False
    )[0]

    def token_losses(logits_BTV: torch.Tensor, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels_BT, mask_BT = labels
        losses = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none")
        return losses.view(labels_BT.shape), mask_BT

    def pack(batch: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        return batch["tokens"], (batch["labels"], batch["loss_mask"])

    blend = SimpleNamespace(manifest=helper.MANIFEST, rows=helper.Rows())
    es = attach(engine, blend, train_samples=helper.SAMPLES, token_losses=token_losses, pack=pack)
    assert isinstance(es, PipeSampling)
    assert isinstance(es.engine.config, EvolvedSamplingConfig)
    es.step()
    assert es.iteration == 1
    assert len(es.engine.last.chosen) in (helper.B, helper.B // 2)
