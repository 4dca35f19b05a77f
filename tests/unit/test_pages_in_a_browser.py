"""The pages of `report` and `compare` in a real browser, wide and as narrow as a telephone; skipped without one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401 - before pyarrow, as in the commands

from es_megatron.bench.page import page
from es_megatron.bench.results import conclude
from es_megatron.bench.spec import read_spec
from es_megatron.cli import main
from tests.metrics_run import finish, plan_of, write_run
from tests.unit.test_compare_results import ARMS, outcomes_of
from tests.unit.test_compare_spec import PATH, changed

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
WIDTHS = (1400, 390)
LETTERS = 9.0
"""Pixels that the smallest letters of a figure, of 8 points, must have."""
INCHES = {1400: 8.4, 390: 3.5}
"""Of a figure as drawn for a width."""

MEASURE = """
<script>
addEventListener("load", async () => {
  const root = document.documentElement, wide = root.clientWidth;
  const beyond = [...document.body.querySelectorAll("*")].filter(each => !each.closest(".wide table")
    && (each.getBoundingClientRect().right > wide + 1
      || each.scrollWidth > each.clientWidth + 1 && each.clientWidth && !each.matches(".wide, .track")))
    .map(each => each.outerHTML.slice(0, 80));
  const images = await Promise.all([...document.images].map(async image => {
    await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    const dots = pen.getImageData(0, 0, canvas.width, canvas.height).data;
    let coloured = 0;
    for (let i = 0; i < dots.length; i += 4)
      coloured += Math.max(dots[i], dots[i + 1], dots[i + 2]) - Math.min(dots[i], dots[i + 1], dots[i + 2]) > 40;
    return {name: image.alt, shown: image.clientWidth, coloured, ratio: image.naturalWidth / image.naturalHeight};
  }));
  const place = each => each.getBoundingClientRect();
  const rows = [...document.querySelectorAll(".row")].map(row => ({
    name: row.querySelector(".name").textContent, dot: place(row.querySelector(".dot")).x,
    line: place(row.querySelector(".line")).width, track: place(row.querySelector(".track")).toJSON()}));
  parent.postMessage({page: document.title, width: innerWidth, wide, needed: root.scrollWidth, beyond, images, rows,
    text: Math.min(...[...document.querySelectorAll("p, td, li, figcaption")].map(
      each => parseFloat(getComputedStyle(each).fontSize)))}, "*");
});
</script>
"""
HOST = """<!doctype html><pre></pre>{frames}
<script>const found = [];
addEventListener("message", each => {{ found.push(each.data);
  document.querySelector("pre").textContent = JSON.stringify(found); }});</script>
"""


def in_browser(folder: Path, pages: Mapping[str, str]) -> dict[tuple[str, int], Any]:
    """Show pages in frames of every width, since a window has a least one, and return what each has measured."""
    frames = ""
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text.replace("</body>", f"{MEASURE}</body>"))
        frames += "".join(f'<iframe src="{name}.html" width="{w}" height="900"></iframe>' for w in WIDTHS)
    (folder / "host.html").write_text(HOST.format(frames=frames))
    flags = [
        "--headless",
        "--hide-scrollbars",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=20000",
    ]
    command = [str(BROWSER), *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "host.html").as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    found = re.search(r"<pre>(.+?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return {(each["page"], each["width"]): each for each in json.loads(html.unescape(found[1]))}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    if BROWSER is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    folder = tmp_path_factory.mktemp("pages")
    long = "a_component_with_a_name_that_does_not_fit_anywhere"
    for name, plan in (("es", plan_of(anneal=0.1, pruning_ratio=0.2)), ("plain", plan_of(arm="plain"))):
        write_run(folder / name, plan, plan.schedule.iterations)
        for path in (folder / name).glob("*.jsonl"):
            path.write_text(path.read_text().replace('"c0"', f'"{long}"'))
        finish(folder / name, {"training": {"lr": 0.001}})
    assert main(["report", str(folder / "es"), "--control", str(folder / "plain")]) == 0
    arms = {**ARMS, f"{long}_at_equal_cost": {"evolved_sampling.arm": "uniform"}}
    spec = read_spec(
        changed(
            arms=arms,
            references=["uniform", "plain"],
            equal_cost=["es", "uniform"],
            seeds=[1, 2, 3],
            learning_rates=[1e-3],
            search_seeds=[],
        ),
        PATH,
    )
    losses = {name: [4.0 + 0.1 * n + seed for seed in (0.0, 0.01 * n, 0.02)] for n, name in enumerate(arms)}
    compared = page(conclude(spec, outcomes_of(losses)))
    found = in_browser(folder, {"report": (folder / "es" / "report" / "report.html").read_text(), "compare": compared})
    return {("report" if "Evolved" in title else "compare", width): each for (title, width), each in found.items()}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_nothing_is_wider_than_the_page(shown: Any, name: str, width: int) -> None:
    found = shown[name, width]
    assert found["beyond"] == []
    assert found["needed"] <= found["wide"]
    assert found["text"] >= 12


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_of_a_report_has_data_and_can_be_read(shown: Any, width: int) -> None:
    images = shown["report", width]["images"]
    assert len(images) == 9
    for image in images:
        assert image["coloured"] > 300, image
        assert image["shown"] / INCHES[width] * 8 / 72 >= LETTERS, image
    narrower = [image["ratio"] for image in shown["report", 390]["images"]]
    assert all(narrow < image["ratio"] for narrow, image in zip(narrower, shown["report", 1400]["images"], strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_arm_of_a_comparison_has_its_place(shown: Any, width: int) -> None:
    rows = shown["compare", width]["rows"]
    assert len(rows) == 3
    assert len({row["dot"] for row in rows}) == 3
    for row in rows:
        assert row["track"]["width"] > 150
        assert 0 <= row["line"] <= row["track"]["width"]
        assert row["track"]["x"] - 5 <= row["dot"] <= row["track"]["x"] + row["track"]["width"]
    assert max(row["line"] for row in rows) > 5
