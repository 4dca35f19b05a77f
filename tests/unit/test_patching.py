"""The registry of patches, on small packages that the tests write."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from es_megatron.errors import ConfigError, PatchError
from es_megatron.patching import (
    PatchList,
    apply,
    check,
    list_patches,
    patch_and_report,
    read_patches,
    report,
    undo,
    untested,
    upstream_version,
    upstreams,
)
from es_megatron.patching.declaration import Patch

UPSTREAM = '''
def step(model, optimizer):
    """One step."""
    return model + optimizer

def save(iteration):
    return f"saved {iteration}"

class Loop:
    def run(self, length):
        return length
'''

GLUE = """
def twice(original):
    def replacement(*args, **kwargs):
        return 2 * original(*args, **kwargs)
    return replacement

def loud(original):
    return lambda *args, **kwargs: original(*args, **kwargs).upper()
"""

LIST = """
upstream: small
version: {package}.info:VERSION
tested: ["1.2", "1.4"]
broken:
  - versions: ">=1.3.1,<1.3.3"
    why: it saves twice
patches:
  - name: step
    target: {package}.training:step
    glue: {package}_glue:twice
    parameters: [model]
    why: doubles
  - name: save
    target: {package}.training:save
    glue: {package}_glue:loud
    parameters: [iteration]
    why: shouts
  - name: loop
    target: {package}.training:Loop.run
    glue: {package}_glue:twice
    versions: ">=1.4"
    parameters: [length]
    why: doubles a method; only from 1.4 on
"""


class Small:
    """An upstream of the test's own."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        (root / name).mkdir()
        (root / name / "__init__.py").touch()
        self.write("1.4.2", UPSTREAM)
        (root / f"{name}_glue.py").write_text(GLUE)
        (root / "patches.yaml").write_text(LIST.format(package=name))

    def write(self, version: str, code: str) -> None:
        (self.root / self.name / "info.py").write_text(f'VERSION = "{version}"')
        (self.root / self.name / "training.py").write_text(code)

    @property
    def patches(self) -> PatchList:
        return read_patches(self.root / "patches.yaml")

    @property
    def training(self) -> Any:
        return importlib.import_module(f"{self.name}.training")


_count = iter(range(1000))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module rewritten within a second would be found stale
    name = f"small_upstream_{next(_count)}"
    yield Small(tmp_path, name)
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def states(small: Small) -> dict[str, str]:
    return {status.patch.name: status.state for status in check(small.patches)}


def test_apply_and_undo(small: Small) -> None:
    step = small.training.step
    assert states(small) == {"step": "ready", "save": "ready", "loop": "ready"}
    statuses = apply(small.patches)
    assert small.training.step(1, optimizer=2) == 6
    assert small.training.save(3) == "SAVED 3"
    assert small.training.Loop().run(4) == 8
    assert [status.state for status in statuses] == ["applied"] * 3
    assert small.training.step.__doc__ == "One step."
    assert list(inspect.signature(small.training.step).parameters) == ["model", "optimizer"]
    assert undo(small.patches) == ["loop", "save", "step"]
    assert small.training.step is step
    assert small.training.Loop().run(4) == 4
    assert states(small) == {"step": "ready", "save": "ready", "loop": "ready"}


def test_checking_changes_nothing(small: Small) -> None:
    before = dict(vars(small.training))
    check(small.patches)
    assert vars(small.training) == before


def test_twice_is_once(small: Small) -> None:
    apply(small.patches)
    wrapped = small.training.step
    apply(small.patches)
    assert small.training.step is wrapped
    assert small.training.step(1, 2) == 6
    assert undo(small.patches) == ["loop", "save", "step"]
    assert undo(small.patches) == []
    assert small.training.step(1, 2) == 3


def test_missing_target_patches_nothing(small: Small) -> None:
    small.write("1.4.2", UPSTREAM.replace("def save", "def store"))
    step = small.training.step
    with pytest.raises(
        PatchError, match=r"`small_upstream_\d+.training:save` does not exist.*Use a version of small that was tested"
    ):
        apply(small.patches)
    assert small.training.step is step
    assert states(small) == {"step": "ready", "save": "missing", "loop": "ready"}


def test_missing_module(small: Small) -> None:
    (small.root / small.name / "training.py").unlink()
    assert set(states(small).values()) == {"missing"}
    with pytest.raises(PatchError, match="Nothing was patched: module `small_upstream_"):
        apply(small.patches)


def test_module_whose_own_imports_fail_is_told_apart(small: Small) -> None:
    small.write("1.4.2", "import a_package_that_is_not_there\n")
    with pytest.raises(PatchError, match=r"cannot be imported: No module named 'a_package.*Install what it needs"):
        check(small.patches)


def test_changed_signature_patches_nothing(small: Small) -> None:
    small.write("1.4.2", UPSTREAM.replace("def save(iteration)", "def save(step)").replace("{iteration}", "{step}"))
    with pytest.raises(PatchError, match=r"training:save` must take `iteration`, but takes \(step\) instead"):
        apply(small.patches)
    assert small.training.step(1, 2) == 3
    assert states(small)["save"] == "changed"


def test_target_that_is_no_function(small: Small) -> None:
    small.write("1.4.2", UPSTREAM + "\nsave = 3\n")
    with pytest.raises(PatchError, match="must be a function, but is int instead"):
        apply(small.patches)


@pytest.mark.parametrize("version", ["1.3.0", "1.5.0", "2.0", "0.9", "1.6.0rc2+abc"])
def test_untested_version_is_judged_by_what_it_offers(small: Small, version: str) -> None:
    small.write(version, UPSTREAM)
    line = untested(small.patches)
    assert line == f"small {version} has not been tested with these patches (1.2, 1.4 have)"
    with pytest.raises(
        PatchError, match=rf"{re.escape(line)}, and `--es-strict-versions` is given\. Use a version of small"
    ):
        apply(small.patches, strict=True)
    assert small.training.step(1, 2) == 3
    assert {status.state for status in apply(small.patches)} == {"applied"}
    assert small.training.step(1, 2) == 6


def test_untested_version_that_lacks_a_target_is_refused(small: Small) -> None:
    small.write("1.5.0", UPSTREAM.replace("def save(iteration)", "def store(iteration)"))
    with pytest.raises(PatchError, match=r"training:save` does not exist"):
        apply(small.patches)
    assert small.training.step(1, 2) == 3


def test_tested_version_runs_under_strict_versions(small: Small) -> None:
    assert untested(small.patches) is None
    assert {status.state for status in apply(small.patches, strict=True)} == {"applied"}


@pytest.mark.parametrize(
    ("version", "broken"), [("1.3.0", False), ("1.3.1", True), ("1.3.2rc1", True), ("1.3.3", False)]
)
def test_version_known_to_break_is_refused(small: Small, version: str, broken: bool) -> None:
    small.write(version, UPSTREAM)
    assert (set(states(small).values()) == {"refused"}) is broken
    if broken:
        with pytest.raises(PatchError, match=f"small {re.escape(version)} is known not to work: it saves twice"):
            apply(small.patches)


def test_entries_of_other_versions_are_left_out(small: Small) -> None:
    small.write("1.2.7", UPSTREAM)
    apply(small.patches)
    assert states(small) == {"step": "applied", "save": "applied"}
    assert small.training.Loop().run(4) == 4


def test_upstream_that_is_not_there(small: Small) -> None:
    (small.root / small.name / "info.py").unlink()
    with pytest.raises(PatchError, match=r"small cannot be found: .*PYTHONPATH"):
        upstream_version(small.patches)


def test_undo_beneath_another_wrapper_is_refused(small: Small) -> None:
    import functools

    apply(small.patches)
    ours = small.training.step

    @functools.wraps(ours)
    def theirs(*args: Any) -> Any:
        return ours(*args)

    small.training.step = theirs
    assert states(small)["step"] == "applied"
    with pytest.raises(PatchError, match="wrapped by something else after"):
        undo(small.patches)
    assert small.training.save(1) == "SAVED 1", "nothing was undone"
    small.training.step = ours
    assert undo(small.patches) == ["loop", "save", "step"]


def test_report_lists_every_patch(small: Small) -> None:
    lines = report(small.patches, apply(small.patches))
    assert lines[0] == "es_megatron patches small 1.4.2:"
    assert [line.split(": ")[1] for line in lines[1:]] == ["doubles", "shouts", "doubles a method; only from 1.4 on"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("upstream: small", "upstrem: small"), "Unknown key `upstrem`"),
        (("training:step", "training.step"), "`target` must be of the form `module:attribute`"),
        (('">=1.4"', '"1.4"'), "`versions` must be a range such as"),
        (('">=1.3.1,<1.3.3"', '""'), "`versions` must be a range of versions"),
        (('["1.2", "1.4"]', "[]"), "`tested` must be a list with at least one version"),
        (('["1.2", "1.4"]', '["1.2", "next"]'), "A version must be of the form `0.16.1`, but is 'next'"),
        (('["1.2", "1.4"]', "[1.2, 1.4]"), "must be of type str, but is 1.2"),
        (("patches:", "patches: ["), "must be YAML"),
    ],
)
def test_declaration_is_checked(small: Small, change: tuple[str, str], told: str) -> None:
    path = small.root / "patches.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ConfigError, match=told.replace("[", r"\[")):
        read_patches(path)


def test_unknown_upstream() -> None:
    with pytest.raises(ConfigError, match=r"no patches for `megatron`. Use one of: .*megatron-lm"):
        read_patches("megatron")


@pytest.mark.parametrize("upstream", upstreams())
def test_shipped_declarations_and_their_glue(upstream: str) -> None:
    patches = list_patches(upstream)
    assert len({patch.name for patch in patches}) == len(patches)
    for patch in patches:
        source = find_glue(patch)
        lines = [line for line in source.splitlines() if line.strip() and '"""' not in line]
        assert len(lines) <= 10, f"glue of {patch.name} has {len(lines)} lines"


def find_glue(patch: Patch) -> str:
    """The source of a glue function, without importing it: it imports megatron."""
    import ast

    module, _, name = patch.glue.partition(":")
    path = Path(__file__).parents[2] / f"{module.replace('.', '/')}.py"
    text = path.read_text()
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{module} has no `{name}`"
    source = ast.get_source_segment(text, functions[name])
    assert source is not None
    return source


def test_what_is_no_version_is_refused(small: Small) -> None:
    small.write("main", UPSTREAM)
    with pytest.raises(ConfigError, match=r"must be of the form `0\.16\.1`, but is 'main'"):
        check(small.patches)


def test_strictness_is_read_off_the_command_line(small: Small, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Patches are applied before the script parses anything."""
    small.write("1.5.0", UPSTREAM)
    monkeypatch.setattr("es_megatron.patching.registry.read_patches", lambda _: small.patches)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--es", "--es-strict-versions"])
    with pytest.raises(PatchError, match=r"`--es-strict-versions` is given"):
        patch_and_report("small")
    assert small.training.step(1, 2) == 3
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--es"])
    patch_and_report("small")
    assert small.training.step(1, 2) == 6
    *_, last = capsys.readouterr().out.splitlines()
    assert last == (
        "es_megatron: small 1.5.0 has not been tested with these patches (1.2, 1.4 have); every target is as declared, "
        "so it runs (--es-strict-versions refuses it)"
    )


def test_importing_the_registry_changes_nothing() -> None:
    code = """
    import sys
    import es_megatron.patching as patching
    patching.list_patches("megatron-lm")
    assert not [name for name in sys.modules if name.startswith(("megatron", "deepspeed"))]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=110)
