"""`es-megatron scores`: what it tells, what it writes, and that what it writes comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401 - before pyarrow, as in the commands
import yaml

from es_megatron.checkpoint import ScoreRange, save_es_state
from es_megatron.checkpoint.es_state import load_es_state
from es_megatron.cli import main
from es_megatron.data.manifest import Component, Manifest
from es_megatron.rank_grid import RankGrid
from es_megatron.score_files import files as score_files
from tests.unit.naive import make_manifest

ALONE = RankGrid.alone()
SIZES = (3000, 50, 7)
T = 16


def save(folder: Path, manifest: Manifest, seed: int = 0, coverage: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    visits = np.where(random.random(manifest.total) < coverage, random.integers(1, 256, manifest.total), 0)
    score = np.where(visits > 0, random.lognormal(0, 1, manifest.total), 0).astype(np.float32)
    state = {"engine": {"iteration": 40, "decided": [[1, 2, 31]] if len(manifest.components) > 1 else []}}
    save_es_state(
        folder, ScoreRange(manifest.total, 0, score, visits.astype(np.uint8)), {}, state, manifest.to_json(), ALONE
    )
    return score, visits.astype(np.uint8)


def write_blend(folder: Path) -> Path:
    """Two real components: `a` with documents of 10 tokens, `b` with one."""
    builder = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder
    for name, documents in (("a", [10] * 33), ("b", [200])):
        writer = builder(str(folder / f"{name}.bin"), np.uint16)
        for length in documents:
            writer.add_document(np.arange(length) % 50, [length])
        writer.finalize(str(folder / f"{name}.idx"))
    path = folder / "blend.yaml"
    path.write_text(
        yaml.safe_dump({"vocab_size": 64, "components": [{"name": n, "train": n, "weight": None} for n in "ab"]})
    )
    return path


def test_info_tells_distribution_age_and_coverage(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(score_files, "BLOCK", 700)
    manifest = make_manifest(SIZES)
    score, visits = save(tmp_path / "es_state", manifest)
    assert main(["scores", "info", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["iteration"] == 40
    for number, found in enumerate(told["components"]):
        part = slice(*manifest.offsets[number : number + 2])
        s, v = score[part], visits[part]
        seen = s[v > 0].astype(np.float64)
        assert found["component"] == f"c{number}"
        assert found["seen"] == len(seen)
        assert found["coverage"] == pytest.approx(len(seen) / len(s))
        assert found["mean"] == pytest.approx(seen.mean())
        assert found["deviation"] == pytest.approx(seen.std())
        assert found["highest"] == seen.max()
        assert found["visits"] == pytest.approx(v.mean())
        for q, value in zip(score_files.QUANTILES, found["quantiles"], strict=True):
            assert value == pytest.approx(np.quantile(seen, q, method="higher"), rel=1 / 100, abs=1e-9)
        ages = [np.mean((v >= low) & (v <= high)) for low, high in score_files.AGES]
        assert found["ages"] == pytest.approx(ages)
    assert main(["scores", "info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "after 40 iterations" in text
    assert "epoch 2 of `c1` were decided by the scores before iteration 31" in text


def test_info_of_a_component_without_scores(tmp_path: Path, capsys: Any) -> None:
    save(tmp_path, make_manifest((10,)), coverage=0.0)
    assert main(["scores", "info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["components"][0]
    assert found["mean"] is None
    assert found["coverage"] == 0
    assert main(["scores", "info", str(tmp_path)]) == 0


def test_no_scores_there_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert main(["scores", "info", str(tmp_path)]) == 2
    assert "must be an `es_state` folder, a checkpoint with one, or the folder of a run" in capsys.readouterr().err


def test_diff_counts_rows_and_correlates(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(score_files, "BLOCK", 64)
    manifest = make_manifest(SIZES)
    one = save(tmp_path / "1", manifest)
    two = save(tmp_path / "2", manifest, seed=1)
    assert main(["scores", "diff", str(tmp_path / "1"), str(tmp_path / "1")]) == 0
    assert "the scores are the same" in capsys.readouterr().out
    assert main(["scores", "diff", str(tmp_path / "1"), str(tmp_path / "2"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    for number, found in enumerate(told["components"]):
        part = slice(*manifest.offsets[number : number + 2])
        both = (one[1][part] > 0) & (two[1][part] > 0)
        x, y = one[0][part][both].astype(float), two[0][part][both].astype(float)
        assert found["changed"] == np.count_nonzero((one[0][part] != two[0][part]) | (one[1][part] != two[1][part]))
        assert found["both_seen"] == len(x)
        assert found["mean_distance"] == pytest.approx(np.abs(x - y).mean())
        assert found["mean_change"] == pytest.approx((y - x).mean())
        assert found["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    other = Manifest((*manifest.components[1:], Component("new", "p", 5, 1.0, "f")), 16)
    save(tmp_path / "3", other)
    assert main(["scores", "diff", str(tmp_path / "1"), str(tmp_path / "3")]) == 1
    text = capsys.readouterr().out
    assert "`c0` is in the first only" in text
    assert "`new` is in the second only" in text


def test_exported_scores_come_back_by_import(tmp_path: Path, capsys: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from es_megatron.frameworks.megatron_data import load_blend

    blend_path = write_blend(tmp_path)
    blend = load_blend(blend_path, T)
    score, visits = save(tmp_path / "state", blend.manifest)
    table = tmp_path / "scores.parquet"
    assert main(["scores", "export", str(tmp_path / "state"), str(table), "--blend", str(blend_path)]) == 0
    rows = parquet.read_table(table).to_pylist()
    assert len(rows) == blend.manifest.total == 20 + 12
    for number, row in enumerate(rows):
        component, place = (int(part[0]) for part in blend.manifest.locate(np.asarray([number])))
        documents = blend.datasets[component].documents_of(place)
        assert (row["component"], row["row"]) == ("ab"[component], place)
        assert (row["first_document"], row["last_document"]) == (documents[0], documents[-1])
        assert row["visits"] == visits[number]
        assert row["score"] == (score[number] if visits[number] else None)
    command = [
        "scores",
        "import",
        str(table),
        str(tmp_path / "back"),
        "--blend",
        str(blend_path),
        "--seq-length",
        str(T),
    ]
    assert main(command) == 0
    assert "scores.initial=" in capsys.readouterr().out
    back = load_es_state(tmp_path / "back", blend.manifest.total, ALONE, blend.manifest.to_json())
    np.testing.assert_array_equal(back.score, score)
    np.testing.assert_array_equal(back.visits, visits)
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["scores", "export", str(tmp_path / "back"), str(table)]) == 0
    assert parquet.read_table(table)["first_document"].null_count == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"component": "zzz"}, "scores of component `zzz`, but the blend has a, b"),
        ({"row": 20}, r"Rows of `a` .* must be in \[0, 20\) .* but row 20"),
        ({"row": -1}, "row -1"),
        ({"score": float("nan")}, "score nan"),
        ({"score": -0.5}, "score -0.5"),
        ({"score": float("nan"), "visits": 3}, "score nan"),
        ({"score": "high"}, "Column `score` of .* must hold numbers"),
        ({"row": 1.5}, "Column `row` of .* must hold whole numbers"),
        ({"row": None}, "Column `row` of .* must have a value in every row, but lacks 1"),
        ({"visits": -1}, r"`visits` .* must be in \[0, 255\], but row 3 has -1"),
        ({"visits": 300}, r"`visits` .* must be in \[0, 255\], but row 3 has 300"),
        ({"visits": 2.5}, "Column `visits` of .* must hold whole numbers"),
        ({"visits": None}, "Column `visits` of .* lacks 1"),
        ({"seq_length": 2 * T}, "`--seq-length` must be 32 for the scores of .*, but is 16"),
        ({"drop": "row"}, "`row` is missing"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, capsys: Any, change: Any, message: str) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    blend = write_blend(tmp_path)
    row = {"component": "a", "row": 3, "score": 1.5}
    row |= {name: value for name, value in change.items() if name != "drop"}
    row.pop(change.get("drop", ""), None)
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    command = ["scores", "import", str(tmp_path / "t.parquet"), str(tmp_path / "out"), "--blend", str(blend)]
    assert main([*command, "--seq-length", str(T)]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block", [1, 100], ids=["in two blocks", "in one"])
def test_a_row_that_stands_twice_is_refused(block: int, tmp_path: Path, capsys: Any) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    blend = write_blend(tmp_path)
    rows = [{"component": "a", "row": row, "score": 1.5} for row in (3, 4, 3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=block)
    command = ["scores", "import", str(tmp_path / "t.parquet"), str(tmp_path / "out"), "--blend", str(blend)]
    assert main([*command, "--seq-length", str(T)]) == 2
    assert "Each row of `a` must stand once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_of_one_sequence_length_are_refused_at_another(tmp_path: Path, capsys: Any) -> None:
    """Also where every row of the shorter table is one of the longer blend."""
    pytest.importorskip("pyarrow")
    from es_megatron.frameworks.megatron_data import load_blend

    blend = write_blend(tmp_path)
    save(tmp_path / "state", load_blend(blend, 2 * T).manifest)
    assert main(["scores", "export", str(tmp_path / "state"), str(tmp_path / "t.parquet")]) == 0
    command = ["scores", "import", str(tmp_path / "t.parquet"), str(tmp_path / "out"), "--blend", str(blend)]
    assert main([*command, "--seq-length", str(T)]) == 2
    assert f"`--seq-length` must be {2 * T}" in capsys.readouterr().err
    assert main([*command, "--seq-length", str(2 * T)]) == 0


def test_a_score_without_visits_counts_as_settled(tmp_path: Path, capsys: Any) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    blend = write_blend(tmp_path)
    rows = [{"component": "b", "row": 4, "score": 2.5}, {"component": "b", "row": 5, "score": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    command = ["scores", "import", str(tmp_path / "t.parquet"), str(tmp_path / "out"), "--blend", str(blend)]
    assert main([*command, "--seq-length", str(T)]) == 0
    assert "b: 1 of 12 samples have a score" in capsys.readouterr().out
    back = load_es_state(tmp_path / "out", 32, ALONE)
    assert np.flatnonzero(back.visits).tolist() == [24]
    assert back.visits[24] == 255
    assert back.score[24] == 2.5
