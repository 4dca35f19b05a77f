"""What is shipped: folders beside the package are found in a checkout and in an installed wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from es_megatron import resources
from es_megatron.errors import ConfigError

CHECKOUT = Path(__file__).parents[2]
SHIPPED = ("patches", "launch", "configs")


@pytest.mark.parametrize("name", SHIPPED)
def test_checkout_gives_its_own_folders(name: str) -> None:
    assert resources.resource(name) == CHECKOUT / name  # pyright: ignore[reportArgumentType]


def test_shipped_folder_is_preferred_over_one_that_stands_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "es_megatron")
    (tmp_path / "launch").mkdir()
    assert resources.resource("launch") == tmp_path / "launch"
    shipped = tmp_path / "es_megatron" / "_shipped" / "launch"
    shipped.mkdir(parents=True)
    assert resources.resource("launch") == shipped


def test_missing_folder_names_the_places_and_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "es_megatron")
    with pytest.raises(ConfigError, match=r"`patches` must be at .*_shipped/patches or .*reinstall es_megatron"):
        resources.resource("patches")


@pytest.mark.slow
def test_wheel_holds_the_shipped_folders_and_finds_them(tmp_path: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    for name in filter(None, tracked.stdout.split("\0")):
        if (CHECKOUT / name).is_file():  # a build must not write into the checkout
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((CHECKOUT / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('../dist'))"
    (tmp_path / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=100)
    (wheel,) = (tmp_path / "dist").glob("es_megatron-0.1.0-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")

    for folder in SHIPPED:
        expected = {
            f"es_megatron/_shipped/{path.relative_to(source)}"
            for path in (source / folder).rglob("*")
            if path.is_file()
        }
        assert expected
        assert expected <= names
    assert {"es_megatron/py.typed", "es_megatron/report/page.html.j2"} <= names
    assert not [name for name in names if name.startswith("tests/")]

    ask = "from es_megatron.resources import resource; print(resource('patches'))"
    found = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path / "installed", check=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.strip() == str((tmp_path / "installed" / "es_megatron" / "_shipped" / "patches").resolve())
