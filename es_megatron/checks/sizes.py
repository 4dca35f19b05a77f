"""Sizes of an existing run: whether they divide, what b and the scoring micro-batch become, and what is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from es_megatron.checks.findings import Finding, blocking, note, ok, refuse
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.existing_run import ExistingRun
from es_megatron.config_files.passes import Passes
from es_megatron.config_files.shell.traced import shown
from es_megatron.core.plan import Plan, Prediction, check_micro_batches, nearest, plan_run, predict
from es_megatron.core.run_sizes import Sizes
from es_megatron.data.manifest import Component, Manifest
from es_megatron.data.ramp import Ramp
from es_megatron.errors import ConfigError, LayoutError
from es_megatron.scoring import arm_of
from es_megatron.scoring.arms import prunes

RAMP = "rampup_batch_size"
LARGEST_SCORING = 4
"""Largest scoring micro-batch, in training ones: it keeps no activations, but the logits grow with it."""


@dataclass(frozen=True)
class Proposal:
    """What Evolved Sampling would do in this run."""

    config: EvolvedSamplingConfig
    passes: Passes
    plan: Plan | None = None
    prediction: Prediction | None = None

    def lines(self) -> list[str]:
        """The proposal as printed below the findings."""
        if self.plan is None or self.prediction is None:
            return ["plan: sizes are not all known, so neither b nor the saving is computed"]
        plan = self.plan
        count, saved = self.passes.count, self.prediction.saving
        scoring = self.config.scorer.micro_batch_size
        kept = f"b = {plan.kept} (keep ratio {plan.kept / plan.meta_batch:g})"
        size = "as in training" if scoring is None else scoring
        turns = f"{count:g} {'pass' if count == 1 else 'passes'} of the data ({self.passes.source})"
        selecting = self.prediction.selecting
        return [
            f"plan: B = {plan.meta_batch}, {kept}, scoring micro-batch {size}, arm {self.config.arm}",
            f"predicted saving: {saved:.1%} of the run, {selecting:.1%} while selecting, over {turns}",
        ]


def measure(run: ExistingRun) -> tuple[Sizes | None, list[Finding]]:
    """Check that the sizes divide.

    Returns:
        The sizes, None if one is missing or does not divide, and the findings.
    """
    findings = list(_layout(run))
    known = (run.meta_batch, run.micro_batch, run.data_parallel, run.pipeline, run.virtual)
    if blocking(findings):
        return None, findings
    names = ("global batch size", "micro-batch size", "data-parallel size", "pipeline size", "virtual stages")
    missing = [name for name, value in zip(names, known, strict=True) if value is None]
    if missing:
        cure = "`--world-size N`" if missing == ["data-parallel size"] else "`--set NAME=VALUE` and `--world-size N`"
        findings.append(note(", ".join(missing), "not known from the file alone, so b is not computed", f"give {cure}"))
        return None, findings
    sizes = Sizes(*(value or 1 for value in known), backward=2.0 + run.recomputed)
    findings += _batch(run, sizes)
    return (None if blocking(findings) else sizes), findings


def _layout(run: ExistingRun) -> Iterator[Finding]:
    parts = {"TP": run.tensor, "PP": run.pipeline, "CP": run.context}
    zeros = [name for name, value in parts.items() if value is not None and value < 1]
    if (
        zeros
        or (run.meta_batch is not None and run.meta_batch < 1)
        or (run.micro_batch is not None and run.micro_batch < 1)
    ):
        yield refuse("sizes", "batch and parallel sizes must be at least 1", "correct them")
        return
    length, pieces = run.number("seq_length"), 2 * (run.context or 1)
    if length is not None and pieces > 2 and length % pieces:
        yield refuse(
            f"`seq_length` {length}",
            f"context-parallel size {run.context} cuts a sequence into {pieces} equal pieces, two for each rank",
            f"use {nearest(length, pieces)}, or a smaller context-parallel size",
        )
        return
    text = " x ".join(f"{name} {value}" for name, value in parts.items() if value is None or value > 1)
    if run.world_size is None or None in parts.values():
        return
    model = (run.tensor or 1) * (run.pipeline or 1) * (run.context or 1)
    if run.world_size % model:
        below = run.world_size - run.world_size % model
        options = [str(size) for size in (below, below + model) if size]
        yield refuse(
            f"{run.world_size} ranks",
            f"they cannot be cut into {text} = {model}",
            f"use {' or '.join(options)} ranks, or another layout",
        )
        return
    split = f"{text} x " if text else ""
    yield ok("layout", f"{run.world_size} ranks = {split}DP {run.world_size // model}")
    if run.virtual is None and not run.missing:
        yield refuse("virtual stages", "the layers cannot be cut into chunks of equal size", "correct the chunk size")


def _batch(run: ExistingRun, sizes: Sizes) -> Iterator[Finding]:
    step = sizes.micro_batch * sizes.data_parallel
    steps = run.number("gradient_accumulation_steps")
    if sizes.meta_batch % step or (steps is not None and steps * step != sizes.meta_batch):
        told = f"{sizes.micro_batch} x {sizes.data_parallel}" + (f" x {steps} accumulation steps" if steps else "")
        near = nearest(sizes.meta_batch, step)
        fits = f"{near}" if steps is None else f"{near} with {near // step} accumulation steps"
        yield refuse(
            f"global batch size {sizes.meta_batch}",
            f"it must be a multiple of micro-batch size x data-parallel size, here {told}"
            if steps is None
            else f"it must be micro-batch size x data-parallel size x accumulation steps, here {told}",
            f"use {fits}",
        )
        return
    count = sizes.meta_batch // step
    if sizes.virtual > 1 and (count < sizes.pipeline or count % sizes.pipeline):
        yield refuse(
            f"{count} micro-batches per rank",
            f"interleaved stages need a multiple of the {sizes.pipeline} pipeline stages",
            f"use a global batch size of {nearest(sizes.meta_batch, sizes.quantum)}",
        )
        return
    chunks = f", {sizes.virtual} model chunks per stage" if sizes.virtual > 1 else ""
    many = "1 micro-batch" if count == 1 else f"{count} micro-batches"
    cut = f"{many} of {sizes.micro_batch} on DP {sizes.data_parallel}{chunks}"
    yield ok("batch", f"B = {sizes.meta_batch} = {cut}")
    if run.on(RAMP):
        yield _ramp(run, sizes)


def _ramp(run: ExistingRun, sizes: Sizes) -> Finding:
    flag = f"`--rampup-batch-size {' '.join(shown(value) for value in run.options[RAMP])}`"
    try:
        ramp = ramp_of(run, sizes)
        ramp.check(sizes.quantum, "rampup_batch_size")
    except ConfigError as error:
        why, _, cure = str(error).partition(". ")
        return refuse(flag, why, cure.rstrip("."))
    first = ramp.stages[0].size if ramp.stages else ramp.full
    return ok(flag, f"B grows from {first} over {ramp.iterations} iterations, which train on everything")


def ramp_of(run: ExistingRun, sizes: Sizes) -> Ramp:
    """Sizes of the meta-batches; all of the full one without a ramp-up, or where its numbers are not known.

    Raises:
        ConfigError: sizes that do not lead from one to the other.
    """
    given = run.options.get(RAMP, ())
    if len(given) != 3 or not all(value.isdigit() for value in given):
        return Ramp(sizes.meta_batch)
    start, increment, samples = map(int, given)
    return Ramp.linear(start, increment, samples, sizes.meta_batch)


def propose(
    run: ExistingRun, sizes: Sizes | None, config: EvolvedSamplingConfig, given: frozenset[str], passes: Passes
) -> tuple[Proposal, list[Finding]]:
    """Choose what is not given: b, the scoring micro-batch; and predict the saving.

    Args:
        run: the existing run.
        sizes: its sizes, None if not known.
        config: settings as told or by default.
        given: fields of it that the user told, which are never changed.
        passes: passes over the data that the run makes.
    """
    if sizes is None:
        return Proposal(config, passes), []
    findings: list[Finding] = []
    if sizes.quantum >= sizes.meta_batch and arm_of(config).selects:
        return Proposal(config, passes), [one_micro_batch(sizes)]
    if "selection.keep_ratio" not in given and arm_of(config).selects and config.selection.budget is None:
        kept = min(nearest(config.selection.keep_ratio * sizes.meta_batch, sizes.quantum), sizes.meta_batch)
        ratio = kept / sizes.meta_batch
        if abs(ratio - config.selection.keep_ratio) > 1e-9:
            findings.append(
                note(
                    f"keep ratio {ratio:g}",
                    f"b must be a multiple of {sizes.quantum} sequences here, so {config.selection.keep_ratio:g} of "
                    f"the meta-batch becomes b = {kept}",
                    "a larger global batch or a smaller micro-batch comes nearer",
                )
            )
            config = config.replaced({"selection.keep_ratio": ratio})
    try:
        plan = _plan(run, sizes, config, passes.count)
        check_micro_batches(plan, sizes.micro_batch * sizes.data_parallel, sizes.pipeline, sizes.virtual)
    except (ConfigError, LayoutError) as error:
        why, _, cure = str(error).partition(". ")
        return Proposal(config, passes), [*findings, refuse("sizes", why, cure.rstrip(".") or "use other sizes")]
    if plan.scored_iterations:
        config, more = _scoring(sizes, config, plan, "scorer.micro_batch_size" in given)
        findings += more
        if blocking(more):
            return Proposal(config, passes), findings
    plan = dataclasses.replace(plan, config=config)
    proposal = Proposal(config, passes, plan, predict(plan, sizes.layout(config.scorer.micro_batch_size)))
    return proposal, findings + list(_pays(proposal))


def one_micro_batch(sizes: Sizes) -> Finding:
    """What is said where b cannot be below B, since a rank has no more micro-batches than it must."""
    smaller = [
        size
        for size in range(1, sizes.micro_batch)
        if sizes.own % size == 0 and size * sizes.data_parallel * sizes.multiple < sizes.meta_batch
    ]
    cures = [f"a micro-batch size of {' or '.join(map(str, smaller))}"] if smaller else []
    twice = 2 * sizes.meta_batch
    halves = f"each half of it is chosen from by itself, and the optimizer sees {sizes.meta_batch} sequences as before"
    cures.append(f"a global batch size of {twice} (with `--es-selection-parts 2` {halves})")
    count = sizes.own // sizes.micro_batch
    many = "one micro-batch" if count == 1 else f"{count} micro-batches, which its virtual stages need"
    return refuse(
        f"global batch size {sizes.meta_batch}",
        f"every rank has {many}, so b cannot be below B and nothing would be saved",
        f"use {', or '.join(cures)}",
    )


def _plan(run: ExistingRun, sizes: Sizes, config: EvolvedSamplingConfig, passes: float) -> Plan:
    iterations, samples = run.number("train_iters"), run.samples
    drawn = samples or (iterations or 10_000) * sizes.meta_batch
    manifest = Manifest((Component("data", "", max(1, round(drawn / passes)), 1.0, ""),), 1)
    return plan_run(config, manifest, sizes.meta_batch, sizes.quantum, drawn, ramp=ramp_of(run, sizes))


def _scoring(
    sizes: Sizes, config: EvolvedSamplingConfig, plan: Plan, given: bool
) -> tuple[EvolvedSamplingConfig, list[Finding]]:
    """Choose the scoring micro-batch: the cheapest, and of equals the largest."""
    fitting = sizes.scoring_sizes
    if given:
        size = config.scorer.micro_batch_size
        if size is None or size in fitting:
            return config, []
        return config, [
            refuse(
                f"`--es-scorer-micro-batch-size {size}`",
                f"it must cut a rank's {sizes.own} sequences into a multiple of {sizes.multiple} micro-batches",
                f"use one of {', '.join(map(str, fitting[:12]))}",
            )
        ]
    able = [
        s
        for s in fitting
        if sizes.micro_batch <= s <= LARGEST_SCORING * sizes.micro_batch and s % sizes.micro_batch == 0
    ]
    best = max(able, key=lambda s: (round(predict(plan, sizes.layout(s)).saving, 6), s))
    return config.replaced({"scorer.micro_batch_size": None if best == sizes.micro_batch else best}), []


def _pays(proposal: Proposal) -> Iterator[Finding]:
    if proposal.plan is None or proposal.prediction is None or not arm_of(proposal.config).selects:
        return
    if proposal.prediction.saving <= 0:
        yield refuse(
            f"keep ratio {proposal.plan.kept / proposal.plan.meta_batch:g}",
            f"this run would cost {-proposal.prediction.saving:.1%} more than the plain one: scoring costs more than "
            "the skipped backward passes save",
            "lower it, use more micro-batches per rank (a larger global batch), or a scorer that makes no pass (the "
            "default)",
        )
    if prunes(proposal.config) and proposal.passes.count <= 1:
        yield note(
            f"pruning ratio {proposal.config.pruning.ratio:g}",
            "the first epoch of a component is never pruned, and the prediction counts one pass over the data",
            "give the passes that the run makes with `--passes N`",
        )
