from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from es_megatron.checkpoint import CheckpointDirectory, disk, load_es_state, save_es_state
from es_megatron.errors import CheckpointError, ConfigError
from es_megatron.rank_grid import RankGrid
from tests.checkpoint_helper import MANIFEST, MASKS, Crash, Disk, on_threads, own_scores

ALONE = RankGrid.alone()
N = 3
FILES = [
    "checksums.json",
    "es_state/manifest.json",
    "es_state/masks.safetensors",
    "es_state/scores-00000-of-00001.safetensors",
    "es_state/state.json",
    "model/deep/rank0.bin",
    "notes.txt",
]


@pytest.fixture(autouse=True)
def _no_real_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is flushed when is tracked by `Disk`; waiting for the real disk thousands of times tells no more."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def save(
    root: Path, iteration: int, keep: int = 2, mark: str = "", wrote: Callable[[Path], None] | None = None
) -> None:
    """Save as a trainer does: files of others, that nobody flushes, and the ES state."""
    with CheckpointDirectory(root, keep, ALONE).saving(iteration) as folder:
        for name in ("model/deep/rank0.bin", "notes.txt"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if wrote is not None:
                wrote(path)
            path.write_text(f"{name} {iteration} {mark} " * 20)
        state = {"iteration": iteration, "mark": mark}
        save_es_state(folder / "es_state", own_scores(N, ALONE, iteration), MASKS, state, MANIFEST, ALONE)


def find(root: Path) -> Path | None:
    return CheckpointDirectory(root, 2, ALONE).find()


def read(path: Path) -> tuple[int, str]:
    """Iteration and mark of a checkpoint, after a look at everything in it."""
    state = load_es_state(path / "es_state", N, ALONE).state
    for name in ("model/deep/rank0.bin", "notes.txt"):
        assert (path / name).read_text() == f"{name} {state['iteration']} {state['mark']} " * 20
    assert int(path.name.removeprefix("iter_")) == state["iteration"]
    return state["iteration"], state["mark"]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_found_and_the_oldest_removed(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "one"
    assert find(root) is None
    for iteration in (5, 10, 15, 20):
        save(root, iteration)
        assert read(find(root) or Path()) == (iteration, "")
    assert names(root) == ["iter_0000015", "iter_0000020", "latest"]
    assert (root / "latest").read_text() == "iter_0000020\n"
    held = [path.relative_to(root / "iter_0000020").as_posix() for path in (root / "iter_0000020").rglob("*.*")]
    assert sorted(held) == FILES


def test_saving_the_same_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 5, mark="again")
    assert read(find(tmp_path) or Path()) == (5, "again")
    assert names(tmp_path) == ["iter_0000005", "latest"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_newest_falls_back_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    path = tmp_path / "iter_0000010" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content if harm == "flip" else content[:-1])
    if harm == "remove":
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert read(find(tmp_path) or Path()) == (5, "")
    assert str(path) in caplog.text
    assert "Falling back to the one before" in caplog.text


def test_nothing_usable_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for iteration in (5, 10):
        save(tmp_path, iteration)
        (tmp_path / f"iter_{iteration:07d}" / "notes.txt").unlink()
    errors = on_threads(3, lambda grid: CheckpointDirectory(tmp_path, 2, grid).find())
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], CheckpointError)
    assert "None of the 2 checkpoints" in str(errors[0])
    assert "iter_0000010/notes.txt is missing" in str(errors[0])


def test_ranks_share_the_reading_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    read_files: list[str] = []
    original = disk.checksum_file
    monkeypatch.setattr(disk, "checksum_file", lambda path, **k: (read_files.append(path.name), original(path, **k))[1])
    found = on_threads(4, lambda grid: CheckpointDirectory(tmp_path, 2, grid).find())
    assert found == [tmp_path / "iter_0000010"] * 4
    assert sorted(read_files) == sorted(Path(name).name for name in FILES if name != "checksums.json")
    (tmp_path / "iter_0000010" / "notes.txt").write_text("other")
    found = on_threads(4, lambda grid: CheckpointDirectory(tmp_path, 2, grid).find())
    assert found == [tmp_path / "iter_0000005"] * 4


def test_known_damage_does_not_count_as_kept(tmp_path: Path) -> None:
    for iteration in (5, 10, 15):
        save(tmp_path, iteration, keep=3)
    (tmp_path / "iter_0000015" / "notes.txt").unlink()
    directory = CheckpointDirectory(tmp_path, 2, ALONE)
    assert directory.find() == tmp_path / "iter_0000010"
    for iteration, kept in ((16, [10, 15, 16]), (17, [16, 17])):
        directory.begin(iteration).joinpath("notes.txt").write_text("x")
        directory.commit(iteration)
        assert names(tmp_path) == [*(f"iter_{number:07d}" for number in kept), "latest"]


def test_what_is_newer_than_latest_waits_for_a_need(tmp_path: Path) -> None:
    for iteration in (5, 10, 15):
        save(tmp_path, iteration, keep=3)
    (tmp_path / "latest").write_text("iter_0000010\n")  # a user goes back
    assert find(tmp_path) == tmp_path / "iter_0000010"
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["iter_0000012", "iter_0000015", "latest"]
    assert find(tmp_path) == tmp_path / "iter_0000012"
    shutil.rmtree(tmp_path / "iter_0000012")
    assert find(tmp_path) == tmp_path / "iter_0000015"


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"iter_x", b"../iter_0000005"])
def test_a_damaged_pointer_is_no_obstacle(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "latest").write_bytes(content)
    assert find(tmp_path) == tmp_path / "iter_0000010"
    assert "latest is damaged" in caplog.text
    (tmp_path / "latest").unlink()
    assert find(tmp_path) == tmp_path / "iter_0000010"


def test_a_checkpoint_under_another_number_is_not_used(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "iter_0000005").rename(tmp_path / "iter_0000007")
    with pytest.raises(CheckpointError, match="belongs to iteration 5"):
        find(tmp_path)


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    for name in ("iter_12", "tensorboard", "mine.partial", "iter_0000001.bak"):
        (tmp_path / name).mkdir()
    assert find(tmp_path) is None
    save(tmp_path, 5, keep=1)
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["iter_0000001.bak", "iter_0000006", "iter_12", "latest", "mine.partial", "tensorboard"]


def test_a_body_that_fails_on_one_rank_drops_the_checkpoint_on_all(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def body(grid: RankGrid) -> None:
        with CheckpointDirectory(tmp_path, 2, grid).saving(10) as folder:
            (folder / f"rank{grid.world_rank}").write_text("x")
            if grid.world_rank == 1:
                raise ValueError("no weights")

    errors = on_threads(3, body)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert "rank 1: ValueError: no weights" in str(errors[0]) == str(errors[2])
    assert names(tmp_path) == ["iter_0000005", "latest"]


def test_nothing_written_is_not_a_checkpoint(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, 2, ALONE)
    directory.begin(5)
    with pytest.raises(CheckpointError, match="is empty"):
        directory.commit(5)
    with pytest.raises(CheckpointError, match="No such file"):
        directory.commit(6)
    directory.begin(5)
    directory.abort(5)
    assert names(tmp_path) == []


def test_a_folder_that_ranks_do_not_share_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(grid: RankGrid) -> None:
        root = tmp_path / f"node{grid.world_rank}"
        partial = root / "iter_0000005.partial"
        partial.mkdir(parents=True)
        (partial / f"rank{grid.world_rank}").write_text("x")
        CheckpointDirectory(root, 2, grid).commit(5)

    # Two ranks, of which each is to read one of the two files it sees: rank 1 only has its own.
    monkeypatch.setattr("es_megatron.checkpoint.rotation._share", lambda sizes, _: list(sizes))
    errors = on_threads(2, body)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all("rank1 is seen by another rank only" in str(error) for error in errors)


def test_beginning_does_not_clear_the_only_copy(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "iter_0000005").rename(tmp_path / "iter_0000005.replaced")
    (tmp_path / "iter_0000004.removed").mkdir()
    CheckpointDirectory(tmp_path, 2, ALONE).begin(5)
    assert names(tmp_path) == ["iter_0000005", "iter_0000005.partial", "latest"]
    assert read(find(tmp_path) or Path()) == (5, "")


def test_moving_into_place_does_not_clear_the_only_copy(tmp_path: Path) -> None:
    (tmp_path / "x.replaced").mkdir()
    with pytest.raises(FileNotFoundError):
        disk.move_into_place(tmp_path / "x.partial", tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_keep_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="`keep` must be at least 1, but is 0 instead"):
        CheckpointDirectory("x", 0, ALONE)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="give this user the right"):
        save(tmp_path / "run", 5)


# --- a crash, a loss of power and an error at every step of a save ---

SCENES = {"first": ([], 5), "next": ([5], 10), "rotate": ([5, 10], 15), "same": ([5, 10], 10), "only": ([5], 5)}


def prepare(root: Path, scene: str) -> tuple[int, list[tuple[int, str]]]:
    """Fill a run's folder; returns the iteration to save next, and what may be found after a crash while saving it."""
    before, iteration = SCENES[scene]
    for earlier in before:
        save(root, earlier)
    return iteration, [(iteration, "new"), *((earlier, "") for earlier in before[-1:])]


def attempt(root: Path, iteration: int, standin: Disk, monkeypatch: pytest.MonkeyPatch) -> BaseException | None:
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", standin)
        try:
            save(root, iteration, mark="new", wrote=standin.wrote)
        except (Crash, CheckpointError) as error:
            return error
    return None


def check_recovery(root: Path, iteration: int, allowed: list[tuple[int, str]]) -> tuple[int, str] | None:
    """One of the allowed checkpoints is found, no other one is half gone, and the run can go on from it."""
    path = find(root)
    found = None if path is None else read(path)
    if found is None:
        assert len(allowed) == 1  # the first save of a run: there was nothing before
    else:
        assert found in allowed
        for other in root.glob("iter_" + "[0-9]" * 7):
            assert CheckpointDirectory(root, 2, ALONE)._verify(other.name) is None
    save(root, iteration, mark="after")
    assert read(find(root) or Path()) == (iteration, "after")
    assert not [name for name in names(root) if name.count(".")]
    return found


def count_steps(root: Path, scene: str, monkeypatch: pytest.MonkeyPatch) -> int:
    iteration, _ = prepare(root, scene)
    standin = Disk()
    assert attempt(root, iteration, standin, monkeypatch) is None
    assert standin.at_risk() == []
    return standin.steps


@pytest.mark.parametrize("scene", SCENES)
def test_a_crash_at_any_step(tmp_path: Path, scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = count_steps(tmp_path / "count", scene, monkeypatch)
    seen = set()
    for step in range(1, steps + 1):
        root = tmp_path / str(step)
        iteration, allowed = prepare(root, scene)
        assert isinstance(attempt(root, iteration, Disk(stop_at=step), monkeypatch), Crash)
        seen.add(check_recovery(root, iteration, allowed))
        shutil.rmtree(root)
    assert len(seen) == 2  # some steps come before, some after the moment it counts


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_a_loss_of_power_at_any_step(tmp_path: Path, scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = count_steps(tmp_path / "count", scene, monkeypatch)
    undone = 0
    for step in range(1, steps + 1):
        which = 0
        while True:
            root = tmp_path / f"{step}-{which}"
            iteration, allowed = prepare(root, scene)
            standin = Disk(stop_at=step)
            assert isinstance(attempt(root, iteration, standin, monkeypatch), Crash)
            losses = standin.losses()
            if standin.lose_power(losses[which]):
                undone += bool(losses[which])
                check_recovery(root, iteration, allowed)
            shutil.rmtree(root)
            which += 1
            if which == len(losses):
                break
    assert undone > 0


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_an_error_at_any_step(tmp_path: Path, scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cause = errno.ENOSPC
    steps = count_steps(tmp_path / "count", scene, monkeypatch)
    failed = 0
    for step in range(1, steps + 1):
        root = tmp_path / str(step)
        iteration, allowed = prepare(root, scene)
        standin = Disk(stop_at=step, error=lambda what: OSError(cause, os.strerror(cause), what))
        error = attempt(root, iteration, standin, monkeypatch)
        if error is not None:
            failed += 1
            assert str(root) in str(error)
            assert os.strerror(cause) in str(error)
            assert not list(root.glob("*.partial"))
            assert all((root / f"iter_{earlier:07d}").is_dir() for earlier in SCENES[scene][0])
        check_recovery(root, iteration, allowed)
        shutil.rmtree(root)
    assert failed > steps // 2
