"""One tiny GPT on a tiny blend, run through the real Trainer, for the tests that compare whole runs.

Runs happen in forked ranks: `run_on_ranks(2, train, settings)` gives each rank's `History`. Modules are imported here,
so that the forks share them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from es_megatron.testing import cpu

cpu.install()

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402

from es_megatron.config import build  # noqa: E402
from es_megatron.trainer.loop import Trainer  # noqa: E402
from es_megatron.trainer.model import unwrap  # noqa: E402
from es_megatron.trainer.settings import PretrainSettings, apply_override  # noqa: E402
from tests.context_helper import gather_attention  # noqa: E402

VOCABULARY = 96
T = 16
META_BATCH = 16
SIZES = {"a": 70, "b": 30, "c": 5}
"""Samples by component; the last is smaller than a meta-batch."""


def write_blend(
    folder: Path, sizes: Mapping[str, int] = SIZES, seed: int = 0, weights: Mapping[str, float] = {}
) -> Path:
    """Write components of random tokens, every one with its own share of the vocabulary, and their blend file."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for number, (name, samples) in enumerate(sizes.items()):
        write_component(folder / name, samples, seed + number)
        entries.append({"name": name, "train": name, **({"weight": weights[name]} if name in weights else {})})
    path = folder / "blend.yaml"
    path.write_text(yaml.safe_dump({"vocab_size": VOCABULARY, "components": entries}))
    return path


def write_component(prefix: Path, samples: int, seed: int) -> None:
    """Write `samples` rows of T tokens; some tokens are likelier, some rows repeat one: losses differ."""
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(VOCABULARY, 0.3))
    tokens = random.choice(VOCABULARY, samples * T + 1, p=share)
    for row in np.flatnonzero(random.random(samples) < 0.4):
        tokens[row * T : (row + 1) * T] = tokens[row * T]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def settings_of(blend: Path, directory: Path, *overrides: str) -> PretrainSettings:
    """Settings of a small run: 4 layers, B = 16, b = 4, r = 0.3; change some with `section.key=value`."""
    mapping: dict[str, Any] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": T,
            "ffn_hidden_size": 64,
            "init_std": 0.2,  # losses that differ from the first iteration on
            "vocab_multiple": 8,
        },
        "data": {"blend": str(blend)},
        "training": {
            "train_samples": 30 * META_BATCH,
            "global_batch_size": META_BATCH,
            "micro_batch_size": 1,
            "eval_samples": 0,
            "lr": 3e-3,
            "log_interval": 1000,
        },
        "run": {"directory": str(directory), "audit": True, "progress": False},
        "evolved_sampling": {
            "preset": "paper",
            "pruning": {"ratio": 0.3},
            "order": {"mask_lag": 4},
            "scorer": {"micro_batch_size": 4},
            "selection": {"max_bad_losses": 0.25},
            "seed": 7,
        },
    }
    for override in overrides:
        apply_override(mapping, override)
    return build(PretrainSettings, mapping, "the test")


@dataclass
class History:
    """What a rank saw of a run; everything is plain Python, and goes through a pipe."""

    chosen: list[list[int]] = field(default_factory=list)
    """Ids that got a backward pass, by iteration."""
    loss: list[float] = field(default_factory=list)
    """Mean loss of the meta-batch, nan where it is not known."""
    norm: list[float] = field(default_factory=list)
    """Norm of the gradients."""
    reported: list[float] = field(default_factory=list)
    """Sum of the training losses this rank reported."""
    pruned: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """Kept masks, by component and epoch."""
    place: tuple[int, int] = (0, 0)
    """Data-parallel and model-parallel rank."""
    checksum: int = 0
    """Of the score store at the end."""
    scores: tuple[bytes, bytes] = (b"", b"")
    """This rank's scores and visits."""
    weights: float = 0.0
    """Sum of the magnitudes of this rank's weights at the end."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What `Trainer.run` returned."""


Hook = Callable[[Trainer, int], None]


def nothing(trainer: Trainer, iteration: int) -> None:
    """The hook that does nothing."""


def train(settings: PretrainSettings, before_step: Hook = nothing, after: Hook = nothing) -> History:
    """Run the trainer on this rank and note what happens.

    Args:
        settings: of the run.
        before_step: called between the backward pass and the optimizer step of an iteration.
        after: called when an iteration is finished, with its number.
    """
    gather_attention(settings)
    trainer = Trainer(settings)
    history = History(place=(trainer.grid.dp_rank, trainer.grid.mp_rank))
    watch(trainer, history, before_step, after)
    history.summary = trainer.run()
    store = trainer.engine.store
    history.checksum, history.scores = store.checksum(), (store.score.tobytes(), store.visits.tobytes())
    weights = [weight.detach() for chunk in chunks_of(trainer) for weight in unwrap(chunk).parameters()]
    history.weights = float(sum(weight.double().abs().sum() for weight in weights))
    return history


def watch(trainer: Trainer, history: History, before_step: Hook, after: Hook) -> None:
    """Note every iteration of a trainer."""
    backend: Any = trainer.backend
    iterate, forward_backward, prune = backend.iterate, backend.forward_backward, trainer.engine.epochs.pruning.prune

    def watched_forward_backward(**call: Any) -> Any:
        results = forward_backward(**call)
        before_step(trainer, trainer.engine.iteration)
        return results

    def watched_iterate() -> Any:
        number = trainer.engine.iteration
        iteration = iterate()
        record = trainer.engine.last
        assert record is not None
        history.chosen.append(record.chosen.tolist())
        history.loss.append(record.meta_loss)
        history.norm.append(iteration.norm)
        history.reported.append(iteration.loss_sum)
        after(trainer, number)
        return iteration

    def watched_prune(component: int, epoch: int) -> Any:
        mask = prune(component, epoch)
        history.pruned[component, epoch] = mask.to_bool().tobytes()
        return mask

    backend.forward_backward = watched_forward_backward
    backend.iterate = watched_iterate
    trainer.engine.epochs.pruning.prune = watched_prune  # pyright: ignore[reportAttributeAccessIssue]


def audit_of(directory: Path) -> list[list[int]]:
    """Chosen ids by iteration, as `audit.jsonl` has them; the lines must be those of iterations 0, 1, 2, ..."""
    lines = [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    return [line["chosen"] for line in lines]


def chunks_of(trainer: Trainer) -> list[Any]:
    """Model chunks of this rank."""
    backend: Any = trainer.backend
    return backend.chunks


def main_gradients(chunks: list[Any]) -> torch.Tensor:
    """Gradients that the optimizer is about to see, of all buffers of this rank, flat."""
    return torch.cat([buffer.grad_data.clone().flatten() for chunk in chunks for buffer in chunk.buffers])
