"""What a comparison has found so far: losses, costs and paired differences of every arm, from the runs' summaries.

Costs are in forward units: training on a sequence costs 1 + backward / forward, scoring it costs scoring / forward, in
proportion to the tokens that are read. Every run measures these ratios; all arms are charged with their medians.
"""

from __future__ import annotations

import dataclasses
import math
import statistics as middles
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from es_megatron.bench.rates import Point
from es_megatron.bench.runs import Outcomes, best_point, paired_tasks, search_losses, searched
from es_megatron.bench.spec import Spec
from es_megatron.bench.statistics import PairedDifference, paired, spread
from es_megatron.scoring import PLAIN


class Units(NamedTuple):
    """What passes over a sequence cost, in forward passes of training."""

    backward: float
    scoring: float
    """A scoring forward pass: its micro-batch may be another one, and it keeps no activations."""


NOMINAL = Units(backward=2.0, scoring=1.0)
"""As papers count."""

LOSSLESS = 0.005
"""Nats per token that count as no loss."""

TOLERANCE = 0.02
"""Share by which costs that claim to be equal may differ."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm in one case."""

    arm: str
    rate: float | None
    """Learning rate of the paired runs; None while it is searched for."""
    decay: float | None
    """Weight decay of the paired runs; None: that of the settings."""
    edge: str
    """What of the best point is at an end of the grid, such as `lowest rate`, else nothing."""
    search: Mapping[Point, float]
    """Mean validation loss by learning rate and weight decay."""
    losses: Mapping[int, float]
    """Mean validation loss over the domains by seed, nats per token."""
    domains: Mapping[str, Mapping[int, float]]
    """The same for each domain."""
    passes: float
    """Passes over the components that the runs stand for, mean over components and seeds."""
    cost: float
    """Of the plain run with calibrated units, mean over seeds, as a share."""
    nominal_cost: float
    """The same with backward = 2 forward."""
    reference: float
    """What training a reference and scoring the blend with it cost, nominally, as a share of the plain run's cost."""
    off: Mapping[str, float]
    """Cost against the arm it claims to equal, minus 1, by unit; of those beyond the tolerance."""
    seconds: float
    """Wall-clock of all training iterations, mean over seeds."""
    trained: float
    """Tokens trained, mean over seeds."""
    scored: float
    """Tokens read to score, mean over seeds."""
    chosen: Mapping[str, float]
    """Share of the trained sequences by component."""
    against: Mapping[str, PairedDifference]
    """Paired difference to each reference."""
    domains_against: Mapping[str, Mapping[str, PairedDifference]]
    """The same by reference and domain."""
    errors: Sequence[str]
    """Failed runs."""

    @property
    def loss(self) -> float:
        """Mean over seeds; nan without any."""
        return middles.fmean(self.losses.values()) if self.losses else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over seeds."""
        return spread(list(self.losses.values()))

    @property
    def lossless(self) -> bool | None:
        """Whether the upper 95% bound against `plain` is at most 0.005 nats; None while that is open."""
        against = self.against.get(PLAIN)
        return None if against is None or against.verdict == "open" else against.high <= LOSSLESS


@dataclass(frozen=True)
class CaseResult:
    """All arms of a case."""

    case: str
    arms: Mapping[str, ArmResult]


@dataclass(frozen=True)
class Results:
    """All cases."""

    spec: Spec
    units: Units
    """Medians of what the runs measured."""
    ranges: tuple[tuple[float, float], tuple[float, float]]
    """Least and most of each of them."""
    cases: Sequence[CaseResult]
    finished: int
    """Runs that have ended, failed ones among them."""


def conclude(spec: Spec, outcomes: Outcomes, charges: Mapping[tuple[str, str], float] | None = None) -> Results:
    """Put together what the finished runs say.

    Args:
        spec: of the comparison.
        outcomes: of the runs that have ended.
        charges: cost of a reference by case and arm, as a share of the plain run's cost.
    """
    measured = [units_of(outcome.summary["layout"]) for outcome in outcomes.values() if outcome.summary]
    backward, scoring = zip(*(measured or [NOMINAL]), strict=True)
    units = Units(middles.median(backward), middles.median(scoring))
    ranges = (min(backward), max(backward)), (min(scoring), max(scoring))
    return Results(
        spec, units, ranges, [_case(spec, outcomes, case, units, charges or {}) for case in spec.cases], len(outcomes)
    )


def units_of(layout: Mapping[str, Any]) -> Units:
    """What a run measured before its first iteration, from its summary's `layout`; nominal where it did not."""
    forward = float(layout["forward"]) * float(layout["micro_batches"])
    if forward <= 0:
        return NOMINAL
    scoring = float(layout["scoring_forward"]) * float(layout["scoring_micro_batches"])
    return Units(float(layout["backward"]) / float(layout["forward"]), scoring / forward)


def cost_share(summary: Mapping[str, Any], units: Units) -> float:
    """Cost of a run as a share of the plain run it stands for, given the trainer's summary."""
    trained = 1.0 + units.backward
    total = float(summary["sequences_scored"]) * float(summary["scored_share"]) * units.scoring
    total += float(summary["sequences_trained"]) * trained
    return total / (float(summary["plain_iterations"]) * float(summary["meta_batch"]) * trained)


def _case(
    spec: Spec, outcomes: Outcomes, case: str, units: Units, charges: Mapping[tuple[str, str], float]
) -> CaseResult:
    arms = {arm: _arm(spec, outcomes, case, arm, units, charges.get((case, arm), 0.0)) for arm in spec.arms}
    for name, result in arms.items():
        off = _off(spec, arms[spec.equal_cost[0]], result) if name in spec.equal_cost else {}
        others = [reference for reference in spec.references if reference != name]
        arms[name] = dataclasses.replace(
            result,
            off=off,
            against={other: _difference(spec, result.losses, arms[other].losses) for other in others},
            domains_against={
                other: {
                    domain: _difference(spec, losses, arms[other].domains.get(domain, {}))
                    for domain, losses in result.domains.items()
                }
                for other in others
            },
        )
    return CaseResult(case, arms)


def _arm(spec: Spec, outcomes: Outcomes, case: str, arm: str, units: Units, charge: float) -> ArmResult:
    """What an arm's own runs say."""
    point = best_point(spec, outcomes, case, arm)
    tasks, search = paired_tasks(spec, outcomes, case, arm), searched(spec, outcomes, case, arm)
    done = {task.seed: outcomes[task].summary for task in tasks if task in outcomes and outcomes[task].summary}
    losses = {seed: float(summary["validation"]["mean"]) for seed, summary in done.items()}
    names = [name for summary in [*done.values()][:1] for name in summary["validation"]]
    domains = [name for name in names if name not in ("iteration", "mean")]
    every = [*search, *tasks]
    return ArmResult(
        arm=arm,
        rate=None if point is None else point.rate,
        decay=None if point is None else point.decay,
        edge=_edge(spec, point),
        search=search_losses(outcomes, search),
        losses=losses,
        domains={name: {seed: float(one["validation"][name]) for seed, one in done.items()} for name in domains},
        passes=_mean([middles.fmean(summary["passes"].values()) for summary in done.values()]),
        cost=_mean([cost_share(summary, units) for summary in done.values()]),
        nominal_cost=_mean([cost_share(summary, NOMINAL) for summary in done.values()]),
        reference=charge,
        off={},
        seconds=_mean([float(summary["seconds"]["step"]) for summary in done.values()]),
        trained=_mean([float(summary["tokens_trained"]) for summary in done.values()]),
        scored=_mean([float(summary["tokens_scored"]) for summary in done.values()]),
        chosen=_chosen([*done.values()]),
        against={},
        domains_against={},
        errors=[f"{task}: {outcomes[task].error}" for task in every if task in outcomes and outcomes[task].error],
    )


def _edge(spec: Spec, point: Point | None) -> str:
    if point is None or not spec.searches:
        return ""
    rates, decays = spec.learning_rates, sorted(spec.weight_decays)
    found = [f"{which} rate" for which, end in (("lowest", 0), ("highest", -1)) if point.rate == rates[end]]
    if len(decays) > 1:
        found += [f"{which} decay" for which, end in (("lowest", 0), ("highest", -1)) if point.decay == decays[end]]
    return " and ".join(found) if len(rates) > 1 else ""


def _off(spec: Spec, yardstick: ArmResult, result: ArmResult) -> dict[str, float]:
    """By how much an arm misses the cost it claims, where it does; what its budget left to a reference counts."""
    own, other = (arm.reference / spec.reference_runs if spec.reference_runs else 0.0 for arm in (result, yardstick))
    shares = {
        "calibrated": (result.cost + own) / (yardstick.cost + other) - 1,
        "nominal": (result.nominal_cost + own) / (yardstick.nominal_cost + other) - 1,
    }
    return {unit: share for unit, share in shares.items() if abs(share) > TOLERANCE}


def _difference(spec: Spec, arm: Mapping[int, float], reference: Mapping[int, float]) -> PairedDifference:
    both = [seed for seed in arm if seed in reference]
    found = paired([arm[seed] for seed in both], [reference[seed] for seed in both])
    return found._replace(complete=len(both) == len(spec.seeds))


def _chosen(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean share of each component among what was trained on."""
    shares: dict[str, list[float]] = {}
    for summary in summaries:
        total = sum(summary["chosen"].values())
        for name, count in summary["chosen"].items():
            shares.setdefault(name, []).append(count / total)
    return {name: _mean(values) for name, values in shares.items()}


def _mean(values: Sequence[float]) -> float:
    return middles.fmean(values) if values else math.nan
