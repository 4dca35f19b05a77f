"""Files that a public repository has: the image's recipe, the citation, the forms of issues, the workflow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import es_megatron

ROOT = Path(__file__).parents[2]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile, each on one line."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def commands() -> list[str]:
    """What the Dockerfile runs, in order."""
    return [each.strip() for word, rest in instructions() if word == "RUN" for each in rest.split(" && ")]


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_image_is_installed_as_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (install,) = re.findall(r"^## Install\n\n```bash\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    steps = install.splitlines()
    others = re.compile(r"apt-get |rm -rf /var/lib/apt/lists/\*$|useradd ")
    assert list(dict.fromkeys(each for each in commands() if not others.match(each))) == steps


def test_the_image_holds_to_the_usual_rules() -> None:
    found = instructions()
    words = [word for word, _ in found]
    assert words[:2] == ["ARG", "FROM"]
    (base,) = [rest for word, rest in found if word == "ARG"]
    assert re.fullmatch(r"BASE=[a-z0-9/.-]+:[a-z0-9.-]+", base), "a base with a version"
    assert not base.endswith("latest")
    assert dict(found)["FROM"] == "${BASE}"
    assert "ADD" not in words
    for each in commands():
        if each.startswith("apt-get install"):
            assert {"--yes", "--no-install-recommends"} <= set(each.split())
    assert "rm -rf /var/lib/apt/lists/*" in commands()
    assert ("ENV", "PIP_NO_CACHE_DIR=1") in found
    shells = [rest for word, rest in found if word in ("SHELL", "ENTRYPOINT", "CMD")]
    assert all(rest.startswith('["') for rest in shells)
    assert all(rest.startswith("/") for word, rest in found if word == "WORKDIR")
    assert [rest for word, rest in found if word == "USER"][-1] not in ("root", "0")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".*", "data", "runs"} <= set(ignored)
    assert not {"patches", "launch", "configs", "es_megatron", "README.md"} & set(ignored), "the package needs them"


def test_the_citation_has_what_its_format_asks_for() -> None:
    found = parsed(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert (found["cff-version"], found["type"], found["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert found["version"] == es_megatron.__version__
    (paper,) = found["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["url"].endswith("2509.23461")
    assert all({"family-names", "given-names"} <= set(author) for author in paper["authors"])


@pytest.mark.parametrize("name", ["bug", "question"])
def test_the_forms_ask_for_the_doctor(name: str) -> None:
    form = parsed(FORMS / f"{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    asked = {part["id"]: part for part in form["body"]}["doctor"]
    assert "es-megatron doctor" in asked["attributes"]["label"]
    assert asked["validations"]["required"] == (name == "bug")
    for part in form["body"]:
        assert part["type"] == "textarea"
        assert part["attributes"]["label"]
    assert parsed(FORMS / "config.yml") == {"blank_issues_enabled": False}


def test_the_workflow_calls_what_is_here() -> None:
    (job,) = parsed(ROOT / ".github" / "workflows" / "ci.yml")["jobs"].values()
    ran = [step["run"] for step in job["steps"] if "run" in step]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert ".ci/run" in ran
    for command in ran:
        program, *targets = command.split()
        assert (ROOT / program).is_file() or program == "make"
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    used = set(job["env"]) - {"ES_REQUIRE_NEWEST"}
    assert all(f"{name} ?=" in makefile for name in used)
