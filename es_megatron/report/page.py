"""The HTML page: one file, with its style and pictures inside."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from es_megatron.report.analysis import Analysis
from es_megatron.report.figures import Picture

TEMPLATE = "page.html.j2"


def png_of(picture: Picture) -> bytes:
    """A picture as a PNG file's content."""
    content = io.BytesIO()
    picture.figure.savefig(content, format="png", facecolor="white", metadata={"Software": None})
    return content.getvalue()


def render(
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    figures: Sequence[tuple[Picture, bytes]],
) -> str:
    """The page.

    Args:
        title: of the page.
        subtitle: one line below it.
        facts: rows of the table.
        notes: what a reader must know about what is shown, or is not.
        figures: each picture with its content of `png_of`.
    """
    environment = Environment(
        loader=PackageLoader("es_megatron.report", "."),
        autoescape=True,  # of every name: jinja2's own choice goes by the suffix, which is `j2` here
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shown = [
        {"title": picture.title, "caption": picture.caption, "base64": base64.b64encode(png).decode("ascii")}
        for picture, png in figures
    ]
    template = environment.get_template(TEMPLATE)
    return template.render(title=title, subtitle=subtitle, facts=facts, notes=notes, figures=shown)


def facts_of(analysis: Analysis, summary: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the table of facts."""
    return list(_facts(analysis, summary))


def _facts(analysis: Analysis, summary: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    plan, saving = analysis.plan, analysis.saving
    planned, length = int(plan["iterations"]), int(plan["seq_length"])
    ended = summary is not None and summary.get("finished") and analysis.iteration == planned
    going = "finished" if ended else "not finished"
    yield "iterations", f"{analysis.iteration} of {planned} ({going}); the plain run has {plan['plain_iterations']}"
    chooses = f"scorer {plan['scorer']}, policy {plan['policy']}" if plan["scorer"] else "no scores"
    yield "method", f"arm {plan['arm']}, {chooses}, pruning ratio {plan['pruning_ratio']:g}, anneal {plan['anneal']:g}"
    yield "batch", f"b = {plan['kept']} of B = {plan['meta_batch']} sequences of {length} tokens"
    yield "components", ", ".join(f"{c['name']} ({c['samples']} samples, {c['share']:.1%})" for c in plan["components"])
    yield "mixture", _mixture(analysis)
    scored, trained = analysis.total("scored"), analysis.total("trained")
    forwarded, whole = (
        (plan["scored_share"] * scored + trained) * length,
        plan["plain_iterations"] * plan["meta_batch"] * length,
    )
    told = f"{_millions(forwarded)} forwarded, {_millions(trained * length)} trained"
    yield "tokens so far", f"{told} (the whole plain run: {_millions(whole)})"
    yield "time so far", f"{_duration(analysis.total('elapsed'))} in iterations, without evaluations and saves"
    yield (
        "predicted saving",
        f"{_share(saving.nominal)} nominal, {_share(saving.calibrated)} calibrated, of the whole run",
    )
    if len(saving.time):
        yield "measured saving", f"{_share(saving.measured)} of the time so far, {_share(saving.work[-1])} of the work"
    if plan["selecting_iterations"]:
        told = f"{_share(saving.nominal_selecting)} nominal, {_share(saving.calibrated_selecting)} calibrated"
        yield "while selecting", f"{told}, {_share(saving.measured_selecting)} measured, of an iteration"
    if analysis.validation:
        last = max(analysis.validation)
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in analysis.validation[last].items())
        yield "validation loss", f"{told} (iteration {last}, nats per token)"
    layout = plan["layout"]
    times = f"forward {layout['forward']:.4g} s, scoring forward {layout['scoring_forward']:.4g} s"
    ratio = f"backward {layout['backward'] / layout['forward']:.3g} forward"
    yield "calibration", f"{times} (of a micro-batch on a stage), {ratio}; `es-megatron plan` takes these"
    bad, skipped = analysis.total("bad"), analysis.total("skipped")
    yield "trouble", f"{bad:g} sequences with a non-finite loss, {skipped:g} skipped optimizer steps"


def _mixture(analysis: Analysis) -> str:
    """Drawn and trained shares so far."""
    drawn, trained = Counter[str](), Counter[str]()
    for stretch in analysis.stretches:
        drawn.update(stretch.drawn)
        trained.update(stretch.chosen)
    if not drawn.total() or not trained.total():
        return "unknown"
    of_drawn, of_trained = drawn.total(), trained.total()
    shares = (f"{name} {drawn[name] / of_drawn:.1%} -> {trained[name] / of_trained:.1%}" for name in drawn)
    return f"drawn -> trained: {', '.join(shares)}"


def _share(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.1%}"


def _millions(tokens: float) -> str:
    return f"{tokens / 1e9:,.2f} G" if tokens >= 1e10 else f"{tokens / 1e6:,.2f} M"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
