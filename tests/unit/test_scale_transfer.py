"""Scores that move to another blend, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.checkpoint import ScoreRange, save_es_state
from es_megatron.checkpoint.transfer import find_scores, plan_transfer, read_moved, saved_blend
from es_megatron.checkpoint.warm_start import read_resumption, start_with_scores
from es_megatron.data.manifest import Component, Manifest
from es_megatron.data.schedule import Origin
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores.store import ScoreStore
from tests.es_config import es_config

ALONE = RankGrid.alone()


def part(name: str, samples: int, weight: float = 1.0, fingerprint: str = "f") -> Component:
    return Component(name, f"data/{name}", samples, weight, f"{fingerprint}-{name}-{samples}")


def blend(*parts: Component) -> Manifest:
    return Manifest(parts, 16)


def save(folder: Path, manifest: Manifest) -> np.ndarray:
    """Scores that tell their component and row."""
    score = np.concatenate([1 + 100 * sum(map(ord, c.name)) + np.arange(c.samples) for c in manifest.components])
    score = score.astype(np.float32)
    state = {"engine": {"iteration": 9, "stood_for": 77, "origin": Origin().to_json()}}
    visits = np.full(len(score), 3, np.uint8)
    save_es_state(folder, ScoreRange(len(score), 0, score, visits), {}, state, manifest.to_json(), ALONE)
    return score


def grown(before: Component, now: Component) -> bool:
    return before.name == now.name and now.samples > before.samples


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_row_that_stays_keeps_its_score_on_any_number_of_ranks(data, tmp_path_factory):
    names = list("abcde")
    old = [part(n, data.draw(st.integers(1, 70))) for n in names if data.draw(st.booleans())] or [part("a", 9)]
    sizes = {c.name: c.samples for c in old}
    new = [
        part(n, sizes.get(n, 5) + data.draw(st.sampled_from([0, 0, 4])), data.draw(st.sampled_from([1.0, 2.0])))
        for n in data.draw(st.permutations(names))
        if data.draw(st.booleans())
    ] or [part("a", sizes.get("a", 9))]
    before, after = blend(*old), blend(*new)
    folder = tmp_path_factory.mktemp("scores") / "es_state"
    save(folder, before)
    transfer = plan_transfer(before, after, grown)
    expected = np.zeros(after.total, np.float32)
    for number, c in enumerate(new):
        low = int(after.offsets[number])
        rows = min(c.samples, sizes.get(c.name, 0))
        expected[low : low + rows] = 1 + 100 * ord(c.name) + np.arange(rows)
    ranks = data.draw(st.integers(1, 5))
    edges = np.linspace(0, after.total, ranks + 1).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        score, visits = np.zeros(high - low, np.float32), np.zeros(high - low, np.uint8)
        read_moved(folder, transfer, int(low), score, visits)
        np.testing.assert_array_equal(score, expected[low:high])
        np.testing.assert_array_equal(visits, np.where(expected[low:high] > 0, 3, 0))
    told = " ".join(transfer.changes)
    for c in old:
        assert (f"`{c.name}` was removed" in told) == (c.name not in {n.name for n in new})
    for c in new:
        assert (f"`{c.name}` was added" in told) == (c.name not in sizes)
        assert (f"`{c.name}` has 4 more samples" in told) == (c.name in sizes and c.samples > sizes[c.name])


def test_nothing_changed_is_told_as_nothing():
    one = blend(part("a", 5), part("b", 7))
    assert plan_transfer(one, one).changes == ()
    assert plan_transfer(one, blend(part("b", 7), part("a", 5))).changes == ("the components stand in another order",)
    scaled = blend(part("a", 5, 2.0), part("b", 7, 2.0))
    assert plan_transfer(one, scaled).changes == (), "weights are relative"
    heavier = plan_transfer(one, blend(part("a", 5, 3.0), part("b", 7))).changes
    assert heavier[0] == "`a` has 75.0000% of the draws, and had 50.0000%"


@pytest.mark.parametrize(
    "now", [part("a", 5, fingerprint="other"), part("a", 4), part("a", 8)], ids=["same size", "shorter", "longer"]
)
def test_changed_files_under_a_name_are_refused(now):
    with pytest.raises(CheckpointError, match=r"component `a` must be .* give the changed component another name"):
        plan_transfer(blend(part("a", 5)), blend(now, part("b", 3)))


def test_another_sequence_length_is_refused():
    with pytest.raises(CheckpointError, match=r"`seq_length` must be 16 .* but is 32"):
        plan_transfer(blend(part("a", 5)), Manifest((part("a", 5),), 32))


def test_scores_are_found_in_a_folder_a_checkpoint_and_a_run(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    folder = root / "iter_0000009" / "es_state"
    folder.parent.mkdir(parents=True)
    save(folder, blend(part("a", 5)))
    (root / "latest").write_text("iter_0000009\n")
    for path in (folder, folder.parent, root, tmp_path / "run"):
        assert find_scores(path) == folder
    assert saved_blend(folder) == blend(part("a", 5))
    with pytest.raises(CheckpointError, match="but none is there"):
        find_scores(tmp_path)


def test_a_run_that_begins_with_scores_prunes_what_has_them(tmp_path):
    save(tmp_path / "es_state", blend(part("a", 500), part("c", 10)))
    config = es_config(preset="paper", pruning_ratio=0.2, initial_scores=str(tmp_path))
    store = ScoreStore(blend(part("b", 40), part("a", 500)), config, ALONE)
    assert start_with_scores(store) == Origin(scored=("a",))
    assert store.visits[:40].max() == 0
    assert (store.score[40:] == 1 + 9700 + np.arange(500)).all()
    empty = ScoreStore(blend(part("b", 40)), config.replaced({"scores.initial": None}), ALONE)
    assert start_with_scores(empty) == Origin()


def test_a_changed_blend_is_refused_unless_it_may_change(tmp_path):
    before = blend(part("a", 50), part("b", 20))
    save(tmp_path, before)
    same = read_resumption(tmp_path, before, ALONE, keep_scores=False)
    assert same.transfer is None
    assert same.origin == Origin()
    after = blend(part("a", 50), part("b", 20, 3.0))
    with pytest.raises(CheckpointError, match=r"`weight` was 1.0 and is 3.0.*keep_scores"):
        read_resumption(tmp_path, after, ALONE, keep_scores=False)
    found = read_resumption(tmp_path, after, ALONE, keep_scores=True)
    assert found.transfer is not None
    store = ScoreStore(after, es_config(preset="paper"), ALONE)
    assert found.start(store) == Origin(9, 77, ("a", "b"))
    assert store.visits.min() == 3


def test_the_same_blend_elsewhere_is_no_change(tmp_path):
    before = blend(part("a", 50))
    save(tmp_path, before)
    moved = blend(dataclasses.replace(before.components[0], prefix="/elsewhere/a"))
    assert read_resumption(tmp_path, moved, ALONE, keep_scores=False).transfer is None
