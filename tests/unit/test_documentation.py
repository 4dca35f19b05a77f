"""The pages of docs/: all in the navigation of the site, no dead link, and the site is built without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import es_megatron

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
MADE = "results/"
"""Pages that the benchmarks write; `results.md` leads to them."""


def settings() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def leaves(nav: Any) -> Iterator[str]:
    """Pages that a navigation names, in its order."""
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(each)


def links(text: str) -> list[str]:
    """What a page links to, blocks of code left out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose))


def install_block(text: str) -> list[str]:
    """The lines of the first block of commands."""
    found = re.search(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].splitlines()


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(leaves(settings()["nav"])) == [page for page in PAGES if not page.startswith(MADE)]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for link in links((DOCS / page).read_text(encoding="utf-8")):
        place = link.partition("#")[0]
        if place and "://" not in link:
            target = (DOCS / page).parent / place
            assert target.is_file(), link
            assert target.resolve().is_relative_to(DOCS), f"the site has no {link}"


def test_pages_that_are_made_can_be_reached() -> None:
    found = links((DOCS / "results.md").read_text(encoding="utf-8"))
    assert {page for page in PAGES if page.startswith(MADE)} <= set(found)


def test_install_steps_are_those_of_the_readme() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/index.md")]
    assert install_block(texts[0]) == install_block(texts[1])


def test_a_link_in_code_is_none() -> None:
    assert links("[a](b.md) `[c](d.md)`\n```\n[e](f.md)\n```\n![g](h.svg)") == ["b.md", "h.svg"]


def test_the_site_is_built_without_a_warning_and_has_the_front_door(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install es_megatron[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.relative_to(tmp_path).parent.as_posix() for path in tmp_path.rglob("index.html")}
    assert {page.removesuffix(".md") for page in PAGES if page != "index.md"} <= made
    text = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    errors = {name for name in es_megatron.__all__ if name.endswith("Error")}
    names = {f"errors.{name}" if name in errors else name for name in es_megatron.__all__ if name != "__version__"}
    assert {name for name in names if f'id="es_megatron.{name}"' not in text} == set()
