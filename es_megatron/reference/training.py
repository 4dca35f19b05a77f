"""Train a small model for reference losses: the plain arm of the trainer, on named texts or on the blend itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from es_megatron.config import build
from es_megatron.config.names import grouped
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.blend_file import read_blend_file
from es_megatron.prepare.command import PrepareSettings, prepare
from es_megatron.scoring import PLAIN
from es_megatron.trainer.settings import PretrainSettings, apply_override

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4},
    "training": {
        "passes": 1,
        "global_batch_size": 32,
        "micro_batch_size": 4,
        "lr": 3e-3,
        "min_lr": 0.0,
        "eval_interval": 0,
    },
    "evolved_sampling": {"arm": PLAIN},
}
"""A reference, where nothing else is said: small, one pass, and the rate that decays to 0."""


def reference_settings(
    blend: Path, output: Path, seq_length: int, config: Path | None, overrides: Sequence[str]
) -> PretrainSettings:
    """Settings of a reference's run.

    Args:
        blend: that it trains on.
        output: folder of the run.
        seq_length: tokens of a row of the blend it will score.
        config: sections that win over `DEFAULTS`, or nothing.
        overrides: `section.key=value`, which win over those.

    Raises:
        ConfigError: what cannot work.
    """
    sections = {name: dict(values) for name, values in DEFAULTS.items()}
    if config is not None:
        try:
            given: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"Settings `{config}` cannot be read: {error}. Check the path.") from error
        for name, values in grouped(given, str(config)).items():
            sections[name] = {**sections.get(name, {}), **values}
    sections["model"]["seq_length"] = seq_length
    sections.setdefault("data", {})["blend"] = str(blend)
    sections.setdefault("run", {})["directory"] = str(output)
    for override in overrides:
        apply_override(sections, override)
    return build(PretrainSettings, sections, "settings of the reference")


def prepare_texts(texts: Sequence[str], blend: Path, output: Path, say: Callable[[str], None]) -> Path:
    """Tokenise named texts as a blend's are, into a blend of their own; one that is there is taken.

    Args:
        texts: NAME=PATH each, as `es-megatron prepare --component` takes them.
        blend: whose tokenizer is used, and whose held-out documents are looked for.
        output: folder that gets a `data` folder.
        say: is told what was made.

    Raises:
        DataError: the blend has no tokenizer.
    """
    folder = output / "data"
    if (folder / "blend.yaml").is_file():
        return folder / "blend.yaml"
    tokenizer = read_blend_file(blend).tokenizer
    if tokenizer is None:
        raise DataError(
            f"`{blend}` must name its `tokenizer`, so that texts for the reference get the same tokens, but has "
            "`vocab_size` alone. Add it, or train the reference on a blend of your own (`--train-blend`)."
        )
    output.mkdir(parents=True, exist_ok=True)
    settings = PrepareSettings(
        output=folder, components=tuple(texts), tokenizer=blend.parent / tokenizer, validation_share=0.02, workers=1
    )
    prepare(settings)
    say(f"{folder}: texts of the reference, with the tokenizer of {blend}")
    return folder / "blend.yaml"
