"""Groups of settings, each checked once at construction; symbols are the paper's (arXiv 2509.23461)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from es_megatron.config.fields import Spec, check_fields
from es_megatron.errors import ConfigError

Kind = Literal["fresh", "history", "every-k", "prefix", "external"]
Fallback = Literal["off", "uniform", "plain"]
Granularity = Literal["sample", "microbatch"]
Correction = Literal["paper", "debiased"]
Mixture = Literal["kept", "free"]
Precision = Literal["float32", "float16"]
Overlap = Literal["none", "merged"]


@dataclass(frozen=True)
class SelectionSettings:
    """How b of the B sequences of a meta-batch are chosen."""

    keep_ratio: Annotated[float, Spec("in (0, 1]", "share of the meta-batch")] = 0.5
    """Share of the meta-batch that gets a backward pass, in (0, 1] (b/B). b must come out a multiple of micro-batch
    size times data-parallel size. Preset `paper`: 0.25."""

    policy: str = "es"
    """How a meta-batch is chosen from: `es`, `reducible` (by what a loss says beyond that of a reference, which
    `reference.folder` names), `uniform`, `loss`, `order`, `big-loss`, `small-loss`, `grad-norm`, `adaboost`,
    `coreset-1`, `coreset-2`, `adaselection`, or the name of an entry point in `es_megatron.policies`."""

    options: Mapping[str, Any] | None = None
    """Options of the policy, by name (docs/policies.md has them). None: `power: 8` for policy `es`, else nothing.
    Preset `paper`: nothing."""

    mixture: Mixture | None = None
    """`kept`: every component is trained in the proportion that it was drawn in, and sequences compete with those of
    their component alone. `free`: they compete over the whole meta-batch, as published, which trains more of the
    components whose weights are higher. None: `kept`; `free` with `granularity: microbatch` and with
    `inclusion_weights`, which need it. Preset `paper`: `free`."""

    anneal: Annotated[float, Spec("in [0, 0.5]", "share of the iterations")] = 0.05
    """Share of iterations at each end that train on the whole meta-batch, in [0, 0.5] (E_a / E)."""

    parts: Annotated[int, Spec(">= 1", "parts")] = 1
    """Parts of consecutive positions that a meta-batch is cut into, >= 1, to choose the same number from each: as if
    that many smaller meta-batches had filled one batch for the optimizer (AdaSelection, Algorithm 2)."""

    granularity: Granularity = "sample"
    """`sample` chooses sequences and packs them into new micro-batches; `microbatch` chooses whole groups of
    micro-batch-size consecutive positions by their mean weight."""

    weight_floor: Annotated[float, Spec("in [0, 1]", "share of the mean weight")] = 0.0
    """Lower bound of a weight as a share of the mean weight, in [0, 1]; above 0 every sample stays reachable."""

    inclusion_weights: bool = False
    """Weight chosen losses by one over their inclusion probability, so that the gradient is unbiased."""

    max_bad_losses: Annotated[float, Spec("in [0, 1]", "share of the meta-batch")] = 0.1
    """Share of a meta-batch that may have a non-finite loss, in [0, 1], before the run stops."""

    budget: Annotated[float | None, Spec("in (0, 1]", "share of the plain run's cost")] = None
    """What the run may cost, as a share of the plain run's forward and backward work (backward = 2 forward), in (0, 1].
    `keep_ratio` is not read: as many sequences are chosen as reach it, and the run is cut to it; `plain` ignores it."""

    def __post_init__(self) -> None:
        """Check every field and their combinations."""
        check_fields(self, "selection.")
        if self.mixture == "kept" and self.crosses_components:
            raise ConfigError(
                f"`selection.mixture` must be `free` with `{self.crosses_components}`, which chooses across "
                "components, but is `kept` instead. Leave one of the two out."
            )
        if self.granularity == "microbatch" and (self.inclusion_weights or self.parts > 1):
            name = "inclusion_weights" if self.inclusion_weights else "parts"
            raise ConfigError(
                f"`selection.{name}` must be off with `granularity: microbatch`: it is about single sequences. "
                "Use `granularity: sample`."
            )

    @property
    def crosses_components(self) -> str | None:
        """The setting that needs `mixture: free`, if one is on."""
        if self.granularity == "microbatch":
            return "granularity: microbatch"
        return "inclusion_weights" if self.inclusion_weights else None


@dataclass(frozen=True)
class ScorerSettings:
    """Where the losses come from that a meta-batch is chosen by."""

    kind: Kind = "history"
    """`fresh` (a forward pass over every meta-batch, the paper), `history` (no extra pass: the stored scores choose,
    training forwards update them), `every-k` (fresh on every `every`-th iteration, history between), `prefix` (a
    forward pass over the first `prefix_share` of each sequence's tokens), `external` (the initial scores choose, and
    never change). Preset `paper`: `fresh`."""

    every: Annotated[int, Spec(">= 1", "iterations")] = 4
    """Period of the fresh passes of `every-k`, in iterations, >= 1."""

    prefix_share: Annotated[float, Spec("in (0, 1]", "share of the tokens")] = 0.125
    """Share of a sequence's tokens that the `prefix` scorer reads, in (0, 1], rounded up to a multiple of 8 tokens."""

    micro_batch_size: Annotated[int | None, Spec(">= 1", "sequences")] = None
    """Sequences in a micro-batch of the scoring pass, which needs no activations kept; None: the training size."""

    cost: Annotated[float | None, Spec("> 0", "forward passes")] = None
    """What a scoring pass over a whole sequence costs in forward passes, where training on it costs 3, above 0; as
    measured, that is 3 * scoring / (forward + backward) seconds. Budget and guard count with it. None: 1."""

    overlap: Overlap = "none"
    """`none`: score, then train. `merged`: the next meta-batch is scored in the same pass over the pipeline that trains
    this one, where stages would be idle, so that scores are those of the weights one step before
    (docs/merged-scoring.md). For `fresh` and `prefix`."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "scorer.")
        if self.overlap == "merged" and self.kind not in ("fresh", "prefix"):
            raise ConfigError(
                f"`scorer.overlap` must be `none` with `scorer: {self.kind}`, which does not score every meta-batch, "
                "but is `merged` instead. Leave it out, or use `fresh` or `prefix`."
            )


@dataclass(frozen=True)
class ScoreSettings:
    """How scores evolve, where they start, and where they are kept."""

    beta1: Annotated[float, Spec("in [0, 1]")] = 0.2
    """Share of the old score in the sampling weight, in [0, 1] (beta_1 of eq. 2.5)."""

    beta2: Annotated[float | None, Spec("in [0, 1)")] = None
    """Decay of the score, in [0, 1) (beta_2 of eq. 2.5). None: the paper's 0.9 without pruning, 0.8 with it."""

    correction: Correction | None = None
    """`paper` uses scores as stored; `debiased` takes the start value 1/n out, (s - beta2^k/n) / (1 - beta2^k) after k
    visits, and counts unseen samples as the mean of those seen of their component (of all, if none is). None: `paper`
    for `fresh` and `prefix`, `debiased` where history chooses, since with raw scores what was never seen would hardly
    ever be chosen, and with a reference, whose losses have no start value in them."""

    initial: str | None = None
    """Folder of scores to begin with, from another run's checkpoint or made by `es-megatron scores import`; components
    are matched by name and fingerprint. Those whose samples nearly all have a score are pruned from epoch 0 on."""

    folder: str | None = None
    """Folder in which each rank maps its scores from an unnamed file (5 bytes a sample); None: in memory."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "scores.")


@dataclass(frozen=True)
class ReferenceSettings:
    """Losses of a reference model, which policy `reducible` holds losses against."""

    folder: str | None = None
    """Folder that `es-megatron reference score` made, or `es-megatron scores import` of a table of losses. Components
    are matched by name and fingerprint."""

    precision: Precision = "float32"
    """Of a reference loss in memory: `float32` is 4 bytes a sample over data-parallel ranks, `float16` 2 (it is exact
    to 0.004 nats between 4 and 8)."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "reference.")


@dataclass(frozen=True)
class PruningSettings:
    """What epochs leave out (ESWP)."""

    ratio: Annotated[float, Spec("in [0, 1)", "share of every component")] = 0.0
    """Share of every component left out of each of its pruned epochs, in [0, 1) (r). 0 is ES, above it ESWP."""

    pruner: str = "eswp"
    """What epochs keep where `ratio` is above 0: `eswp`, `random`, `infobatch`, `ucb`, `kakurenbo`, or the name of an
    entry point in `es_megatron.pruners`."""

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Options of the pruner, by name."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "pruning.")


@dataclass(frozen=True)
class OrderSettings:
    """The order of the data, and the kept masks that it reads."""

    mask_lag: Annotated[int | None, Spec(">= 1", "iterations")] = None
    """Iterations between the scores that decide an epoch's kept mask and its first draw, >= 1; at least what the data
    loader reads ahead. None: what it reads ahead, so that scores are as new as can be."""

    mask_folder: str | None = None
    """Node-local folder, such as `/dev/shm`, in which the ranks of a node share kept masks (1.15 bits a sample); None:
    each rank holds its own."""

    skip: str | None = None
    """File of rows that are never drawn, made by `es-megatron skip`; another row of the same epoch takes the place of
    each. None: none; in `es-megatron pretrain` those of `skipped.json` in `run.directory`, where it is there."""

    check_files: bool = True
    """Read the data files from end to end behind the run, and end it where one is not what the hash beside it says, or
    has token ids that the model has not."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "order.")


@dataclass(frozen=True)
class GuardSettings:
    """What a run falls back to when selection does not pay."""

    fallback: Fallback = "off"
    """`uniform` (no more scoring passes, and as many more sequences at random as they cost) or `plain` (whole
    meta-batches). Judged by the weights of `window` iterations: they must be worth more than a scoring pass costs
    (Katharopoulos & Fleuret 2018)."""

    window: Annotated[int, Spec(">= 1", "iterations")] = 50
    """Selecting iterations before the guard may judge, and of its average, >= 1."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "guard.")
