"""The HTML page: one file, with its style and pictures inside."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from es_megatron.report.analysis import Analysis
from es_megatron.report.figures import Picture

STYLE = """
body { margin: 0; background: #f6f7f9; color: #22262c; font: 16px/1.5 system-ui, "Segoe UI", Helvetica, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.6rem; margin: 0 0 .2rem }
h2 { font-size: 1.1rem; margin: 0 0 .6rem }
p.sub { margin: 0 0 1.4rem; color: #5d6570 }
section, figure, aside { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; margin: 0 0 1.2rem;
  padding: 1rem 1.2rem }
aside { background: #fff9e8; border-color: #eadfb8 }
aside ul { margin: 0; padding-left: 1.1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid #eef0f3 }
th { font-weight: 500; color: #5d6570; width: 13rem }
tr:last-child th, tr:last-child td { border-bottom: 0 }
img { display: block; width: 100%; height: auto }
figcaption { margin-top: .6rem; color: #5d6570; font-size: .9rem }
""".strip()


def png_of(picture: Picture) -> bytes:
    """A picture as a PNG file's content."""
    content = io.BytesIO()
    picture.figure.savefig(content, format="png", facecolor="white", metadata={"Software": None})
    return content.getvalue()


def render(title: str, subtitle: str, facts: Sequence[tuple[str, str]], notes: Sequence[str], figures: str) -> str:
    """The page.

    Args:
        title: of the page.
        subtitle: one line below it.
        facts: rows of the table.
        notes: what a reader must know about what is shown, or is not.
        figures: of `figure_of`, one after the other.
    """
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>\n" for name, value in facts)
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    aside = f"<aside><ul>{listed}</ul></aside>\n" if notes else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="sub">{html.escape(subtitle)}</p>\n'
        f"<section><table>\n{table}</table></section>\n{aside}{figures}</main>\n</body>\n</html>\n"
    )


def figure_of(picture: Picture, png: bytes) -> str:
    """A picture with its title and caption."""
    title = html.escape(picture.title)
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>"
    return f'<figure><h2>{title}</h2>\n<img alt="{title}" src="{source}">\n{caption}</figure>\n'


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


def _share(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.1%}"


def _millions(tokens: float) -> str:
    return f"{tokens / 1e9:,.2f} G" if tokens >= 1e10 else f"{tokens / 1e6:,.2f} M"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
