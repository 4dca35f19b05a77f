"""The results of a comparison as text, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from es_megatron.bench.results import LOSSLESS, ArmResult, CaseResult, Results
from es_megatron.bench.statistics import PairedDifference
from es_megatron.scoring import PLAIN

MEGA = 1e-6


class Section(NamedTuple):
    """One table with its title and remarks."""

    title: str
    rows: Sequence[Sequence[str]]
    """The first is the head."""
    notes: Sequence[str] = ()


def render(results: Results) -> str:
    """All tables as text."""
    return "\n\n".join(_text(section) for section in sections(results))


def markdown(results: Results) -> str:
    """All tables as Markdown."""
    return "\n\n".join(_markdown(section) for section in sections(results))


def sections(results: Results) -> list[Section]:
    """What there is to show: of every case losses, domains, and what was chosen where it says something."""
    found: list[Section] = []
    for case in results.cases:
        if results.spec.searches:
            found.append(_search(case))
        if not results.spec.seeds:
            continue
        found.append(_losses(results, case))
        found.append(_domains(results, case))
        if any(len(arm.chosen) > 1 for arm in case.arms.values()):
            found.append(_chosen(case))
    return found


def _losses(results: Results, case: CaseResult) -> Section:
    spec = results.spec
    charged = any(arm.reference > 0 for arm in case.arms.values())
    decayed = any(arm.decay is not None for arm in case.arms.values())
    head = [
        "arm",
        "lr",
        *(["decay"] if decayed else []),
        "cost",
        "nominal",
        *(["reference", "of ten runs"] if charged else []),
    ]
    head += ["seconds", "passes", "M trained", "loss", "over seeds"]
    head += [f"against {name}" for name in spec.references]
    lossless = PLAIN in spec.references
    rows = [[*head, *(["bound to plain"] if lossless else [])]]
    for arm in case.arms.values():
        rate = "-" if arm.rate is None else f"{arm.rate:g}" + ("*" if arm.edge else "")
        decay = ["-" if arm.decay is None else f"{arm.decay:g}"] if decayed else []
        cells = [arm.arm, rate, *decay, share(arm.cost) + ("!" if arm.off else ""), share(arm.nominal_cost)]
        cells += [share(arm.reference), share(arm.reference / 10)] if charged else []
        cells += [number(arm.seconds, ".1f"), number(arm.passes, ".2f"), number(MEGA * arm.trained, ".2f")]
        cells += [number(arm.loss, ".4f"), "± " + number(arm.spread, ".4f")]
        cells += [difference_words(arm.against[name]) if name in arm.against else "" for name in spec.references]
        rows.append([*cells, *([_bound(arm)] if lossless else [])])
    seeds = f"{len(spec.seeds)} paired seeds"
    title = f"{spec.path.stem}, {case.case}: {seeds}, cost as a share of the plain run, {_units(results)}"
    return Section(title, rows, _notes(results, case))


def _search(case: CaseResult) -> Section:
    points = list(dict.fromkeys(point for arm in case.arms.values() for point in arm.search))
    points.sort(key=lambda point: (point.decay or 0.0, point.rate))
    rows = [["arm", *map(str, points)]]
    for arm in case.arms.values():
        marks = {point: " *" if point == (arm.rate, arm.decay) else "" for point in arm.search}
        rows.append([arm.arm, *(number(arm.search.get(p, math.nan), ".4f") + marks.get(p, "") for p in points)])
    what = "loss on the first search seed, of the best two the mean over all (* taken)"
    return Section(f"{case.case}: search for learning rate and weight decay, {what}", rows)


def _units(results: Results) -> str:
    """What the calibrated costs rest on."""
    (least, most), (least_scoring, most_scoring) = results.ranges
    backward = f"backward {results.units.backward:.2f} forward ({least:.2f} to {most:.2f})"
    scoring = f"scoring {results.units.scoring:.2f} forward ({least_scoring:.2f} to {most_scoring:.2f})"
    return f"with medians of {backward} and {scoring} over all runs"


def _notes(results: Results, case: CaseResult) -> list[str]:
    notes: list[str] = []
    for arm in case.arms.values():
        if arm.edge:
            notes.append(f"* {arm.arm}: its best point has the {arm.edge} of the grid, a better one may be beyond.")
        for unit, share in arm.off.items():
            notes.append(f"! {arm.arm}: {unit} cost {share:+.1%} against {results.spec.equal_cost[0]}, not equal.")
        notes.extend(f"failed: {error}" for error in arm.errors)
        if arm.rate is not None and len(arm.losses) < len(results.spec.seeds):
            notes.append(f"{arm.arm}: {len(arm.losses)} of {len(results.spec.seeds)} seeds so far.")
    return notes


def _domains(results: Results, case: CaseResult) -> Section:
    names = list(dict.fromkeys(name for arm in case.arms.values() for name in arm.domains))
    reference = next(iter(results.spec.references), None)
    against = f" (difference to {reference})" if reference else ""
    rows = [["arm", *names]]
    for arm in case.arms.values():
        cells = [arm.arm]
        for name in names:
            losses = list(arm.domains.get(name, {}).values())
            loss = number(statistics.fmean(losses) if losses else math.nan, ".4f")
            difference = arm.domains_against.get(reference or "", {}).get(name)
            cells.append(loss if difference is None else f"{loss} ({number(difference.mean, '+.4f')})")
        rows.append(cells)
    return Section(f"{results.spec.path.stem}, {case.case}: loss by domain{against}", rows)


def _chosen(case: CaseResult) -> Section:
    names = list(dict.fromkeys(name for arm in case.arms.values() for name in arm.chosen))
    shares = ([arm.arm, *(share(arm.chosen.get(name, math.nan)) for name in names)] for arm in case.arms.values())
    rows = [["arm", *names], *shares]
    return Section(f"{case.case}: share of the trained sequences by component", rows)


def difference_words(difference: PairedDifference) -> str:
    """A difference with its interval and verdict."""
    if difference.seeds == 0:
        return "-"
    if difference.seeds == 1:
        return f"{difference.mean:+.4f} (one seed)"
    open_ = f" ({difference.seeds} seeds)" if difference.verdict == "open" else ""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] {difference.verdict}{open_}"


def _bound(arm: ArmResult) -> str:
    """Upper 95% bound of the difference to the plain run, and whether that is lossless."""
    lossless = arm.lossless
    if lossless is None:
        return ""
    bound = f"{arm.against[PLAIN].high:+.4f}"
    return f"{bound} lossless" if lossless else f"{bound} > {LOSSLESS}"


def share(value: float) -> str:
    """Per cent with a digit; `-` for what is not known."""
    return number(value, ".1%")


def number(value: float, form: str) -> str:
    """A number as `form` says; `-` for what is not known."""
    return format(value, form) if math.isfinite(value) else "-"


def _text(section: Section) -> str:
    widths = [max(len(row[column]) for row in section.rows) for column in range(len(section.rows[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in section.rows]
    return "\n".join([section.title, *(row.rstrip() for row in rows), *section.notes])


def _markdown(section: Section) -> str:
    head, *rest = [f"| {' | '.join(row)} |" for row in section.rows]
    notes = [line for note in section.notes for line in ("", note)]
    return "\n".join([f"**{section.title}**", "", head, "|" + "---|" * len(section.rows[0]), *rest, *notes])


def document(results: Results) -> dict[str, Any]:
    """Everything as JSON; what is not finite is null."""
    spec = results.spec
    return _plain(
        {
            "spec": spec.path.name,
            "references": spec.references,
            "equal_cost": spec.equal_cost,
            "seeds": spec.seeds,
            "search_seeds": spec.search_seeds,
            "learning_rates": spec.learning_rates,
            "weight_decays": spec.weight_decays,
            "units": results.units._asdict(),
            "runs": spec.runs,
            "finished": results.finished,
            "cases": {case.case: {name: _arm(arm) for name, arm in case.arms.items()} for case in results.cases},
        }
    )


def _arm(arm: ArmResult) -> dict[str, Any]:
    against = {
        name: {
            **difference._asdict(),
            "verdict": difference.verdict,
            "domains": {domain: one._asdict() for domain, one in arm.domains_against[name].items()},
        }
        for name, difference in arm.against.items()
    }
    told = {field.name: getattr(arm, field.name) for field in dataclasses.fields(arm)}
    del told["domains_against"]
    told["search"] = {str(point): loss for point, loss in arm.search.items()}
    return {**told, "loss": arm.loss, "spread": arm.spread, "lossless": arm.lossless, "against": against}


def _plain(value: Any) -> Any:
    """Only what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in cast(Sequence[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
