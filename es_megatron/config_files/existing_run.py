"""A run that a team has already, as far as its config tells: options by Megatron-Core's names, sizes, layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from es_megatron.config_files.shell.traced import MARK, unknowns
from es_megatron.errors import ConfigError

Kind = Literal["script", "arguments", "yaml", "deepspeed"]
Options = Mapping[str, tuple[str, ...]]

UNSET = ("", "false", "none", "null", "no", "off", "~")
OFF = (*UNSET, "0")

# Names of the command line, of DeepSpeed's JSON and of other configs -> the one used here (Megatron-Core's own).
ALIASES = {
    "fp8_format": "fp8",
    "fp8_hybrid": "fp8",
    "fp8_e4m3": "fp8",
    "fp4_format": "fp4",
    "num_experts": "num_moe_experts",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "model_parallel_size": "tensor_model_parallel_size",
    "batch_size": "micro_batch_size",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "ds_sequence_parallel_size": "context_parallel_size",
    "sequence_length": "seq_length",
    "encoder_seq_length": "seq_length",
    "mock": "mock_data",
    "pipe_parallel_size": "pipeline_model_parallel_size",
    "max_steps": "train_iters",
    "data_prefix": "data_path",
    "activations_checkpoint_granularity": "recompute_granularity",
    "activations_checkpoint_num_layers": "recompute_num_layers",
}


@dataclass(frozen=True)
class ExistingRun:
    """What a config says; a size that it does not tell is None."""

    kind: Kind
    options: Options
    """By name with underscores; () for a flag without a value. Text that is not known carries marks."""
    script: str | None = None
    told_world_size: int | None = None
    assumed: Mapping[str, str] = field(default_factory=dict[str, str])
    undecided: tuple[str, ...] = ()
    notes: tuple[tuple[str, str, str], ...] = ()
    """What the reader noticed: what, why, cure."""
    refused: tuple[tuple[str, str, str], ...] = ()
    """Why its launch line cannot be changed: what, why, cure."""
    unread: tuple[str, ...] = ()
    """Variables that hold options, and are not set in the file."""
    deepspeed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The JSON, if that is what was read; or the YAML, in which DeepSpeed's blocks may stand."""

    def on(self, name: str) -> bool:
        """Whether an option is set to anything but off."""
        if name not in self.options:
            return False
        values = self.options[name]
        return not values or values[0].strip().lower() not in OFF

    def value(self, name: str) -> str | None:
        """First value of an option that is set."""
        values = self.options.get(name, ())
        return values[0] if values and values[0].strip().lower() not in UNSET else None

    def number(self, name: str) -> int | None:
        """A whole number; None if it is not given, or not known from the text.

        Raises:
            ConfigError: it is given and is something else.
        """
        value = self.value(name)
        if value is None or MARK.search(value) or value == "auto":
            return None
        try:
            return int(value.replace("_", ""))
        except ValueError:
            if re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d+", value) and float(value).is_integer():
                return int(float(value))
            flag = name if self.kind in ("yaml", "deepspeed") else "--" + name.replace("_", "-")
            raise ConfigError(f"`{flag}` must be a whole number, but is {value!r} instead. Correct it.") from None

    def share(self, name: str) -> float:
        """A number that is 0 unless given."""
        try:
            return float(self.value(name) or 0)
        except ValueError:
            return 0.0

    def size(self, name: str) -> int | None:
        """A size that is 1 unless given; None if it is given but not known."""
        return 1 if self.value(name) is None else self.number(name)

    @property
    def missing(self) -> list[str]:
        """Variables that stand in the sizes and are not known."""
        sizes = (*SIZES, "train_iters", "train_samples", "num_layers", "seq_length")
        return list(
            dict.fromkeys(name for size in sizes for text in self.options.get(size, ()) for name in unknowns(text))
        )

    @property
    def tensor(self) -> int | None:
        """Tensor-parallel size."""
        return self.size("tensor_model_parallel_size")

    @property
    def pipeline(self) -> int | None:
        """Pipeline stages."""
        return self.size("pipeline_model_parallel_size")

    @property
    def context(self) -> int | None:
        """Context-parallel size."""
        return self.size("context_parallel_size")

    @property
    def virtual(self) -> int | None:
        """Model chunks per stage; 1 without interleaving, None if not known."""
        stages = self.pipeline
        if self.on("virtual_pipeline_model_parallel_size"):
            return self.number("virtual_pipeline_model_parallel_size")
        if self.on("num_layers_per_virtual_pipeline_stage"):
            layers, chunk = self.number("num_layers"), self.number("num_layers_per_virtual_pipeline_stage")
            if layers is None or chunk is None or stages is None or layers % (stages * chunk):
                return None
            return layers // stages // chunk
        layout = self.value("pipeline_model_parallel_layout")
        if layout is not None:
            chunks = chunks_of_layout(layout)
            return None if stages is None or chunks % stages else chunks // stages
        return 1

    @property
    def micro_batch(self) -> int | None:
        """Sequences in a micro-batch."""
        return self.number("micro_batch_size")

    @property
    def data_parallel(self) -> int | None:
        """Data-parallel size; None if the world size is not known or does not divide."""
        sizes = (self.tensor, self.pipeline, self.context)
        if self.world_size is None or None in sizes:
            return self._data_parallel_of_batch()
        model = (sizes[0] or 1) * (sizes[1] or 1) * (sizes[2] or 1)
        return None if self.world_size % model else self.world_size // model

    def _data_parallel_of_batch(self) -> int | None:
        whole, micro, steps = (
            self.number("global_batch_size"),
            self.micro_batch,
            self.number("gradient_accumulation_steps"),
        )
        if self.world_size is not None or not whole or not micro or not steps or whole % (micro * steps):
            return None
        return whole // (micro * steps)

    @property
    def world_size(self) -> int | None:
        """Ranks of the run."""
        return self.told_world_size

    @property
    def meta_batch(self) -> int | None:
        """Sequences of an iteration, B; without a global batch size one micro-batch per data-parallel rank."""
        if self.value("global_batch_size") is not None:
            return self.number("global_batch_size")
        if self.micro_batch is None or self.data_parallel is None:
            return None
        return self.micro_batch * self.data_parallel * (self.number("gradient_accumulation_steps") or 1)

    @property
    def samples(self) -> int | None:
        """Samples that the run draws; without their number, as many as its tokens make."""
        if self.value("train_samples") is not None or self.value("train_iters") is not None:
            return self.number("train_samples")
        tokens, length = self.number("train_tokens"), self.number("seq_length")
        return tokens // length if tokens and length else None

    @property
    def recomputed(self) -> float:
        """Share of the layers whose forward runs again in the backward pass (full recompute), in [0, 1]."""
        method = self.value("recompute_method")
        older = self.on("checkpoint_activations") or self.on("activations_checkpoint_method")
        if self.value("recompute_granularity") != "full" and not older:
            return 0.0  # selective recompute costs little
        layers, each = self.number("num_layers"), self.number("recompute_num_layers")
        if method != "block" or layers is None or each is None:
            return 1.0
        return min(1.0, each * (self.pipeline or 1) * (self.virtual or 1) / layers)

    def replaced(self, changes: Mapping[str, str]) -> ExistingRun:
        """The same with some options as the user told them."""
        told = {canonical(name): (value,) for name, value in changes.items()}
        return dataclasses.replace(self, options={**self.options, **told})


SIZES = (
    "global_batch_size",
    "micro_batch_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)


def canonical(name: str) -> str:
    """An option's name with underscores and without dashes in front; aliases resolved."""
    name = name.lstrip("-").replace("-", "_")
    return ALIASES.get(name, name)


def parse_options(arguments: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Options of an argument list, as argparse would see them: the last one wins, `--name=value` allowed."""
    options: dict[str, tuple[str, ...]] = {}
    name = None
    for each in arguments:
        if each.startswith("--"):
            flag, equals, value = each.partition("=")
            name = canonical(flag)
            options[name] = (value,) if equals else ()
            if flag in ("--fp8-hybrid", "--fp8-e4m3"):
                options[name] = (flag.rpartition("-")[2],)
        elif name is not None:
            options[name] = (*options[name], each)
    return options


def chunks_of_layout(layout: str) -> int:
    """Number of model chunks in Megatron's `--pipeline-model-parallel-layout`, such as `E(t|)*7L`."""
    text = layout.replace(",", "").replace(" ", "")
    pattern = re.compile(r"\(([^()]*)\)(?:\*(\d+))?")
    while match := pattern.search(text):
        text = text[: match.start()] + match[1] * int(match[2] or 1) + text[match.end() :]
    return text.count("|") + 1
