"""Was it worth it: a run beside its control, in one answer and the numbers it rests on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from es_megatron.core.plan import TRAIN_COST
from es_megatron.report.analysis import Analysis, analyse
from es_megatron.report.words import duration, share
from es_megatron.trainer.metrics_file import read_metrics
from es_megatron.trainer.settings import SETTINGS

EQUAL = 0.02
"""Costs that differ by less than this share of the control's count as equal."""
TOLD = 6
"""Settings that are named."""
PAIR = (
    "This is one pair of runs: another seed moves a loss too, often by as much. `es-megatron compare` tells a "
    "difference from its spread over seeds."
)


@dataclass(frozen=True)
class Side:
    """A run as far as it has come."""

    directory: Path
    analysis: Analysis
    settings: Mapping[str, Any]
    """Flat, `section.key`; empty if the run's file is missing or cannot be read."""
    summary: Mapping[str, Any] | None
    """What the run wrote at its end; None before."""
    notes: tuple[str, ...]
    """On what could not be read."""

    @property
    def finished(self) -> bool:
        """Whether it has come to its planned end."""
        ended = self.summary is not None and bool(self.summary.get("finished"))
        return ended and self.analysis.iteration == self.analysis.plan["iterations"]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.directory.resolve().name

    @property
    def work(self) -> float:
        """Sequences so far, forward = 1 and backward = 2."""
        return float(self.analysis.course.work[-1])

    @property
    def plain_work(self) -> float:
        """Of the whole plain run that this run stands for."""
        return TRAIN_COST * self.analysis.plan["plain_iterations"] * self.analysis.plan["meta_batch"]


class Headline(NamedTuple):
    """What a reader takes away."""

    answer: str
    lines: tuple[str, ...]


def read_side(directory: Path) -> Side:
    """Read a run.

    Raises:
        DataError: there is none, or its metrics cannot be read.
    """
    analysis, notes = analyse(read_metrics(directory)), list[str]()
    summary, settings = None, {}
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        notes.append(f"summary.json cannot be read: {error}")
    try:
        settings = flat(yaml.safe_load((directory / SETTINGS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        notes.append(f"{SETTINGS} cannot be read: {error}")
    return Side(directory, analysis, settings, summary, tuple(notes))


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots between the keys."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def headline(run: Side, control: Side | None) -> Headline:
    """The answer, and what it rests on."""
    lines = [_saved(run)]
    if control is None:
        lines.append(
            "Lay a control over it with `--control RUN`: a plain run of the same blend shows the loss that the saving "
            "cost, a uniform choice of the same cost whether the scores earn theirs."
        )
        return Headline("Not answered: without a control the loss that this cost is not known.", tuple(lines))
    if reason := not_comparable(run, control):
        return Headline(f"Not answered: {reason}.", tuple(lines))
    losses = _common(run, control)
    lines.append(_losses(control, *losses))
    if not (run.finished and control.finished):
        which = "this run" if not run.finished else "the control"
        lines.append("Losses in the middle of a rate schedule are not comparable with those at its end.")
        return Headline(f"Not answered yet: {which} has not come to its end.", tuple(lines))
    if not (run.analysis.course.whole and control.analysis.course.whole):
        return Headline("Not answered: the metrics of one run are not whole, so its work is not known.", tuple(lines))
    lines += [_costs(run, control), PAIR]
    return Headline(_answer(run, control, losses[0] - losses[1]), tuple(lines))


def not_comparable(run: Side, control: Side) -> str:
    """Why neither losses nor costs of two runs can be compared; empty if they can."""
    plans = run.analysis.plan, control.analysis.plan
    parts = [{c["name"]: c["samples"] for c in plan["components"]} for plan in plans]
    if parts[0] != parts[1]:
        return "the blend of the control is another one"
    if plans[0]["seq_length"] != plans[1]["seq_length"]:
        return "the control has another sequence length"
    other = [key for key, _ in differences(run, control) if key.startswith(("model.", "data."))]
    if other:
        return f"the control has another `{other[0]}`"
    if not _shared(run, control):
        return "the runs have no validation losses in common (`training.eval_samples`)"
    return ""


def differences(run: Side, control: Side) -> list[tuple[str, str]]:
    """Settings that differ, where and how; those of what is written are left out."""
    if not (run.settings and control.settings):
        return []
    found: list[tuple[str, str]] = []
    for key in dict.fromkeys((*run.settings, *control.settings)):
        one, other = run.settings.get(key), control.settings.get(key)
        if one != other and not key.startswith("run."):
            found.append((key, f"{key} {one} instead of {other}"))
    return found


def told_differences(run: Side, control: Side) -> str:
    """The same as text."""
    if not (run.settings and control.settings):
        return f"not known: one has no {SETTINGS}"
    found = [text for _, text in differences(run, control)]
    more = f", and {len(found) - TOLD} more" if len(found) > TOLD else ""
    return "; ".join(found[:TOLD]) + more or "nothing but what is written"


def mean_losses(run: Side, names: tuple[str, ...]) -> dict[int, float]:
    """Mean validation loss over domains, by iteration, where all of them are known."""
    found: dict[int, float] = {}
    for iteration, losses in sorted(run.analysis.validation.items()):
        mean = sum(losses.get(name, math.nan) for name in names) / len(names) if names else math.nan
        if math.isfinite(mean):
            found[iteration] = mean
    return found


def domains(run: Side) -> tuple[str, ...]:
    """With a validation loss at the end of what there is."""
    last = run.analysis.validation[max(run.analysis.validation)] if run.analysis.validation else {}
    return tuple(name for name, loss in last.items() if name != "mean" and math.isfinite(loss))


def _shared(run: Side, control: Side) -> tuple[str, ...]:
    return tuple(name for name in domains(run) if name in domains(control))


def _common(run: Side, control: Side) -> tuple[float, float]:
    """Last mean losses over the domains that both have."""
    names = _shared(run, control)
    one, other = (list(mean_losses(side, names).values())[-1] for side in (run, control))
    return one, other


def _saved(run: Side) -> str:
    saving = run.analysis.saving
    if not len(saving.work):
        return "Nothing is counted yet."
    verb = "Saved" if saving.counted >= 0 else "Cost"
    more = "" if saving.counted >= 0 else " more than"
    counted = (
        f"{verb} {share(abs(saving.counted))}{more or ' of'} a plain run's work so far (counted, backward = 2 forward)"
    )
    if saving.doubt:
        return f"{counted}. What that is in time is not shown: {saving.doubt}."
    plain = f"plain steps of this run at the same load, {duration(saving.plain_step)} each"
    verb, more = ("saved", "of") if saving.measured >= 0 else ("cost", "more than")
    return f"{counted}, and {verb} {share(abs(saving.measured))} {more} its time (against {plain})."


def _losses(control: Side, loss: float, other: float) -> str:
    difference = loss - other
    side = (
        "the same as" if difference == 0 else f"{abs(difference):.4f} {'below' if difference < 0 else 'above'} that of"
    )
    return (
        f"Validation loss {loss:.4f} nats per token, {side} the control {control.name} ({_arm(control)}, {other:.4f})."
    )


def _costs(run: Side, control: Side) -> str:
    work = f"The run took {share(run.work / control.work)} of the control's work"
    seconds = [side.analysis.course.seconds[-1] for side in (run, control)]
    return (
        f"{work}. Its iterations took {duration(seconds[0])}, the control's {duration(seconds[1])}; nothing says that "
        "both machines had the same load."
    )


def _answer(run: Side, control: Side, difference: float) -> str:
    ratio = run.work / control.work
    nats = f"{abs(difference):.4f} nats {'lower' if difference <= 0 else 'higher'} loss"
    if abs(ratio - 1) < EQUAL:
        answer = "Better" if difference < 0 else "No better" if difference == 0 else "Worse"
        return f"{answer} than {_arm(control)} at equal work, on this pair: {nats}."
    work = f"{share(abs(ratio - 1))} {'less' if ratio < 1 else 'more'} work"
    if difference <= 0:
        return f"{'Yes' if ratio < 1 else 'Bought with work'}, on this pair: {nats} than {_arm(control)} for {work}."
    if ratio >= 1:
        return f"No, on this pair: {nats} than {_arm(control)}, for {work}."
    if _reached_before(run, control):
        return f"No, on this pair: for no more work {_arm(control)} already had as low a loss, its rate still high."
    return f"A trade, on this pair: {work} than {_arm(control)}, and {nats}."


def _reached_before(run: Side, control: Side) -> bool:
    """Whether the control had as low a loss for no more work: before its rate had come down, so not by luck of it."""
    names = _shared(run, control)
    own = list(mean_losses(run, names).values())[-1]
    course = control.analysis.course
    return any(loss <= own and course.work_at([i])[0] <= run.work for i, loss in mean_losses(control, names).items())


def _arm(side: Side) -> str:
    plan = side.analysis.plan
    return plan["arm"] if not plan["scorer"] else f"{plan['arm']}, {plan['scorer']} scores"
