"""Reference models of a comparison: trained and scored once for a blend, found again, and charged.

They stand beside the blend that they are for, in a folder named after all that makes them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from es_megatron.bench.blends import apart_of
from es_megatron.bench.recipe import digest
from es_megatron.bench.runs import RUN, CaseBlend
from es_megatron.bench.spec import ReferenceModel
from es_megatron.errors import ConfigError, DataError
from es_megatron.trainer.model_settings import ModelSettings
from es_megatron.trainer.settings import load_settings

PRICE = "price.json"
COMMAND = (sys.executable, "-m", "es_megatron.cli", "reference")


@dataclass(frozen=True)
class ReferencePrice:
    """What a reference cost, nominally: a multiply-add is two operations, a backward pass two forward passes."""

    flops: float
    """Of training it and of scoring the blend with it once."""
    seconds: float
    """Of its training iterations, as measured."""
    rows: int
    """Of the blend."""


def make_reference(
    name: str, model: ReferenceModel, blend: CaseBlend, seq_length: int, text: Callable[[], Path] | None = None
) -> Path:
    """Find the losses of a reference for a blend, or make them; its run is beside them, in the folder `run`.

    Args:
        name: of the reference in its spec.
        model: what it is.
        blend: that is scored.
        seq_length: tokens of a row.
        text: makes the file of what it is trained on, where that is another blend.

    Returns:
        Folder of the losses.

    Raises:
        ConfigError: the blend sets no text aside.
        DataError: training or scoring failed.
    """
    told: dict[str, Any] = {"model": asdict(model), "blend": dict(blend.identity), "seq_length": seq_length}
    trained = text() if text else blend.file if model.text == "same" else apart_of(blend.file)
    if text:
        told["text"] = trained.parent.name  # ends in the digest of what it was made from
    folder = blend.file.parent.with_name(f"{blend.file.parent.name}-{name}-{digest(json.loads(json.dumps(told)))}")
    losses = folder / "losses"
    if (folder / PRICE).is_file():
        return losses
    if not trained.is_file():
        raise ConfigError(
            f"Reference model `{name}` must have text of its own, but the recipe sets none aside. Give the blend "
            "`set_aside: 0.1`, or the reference `text: same`."
        )
    common = ["--blend", str(blend.file)]
    overrides = [f"{key}={json.dumps(value)}" for key, value in model.settings.items()]
    train = ["train", *common, "--train-blend", str(trained), "--seq-length", str(seq_length)]
    _call([*train, "--output", str(folder / RUN), "run.progress=false", *overrides], folder)
    _call(["score", *common, "--model", str(folder / RUN), "--output", str(losses), "--micro-batch-size", "32"], folder)
    (folder / PRICE).write_text(json.dumps(asdict(_price(folder, seq_length)), indent=1) + "\n", encoding="utf-8")
    return losses


def read_price(losses: Path) -> ReferencePrice:
    """What the reference of these losses cost."""
    return ReferencePrice(**json.loads((losses.parent / PRICE).read_text(encoding="utf-8")))


def forward_flops(model: ModelSettings, vocabulary: int) -> float:
    """Operations of a forward pass over one sequence: matrices, attention and the output layer."""
    width, length = model.hidden_size, model.seq_length
    head = width // model.num_attention_heads
    attention = width * width * 2 + 2 * width * head * model.query_groups
    feed_forward = (3 if model.swiglu else 2) * width * model.ffn_size
    a_token = model.num_layers * (attention + feed_forward + length * width) + width * vocabulary
    return 2.0 * a_token * length


def _price(folder: Path, seq_length: int) -> ReferencePrice:
    settings = load_settings(folder / RUN / "settings.yaml")
    summary: Mapping[str, Any] = json.loads((folder / RUN / "summary.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / "losses" / "manifest.json").read_text(encoding="utf-8"))
    rows, forward = int(manifest["samples"]), forward_flops(settings.model, vocabulary_of(settings.data.blend))
    flops = forward * (3 * int(summary["sequences_trained"]) + rows)
    return ReferencePrice(flops, float(summary["seconds"]["step"]), rows)


def vocabulary_of(blend: Path) -> int:
    """Token ids of a blend."""
    from es_megatron.frameworks.blend_file import read_blend_file, vocabulary

    return vocabulary(blend, read_blend_file(blend))[1]


def _call(arguments: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write(ended.stdout + ended.stderr)
    if ended.returncode:
        said = next((line for line in reversed(ended.stderr.splitlines()) if "error:" in line), ended.stderr[-300:])
        raise DataError(f"`es-megatron reference {arguments[0]}` failed: {said}. {folder / 'log.txt'} has the rest.")
