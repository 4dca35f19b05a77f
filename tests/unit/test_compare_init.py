"""`es-megatron compare --init`: a spec for text of one's own that can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from es_megatron.bench import init
from es_megatron.bench.runs import CaseBlend, check_arms
from es_megatron.bench.spec import load_spec
from es_megatron.cli import main
from tests.unit.test_prepare import make_texts, write_lines


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "text.jsonl", make_texts(4000))


def test_a_spec_of_ones_own_can_run(text: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(init.os, "cpu_count", lambda: 4)
    path = tmp_path / "own.yaml"
    assert main(["compare", "--init", str(path), "--component", f"mine={text}", "--minutes", "60"]) == 0
    assert f"Next: es-megatron compare {path}" in capsys.readouterr().out
    spec = load_spec(path)
    assert spec.jobs == 4
    assert list(spec.cases) == ["own"]
    assert spec.blends["own"].components == (f"mine={text}",)
    check_arms(spec, {"own": CaseBlend(Path("blend.yaml"), {})})
    whole = spec.blends["own"].max_megabytes
    path.unlink()
    assert main(["compare", "--init", str(path), "--component", f"mine={text}", "--minutes", "1.5"]) == 0
    less = load_spec(path).blends["own"].max_megabytes
    assert less is not None
    assert whole is not None
    assert less < whole <= 0.01 + 1e-6 * text.stat().st_size


def test_what_cannot_be_is_told(text: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    path = tmp_path / "own.yaml"
    for arguments, words in (
        (["--component", f"mine={text}", "--minutes", "0.1"], "too little to compare on"),
        (["--component", "mine=gone.jsonl"], "`gone.jsonl` of component `mine` does not exist"),
        ([], "`--component NAME=PATH` must be given"),
    ):
        assert main(["compare", "--init", str(path), *arguments]) == 2
        assert words in capsys.readouterr().err
        assert not path.exists()
    path.write_text("mine")
    assert main(["compare", "--init", str(path), "--component", f"mine={text}"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "A SPEC must be given" in capsys.readouterr().err
    monkeypatch.setattr(init.sys.stdin, "isatty", lambda: True, raising=False)
    answers = iter([f"mine={text}", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    path.unlink()
    assert main(["compare", "--init", str(path)]) == 0
    assert path.is_file()
