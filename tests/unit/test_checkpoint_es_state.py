from __future__ import annotations

import errno
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from es_megatron.algorithm.ownership import shard_bounds
from es_megatron.checkpoint import (
    EsState,
    ScoreRange,
    check_manifest,
    disk,
    es_state,
    load_es_state,
    save_es_state,
    sealed,
)
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid
from tests.checkpoint_helper import MANIFEST, MASKS, Disk, make_scores, on_threads, own_scores

STATE = {"iteration": 7, "positions": [2**60 + 1, 3], "policy": {"weights": [0.1, 1e-300, float("inf")]}}
ALONE = RankGrid.alone()


def save(folder: Path, n: int, dp_size: int, mp_size: int = 1, seed: int = 0) -> list[Any]:
    def body(grid: RankGrid) -> Any:
        masks = MASKS if grid.world_rank == 0 else {}
        return save_es_state(folder, own_scores(n, grid, seed), masks, STATE, MANIFEST, grid)

    return on_threads(dp_size, body, mp_size)


def load(folder: Path, n: int, dp_size: int, mp_size: int = 1) -> list[Any]:
    return on_threads(dp_size, lambda grid: load_es_state(folder, n, grid), mp_size)


def check_whole(states: list[EsState], n: int, mp_size: int = 1, seed: int = 0) -> None:
    score, visits = make_scores(n, seed)
    low = 0
    for rank, state in enumerate(states):
        if rank % mp_size:
            assert state.low == states[rank - 1].low
        else:
            assert state.low == low
            low = state.high
        np.testing.assert_array_equal(state.score, score[state.low : state.high])
        np.testing.assert_array_equal(state.visits, visits[state.low : state.high])
        assert state.state == STATE
        assert state.manifest == MANIFEST
        assert {key: bytes(mask) for key, mask in state.masks.items()} == {k: bytes(m) for k, m in MASKS.items()}
    assert low == n


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "es_state"
    save(folder, 103, 2)
    return folder


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_any_number_of_ranks_to_any_other(tmp_path: Path, before: int, after: int) -> None:
    n = 100_003
    reports = save(tmp_path / "es_state", n, before)
    files = [path.stat().st_size for path in (tmp_path / "es_state").iterdir() if path.name != "manifest.json"]
    assert [report.bytes for report in reports] == [sum(files)] * before
    check_whole(load(tmp_path / "es_state", n, after), n)
    assert [path.name for path in tmp_path.iterdir()] == ["es_state"]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 4000), before=st.integers(1, 9), after=st.integers(1, 9), mp=st.integers(1, 2))
def test_round_trip_of_any_size(n: int, before: int, after: int, mp: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "es_state"), n, before, mp)
        check_whole(load(Path(folder, "es_state"), n, after, mp), n, mp)


def test_more_ranks_than_shards(tmp_path: Path) -> None:
    save(tmp_path / "es_state", 3, 5)
    assert len(list((tmp_path / "es_state").glob("scores-*"))) == 3
    check_whole(load(tmp_path / "es_state", 3, 4), 3)


def test_only_the_first_model_parallel_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[str] = []
    original = es_state.write_tensors
    monkeypatch.setattr(es_state, "write_tensors", lambda path, t: (writers.append(path.name), original(path, t))[1])
    save(tmp_path / "es_state", 103, 2, mp_size=3)
    names = ["masks", "scores-00000-of-00002", "scores-00001-of-00002"]
    assert sorted(writers) == [f"{name}.safetensors" for name in names]


def test_the_stock_library_reads_it(saved: Path) -> None:
    score, visits = make_scores(103)
    tensors = {name: t for path in saved.glob("*.safetensors") for name, t in load_file(path).items()}
    shards = range(len(shard_bounds(103)) - 1)
    np.testing.assert_array_equal(np.concatenate([tensors[f"score.{v:05d}"] for v in shards]), score)
    np.testing.assert_array_equal(np.concatenate([tensors[f"visits.{v:05d}"] for v in shards]), visits)
    assert bytes(tensors["mask.00000.00001"]) == MASKS[0, 1]


def test_a_rank_reads_only_what_it_owns(saved: Path) -> None:
    (saved / "scores-00001-of-00002.safetensors").unlink()
    answers = on_threads(2, lambda grid: es_state._read(saved, 103, grid, None))
    assert isinstance(answers[0], EsState)
    assert isinstance(answers[1], CheckpointError)


@pytest.mark.parametrize("bounds", [[0, 103], [0, 1, 50, 51, 103], list(range(104))])
def test_shards_cut_by_another_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: list[int]) -> None:
    monkeypatch.setattr(es_state, "shard_bounds", lambda _: np.asarray(bounds, np.int64))
    save(tmp_path / "es_state", 103, 1)
    monkeypatch.undo()
    for after in (1, 2, 3, 7):
        check_whole(load(tmp_path / "es_state", 103, after), 103)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_saved_survives_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    if again:
        save(tmp_path / "es_state", 103, 1)
    standin = Disk()
    monkeypatch.setattr(disk, "os", standin)
    save(tmp_path / "es_state", 103, 1, seed=4)
    assert standin.steps > 0
    assert standin.at_risk() == []


def test_saving_again_replaces(saved: Path) -> None:
    save(saved, 103, 3, seed=5)
    check_whole(load(saved, 103, 2), 103, seed=5)
    assert [path.name for path in saved.parent.iterdir()] == ["es_state"]


def test_every_damaged_bit_is_noticed_or_harmless(saved: Path) -> None:
    files = sorted(saved.iterdir())
    places = [(path, byte) for path in files for byte in range(path.stat().st_size)]
    generator = np.random.default_rng(3)
    noticed = 0
    for index in generator.choice(len(places), 600, replace=False):
        path, byte = places[index]
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[byte] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        try:
            check_whole([load_es_state(saved, 103, ALONE)], 103)  # harmless only if all is equal
        except CheckpointError as error:
            noticed += 1
            assert path.name in str(error)  # noqa: PT017 - both outcomes are looked at
        path.write_bytes(content)
    assert noticed > 550


@pytest.mark.parametrize("kept", ["none", "half", "all but one byte", "missing"])
@pytest.mark.parametrize(
    "name", ["scores-00001-of-00002.safetensors", "masks.safetensors", "state.json", "manifest.json"]
)
def test_a_truncated_or_missing_file_fails_on_every_rank(saved: Path, name: str, kept: str) -> None:
    path = saved / name
    content = path.read_bytes()
    lengths = {"none": 0, "half": len(content) // 2, "all but one byte": len(content) - 1}
    path.write_bytes(content[: lengths.get(kept, 0)])
    if kept == "missing":
        path.unlink()
    errors = load(saved, 103, 3)
    assert all(isinstance(error, CheckpointError) and name in str(error) for error in errors)


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("name", ["scores-00002-of-00003", "masks", "state.json", "manifest.json"])
def test_a_write_that_fails_on_one_rank_fails_on_all(
    saved: Path, monkeypatch: pytest.MonkeyPatch, name: str, cause: int
) -> None:
    class FullDisk(Disk):
        def write(self, fd: int, data: Any) -> int:
            if name in self._names[fd]:
                raise OSError(cause, "no")
            return super().write(fd, data)

    monkeypatch.setattr(disk, "os", FullDisk())
    errors = save(saved, 103, 3, seed=9)
    assert all(isinstance(error, CheckpointError) and name in str(error) for error in errors)
    assert cause != errno.ENOSPC or "free space" in str(errors[0])
    monkeypatch.undo()
    assert [path.name for path in saved.parent.iterdir()] == ["es_state"]
    check_whole(load(saved, 103, 2), 103)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    program = shutil.which("mount")
    if (
        program is None
        or subprocess.run(
            [program, "-t", "tmpfs", "-o", "size=200k", "tmpfs", mount], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    try:
        save(mount / "es_state", 1003, 2)
        errors = save(mount / "es_state", 100_003, 2)
        assert all(isinstance(error, CheckpointError) and "No space left on device" in str(error) for error in errors)
        assert [path.name for path in mount.iterdir()] == ["es_state"]
        check_whole(load(mount / "es_state", 1003, 2), 1003)
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize(
    ("state", "said"),
    [({1: 2}, "has 1"), ({"a": [{"b": {3: 4}}]}, "state`['a'][0]['b']"), ({"a": np.float32(1)}, "JSON")],
)
def test_state_that_would_not_read_back_is_refused(tmp_path: Path, state: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        save_es_state(tmp_path / "es_state", own_scores(103, ALONE), {}, state, MANIFEST, ALONE)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_are_not_this_ranks_are_refused(tmp_path: Path) -> None:
    score, visits = make_scores(103)
    wrong = [
        ScoreRange(103, 0, score[:100], visits[:100]),
        ScoreRange(103, 1, score, visits),
        ScoreRange(103, 0, score, visits[:50]),
        ScoreRange(103, 0, score.astype(np.float64), visits),  # type: ignore[arg-type]
        ScoreRange(103, 0, np.repeat(score, 2)[::2], visits),
    ]
    for scores in wrong:
        with pytest.raises(CheckpointError, match="must"):
            save_es_state(tmp_path / "es_state", scores, {}, {}, MANIFEST, ALONE)
    assert list(tmp_path.iterdir()) == []


def test_another_n_or_another_blend_or_another_version_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="must hold scores of 104 samples, but holds 103"):
        load_es_state(saved, 104, ALONE)
    other = {**MANIFEST, "components": MANIFEST["components"][:1]}
    with pytest.raises(CheckpointError, match="component `code` was removed"):
        load_es_state(saved, 60, ALONE, data_manifest=other)
    document = json.loads((saved / "manifest.json").read_bytes())
    del document["crc32"]
    (saved / "manifest.json").write_bytes(es_state.sealed.seal({**document, "version": 2}))
    with pytest.raises(CheckpointError, match="must be of format"):
        load_es_state(saved, 103, ALONE)


def _changed(**fields: Any) -> dict[str, Any]:
    books, code = MANIFEST["components"]
    return {**MANIFEST, "components": [books, {**code, **fields}]}


@pytest.mark.parametrize(
    ("current", "said"),
    [
        (_changed(samples=44), "`samples` was 43 and is 44"),
        (_changed(fingerprint="f9"), "`fingerprint` was f1 and is f9"),
        (_changed(weight=0.25), "`weight` was 0.5 and is 0.25"),
        (_changed(name="law"), "component `code` was removed; component `law` was added"),
        ({**MANIFEST, "seq_length": 16}, "`seq_length` was 8 and is 16"),
        ({**MANIFEST, "components": MANIFEST["components"][::-1]}, "order of components was books, code"),
    ],
)
def test_what_differs_between_manifests_is_named(current: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_manifest(MANIFEST, current)
    assert said in str(caught.value)
    assert "start a new run" in str(caught.value)


def test_files_may_move() -> None:
    check_manifest(MANIFEST, _changed(prefix="/elsewhere/b"))


def test_a_crash_between_the_two_renames_is_mended_when_loading(saved: Path) -> None:
    saved.rename(saved.with_name("es_state.replaced"))
    check_whole([load_es_state(saved, 103, ALONE)], 103)
    assert [path.name for path in saved.parent.iterdir()] == ["es_state"]


@pytest.mark.parametrize("name", ["../outside", "outside/../../outside", "link", "", 7, "a\0b"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "es_state"
    save(folder, 103, 1)
    (tmp_path / "outside").write_bytes(next(folder.glob("scores-*")).read_bytes())
    (folder / "link").symlink_to(tmp_path / "outside")
    document = sealed.read_sealed(folder / "manifest.json")
    for tensor, entry in document["tensors"].items():
        entry["file"] = name if tensor.startswith("score") else entry["file"]
    (folder / "manifest.json").write_bytes(sealed.seal(document))
    with pytest.raises(CheckpointError, match="must name files inside"):
        load_es_state(folder, 103, ALONE)


def test_an_absolute_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="must name files inside"):
        sealed.file_inside(tmp_path, str(tmp_path / "file"), tmp_path / "manifest.json")
    assert sealed.file_inside(tmp_path, "file", tmp_path / "manifest.json") == tmp_path / "file"
