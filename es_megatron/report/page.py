"""The HTML page: one file, with its style and pictures inside."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from es_megatron.report.analysis import Analysis
from es_megatron.report.control import Headline, Side, told_differences
from es_megatron.report.drawing import Form, Picture
from es_megatron.report.words import amount, duration, share

TEMPLATE = "page.html.j2"


def png_of(picture: Picture, form: Form) -> bytes:
    """A picture as a PNG file's content."""
    content = io.BytesIO()
    picture.draw(form).savefig(content, format="png", facecolor="white", metadata={"Software": None})
    return content.getvalue()


class Shown(NamedTuple):
    """A picture as PNG files' contents."""

    picture: Picture
    wide: bytes
    narrow: bytes
    """For screens of a telephone's width."""


class Page(NamedTuple):
    """What a page holds."""

    title: str
    subtitle: str
    headline: Headline
    facts: Sequence[tuple[str, str]]
    """Rows of the table."""
    notes: Sequence[str]
    """What a reader must know about what is shown, or is not."""
    figures: Sequence[Shown]


def render(content: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("es_megatron.report", "."),
        autoescape=True,  # of every name: jinja2's own choice goes by the suffix, which is `j2` here
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    figures = [
        {
            "title": each.picture.title,
            "caption": each.picture.caption,
            "wide": base64.b64encode(each.wide).decode("ascii"),
            "narrow": base64.b64encode(each.narrow).decode("ascii"),
        }
        for each in content.figures
    ]
    return environment.get_template(TEMPLATE).render({**content._asdict(), "figures": figures})


def facts_of(run: Side, control: Side | None) -> list[tuple[str, str]]:
    """Rows of the table of facts."""
    facts = [*_run(run), *_savings(run.analysis)]
    if control is not None:
        facts.append(("control", f"{control.directory} ({_progress(control)})"))
        facts.append(("it differs in", told_differences(run, control)))
    return [*facts, *_measures(run.analysis)]


def _progress(side: Side) -> str:
    planned = int(side.analysis.plan["iterations"])
    return f"{side.analysis.iteration:,} of {planned:,} iterations, {'finished' if side.finished else 'not finished'}"


def _run(run: Side) -> Iterator[tuple[str, str]]:
    analysis, plan = run.analysis, run.analysis.plan
    length = int(plan["seq_length"])
    yield "progress", f"{_progress(run)}; the plain run has {plan['plain_iterations']:,}"
    chooses = f"scorer {plan['scorer']}, policy {plan['policy']}" if plan["scorer"] else "no scores"
    yield "method", f"arm {plan['arm']}, {chooses}, pruning ratio {plan['pruning_ratio']:g}, anneal {plan['anneal']:g}"
    yield "batch", f"b = {plan['kept']:,} of B = {plan['meta_batch']:,} sequences of {length:,} tokens"
    parts = plan["components"]
    yield "components", ", ".join(f"{c['name']} ({amount(c['samples'])} samples, {c['share']:.1%})" for c in parts)
    yield "mixture", _mixture(analysis)
    scored, trained = analysis.total("scored"), analysis.total("trained")
    forwarded = (plan["scored_share"] * scored + trained) * length
    whole = plan["plain_iterations"] * plan["meta_batch"] * length
    told = f"{amount(forwarded)} forwarded, {amount(trained * length)} trained"
    yield "tokens so far", f"{told} (the whole plain run: {amount(whole)})"
    yield "time so far", f"{duration(analysis.total('elapsed'))} in iterations, without evaluations and saves"


def _savings(analysis: Analysis) -> Iterator[tuple[str, str]]:
    saving = analysis.saving
    predicted = f"{share(saving.nominal)} nominal, {share(saving.calibrated)} calibrated, of the whole run"
    yield "predicted saving", predicted
    yield "work saved", f"{share(saving.counted)} so far, counted (backward = 2 forward)"
    known = f"{share(saving.measured)} so far, against plain steps of this run at the same load"
    yield "time saved", f"not shown: {saving.doubt}" if saving.doubt else known
    if analysis.plan["selecting_iterations"]:
        told = f"{share(saving.nominal_selecting)} nominal, {share(saving.calibrated_selecting)} calibrated"
        measured = "" if saving.doubt else f", {share(saving.measured_selecting)} measured"
        yield "while selecting", f"{told}{measured}, of an iteration"


def _measures(analysis: Analysis) -> Iterator[tuple[str, str]]:
    if analysis.validation:
        last = max(analysis.validation)
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in analysis.validation[last].items())
        yield "validation loss", f"{told} (iteration {last:,}, nats per token)"
    layout = analysis.plan["layout"]
    times = f"forward {layout['forward']:.4g} s, scoring forward {layout['scoring_forward']:.4g} s"
    ratio = f"backward {layout['backward'] / layout['forward']:.3g} forward"
    yield "calibration", f"{times} (of a micro-batch on a stage), {ratio}; `es-megatron plan` takes these"
    bad, skipped = analysis.total("bad"), analysis.total("skipped")
    yield "trouble", f"{bad:,} sequences with a non-finite loss, {skipped:,} skipped optimizer steps"


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
