"""From the files of finished runs to docs/results.md, its tables and pictures, and what `plan` tells of the loss.

python -m benchmarks.page            writes them
python -m benchmarks.page --check    says whether what is there is what the files say
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from benchmarks import stages
from benchmarks.findings import DAMAGED, Findings, both, interval
from es_megatron.bench import table
from es_megatron.bench.kept import KeptRuns
from es_megatron.bench.results import Results, conclude
from es_megatron.bench.runs import apply
from es_megatron.bench.spec import Spec, load_spec
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.forecast.expected import way_of

ROOT = Path(__file__).parents[1]
QUALITY = ROOT / "benchmarks" / "quality"
SPECS = ("search", "tuning", "proving", "ablations", "shares", "merged")
MEASURED = QUALITY / "results" / "stages.json"
"""Outputs of `benchmarks.step`, by b/B."""
PAGES = Path("docs") / "results"
EXPECTED = Path("es_megatron") / "forecast" / "expected.json"
"""What `es-megatron plan` tells of the loss: it comes with the package."""

MARKS = ("<!-- results: made by `python -m benchmarks.page` -->", "<!-- end of results -->")
PROVED = {
    "damaged": "40% of the documents damaged, 4 passes",
    "clean": "clean text, 4 passes",
    "copies": "half of the documents near copies, 4 passes",
    "once-damaged": "40% damaged, one pass",
    "ten": "clean text, ten passes",
    "larger-damaged": "40% damaged, a larger model at the small one's rates",
    "wikitext": "WikiText-2, 4 passes",
}

AROUND = {
    "ablations-damaged": "40% damaged, one thing at a time",
    "shares-damaged-20": "20% damaged",
    "shares-damaged-10": "10% damaged",
    "shares-batch-128": "40% damaged, a meta-batch of 128",
    "shares-continued": "40% damaged, a model that Wikipedia and dialogue have taught",
}
TITLES = {
    "search": "The search for learning rates and weight decays",
    "tuning": "The tuning blends",
    "proving": "The proving blends",
    "ablations": "One thing at a time",
    "shares": "Less damage, and a larger meta-batch",
    "merged": "Fresh scores in the pipeline's idle time",
}


def main() -> int:
    """Write, or check; returns 1 where something is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    results = read()
    files = pages(results)
    if parser.parse_args().check:
        stale = [str(path) for path, text in files.items() if not _is(ROOT / path, text)]
        print(
            f"stale: {', '.join(stale)}; run `python -m benchmarks.page`" if stale else "all as the results files say"
        )
        return int(bool(stale))
    for path, text in files.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
    for name in pictured(results):
        overview(results[name], ROOT / PAGES / f"{name}.png")
    return 0


def read() -> dict[str, Results]:
    """What each spec's file says."""
    found: dict[str, Results] = {}
    for name in SPECS:
        kept = KeptRuns(QUALITY / "results" / f"{name}.json")
        if kept.outcomes:
            found[name] = conclude(load_spec(QUALITY / f"{name}.yaml"), kept.outcomes, kept.charges)
    return found


def pages(results: Mapping[str, Results]) -> dict[Path, str]:
    """All texts, by path from the root of the repository."""
    findings = Findings(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "benchmarks"), undefined=jinja2.StrictUndefined, autoescape=False
    )
    page = environment.get_template("results_page.md.j2").render(
        findings=findings,
        share=_share,
        interval=interval,
        both=both,
        DAMAGED=DAMAGED,
        proving=both("wikitext")[1:],
        rule=findings.rule,
        progress=" ".join(_progress(name, each) for name, each in results.items() if name != "search"),
        aims=findings.aims(),
        advice=[(PROVED.get(each.case, each.case), each) for each in findings.advice()],
        around=around(results),
        price=findings.price(DAMAGED[0], findings.rule),
        worst=findings.worst_domain(findings.rule),
        stages=_stages(results),
        pictures=[f"{name}.png" for name in pictured(results)],
        tables=", ".join(f"[{TITLES[name].lower()}](results/{name}.md)" for name in results),
    )
    found = {Path("docs") / "results.md": page.rstrip() + "\n"}
    for name, each in results.items():
        text = f"# {TITLES[name]}\n\n`benchmarks/quality/{name}.yaml`; how to read it: [compare.md](../compare.md).\n\n"
        found[PAGES / f"{name}.md"] = text + table.markdown(each) + "\n"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    found[Path("README.md")] = f"{before}{MARKS[0]}\n{headlines(results, findings.rule)}\n{MARKS[1]}{after}"
    cases = findings.expected("proving")
    told = {"arms": ways(load_spec(QUALITY / "proving.yaml")), "cases": cases, "best": {}}
    for case, arm, *_ in findings.advice():
        proved = cases.get(case, {}).get(arm, {}).get("uniform")
        told["best"][case] = {"arm": None if arm == "uniform" else arm, "proving": proved}
    found[EXPECTED] = json.dumps(told, indent=1, sort_keys=True) + "\n"
    return found


def headlines(results: Mapping[str, Results], rule: str) -> str:
    """The table of the README: the proving blends, with the command that made it."""
    head = "validation loss in nats, five paired seeds, 95% intervals"
    lines = [
        f"| {head} | plain, 100% of the cost | uniform, 62.5% | `history` against uniform | `{rule}` with a reference |"
    ]
    lines.append("|---|---|---|---|---|")
    for case in results["proving"].cases if "proving" in results else ():
        arms = [case.arms[name] for name in ("plain", "uniform", "history", rule)]
        if all(arm.losses for arm in arms):
            losses = (f"{arm.loss:.3f}" for arm in arms[:2])
            against = (interval(arm.against["uniform"]) for arm in arms[2:])
            lines.append(f"| {PROVED.get(case.case, case.case)} | {' | '.join([*losses, *against])} |")
    command = "(`es-megatron compare benchmarks/quality/proving.yaml`; tiny models on CPU cores."
    return "\n".join(
        [
            *lines,
            "",
            f"{command} Set-up, every other arm, and where selection loses:",
            "[docs/results.md](docs/results.md).)",
        ]
    )


def around(results: Mapping[str, Results]) -> list[tuple[str, str]]:
    """Means against uniform at equal cost of what two seeds have tried beside the headlines, by what was changed."""
    found: list[tuple[str, str]] = []
    for name in ("ablations", "shares"):
        for case in results[name].cases if name in results else ():
            means = {arm: case.arms[arm].against["uniform"] for arm in results[name].spec.equal_cost[1:]}
            told = [f"`{arm}` {one.mean:+.3f}" for arm, one in means.items() if one.seeds]
            for arm, one in case.arms.items():  # at budgets of their own
                rule, _, share = arm.partition("-")
                other = case.arms.get(f"uniform-{share}")
                if other is None or arm == other.arm or arm in results[name].spec.equal_cost:
                    continue
                if one.losses and one.losses.keys() == other.losses.keys():
                    mean = fmean(one.losses[seed] - other.losses[seed] for seed in one.losses)
                    told.append(f"`{rule}` {mean:+.3f} at {share}% of the cost")
            if told:
                found.append((AROUND[f"{name}-{case.case}"], ", ".join(told)))
    return found


def ways(spec: Spec) -> dict[str, dict[str, Any]]:
    """How each arm chooses; the first of those that differ in their reference alone."""
    found: dict[str, dict[str, Any]] = {}
    for arm, overrides in spec.arms.items():
        made = copy.deepcopy(dict(spec.base))
        apply(made, overrides)
        way = way_of(EvolvedSamplingConfig.from_mapping(made["evolved_sampling"]))
        if way not in found.values():
            found[arm] = way
    return found


def pictured(results: Mapping[str, Results]) -> list[str]:
    """Specs with a picture."""
    return [name for name in ("tuning", "proving") if name in results]


def overview(results: Results, file: Path) -> None:
    """A forest of every case: each arm's difference to uniform with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in results.cases if any(arm.losses for arm in case.arms.values())]
    columns = min(4, len(cases))
    rows = math.ceil(len(cases) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns + 1, 3.2 * rows), sharey=True, squeeze=False)
    names = [arm for arm in results.spec.arms if arm != "uniform"]
    for axis, case in zip(axes.flat, cases, strict=False):
        for place, name in enumerate(names):
            one: Any = case.arms[name].against["uniform"]
            if one.seeds:
                half = one.high - one.mean if math.isfinite(one.high) else 0.0
                color = {"wins": "C2", "loses": "C3"}.get(one.verdict, "C7")
                axis.errorbar(one.mean, place, xerr=half, fmt="o", capsize=2, markersize=4, color=color)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(case.case, fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.grid(alpha=0.3, axis="x")
    axes.flat[0].invert_yaxis()
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_visible(False)
    title = (
        f"{results.spec.path.stem}: loss minus that of uniform, nats, 95% (green below, red above, grey not told apart)"
    )
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _progress(name: str, results: Results) -> str:
    if results.finished >= results.spec.runs:
        return f"`{name}`: all {results.spec.runs} runs."
    return f"`{name}`: {results.finished} of {results.spec.runs} runs so far; what is missing is marked."


def _stages(results: Mapping[str, Results]) -> str:
    if "merged" not in results:
        return "not run yet"
    return stages.table(results["merged"], KeptRuns(QUALITY / "results" / "merged.json"), MEASURED)


def _share(value: float) -> str:
    return f"{value:.1%}"


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
