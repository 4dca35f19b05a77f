"""Rows that are never drawn: the order with them, the file that names them, and what a checkpoint says of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.cli import main
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.skipped import ids_of, read_skipped, write_skipped
from es_megatron.errors import CheckpointError, ConfigError, DataError
from es_megatron.frameworks.audit import Audit
from es_megatron.frameworks.megatron_data import OneEpochDataset, TokenFile
from es_megatron.spikes.skip import parse, rows_of
from tests.unit.naive import make_manifest
from tests.unit.test_engine import SIZES, B, Fake, make
from tests.unit.test_sampler import make_sampler

MANIFEST = make_manifest(SIZES)
NAMES = [component.name for component in MANIFEST.components]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), ratio=st.sampled_from([0.0, 0.3]), share=st.sampled_from([0.02, 0.2, 0.6]))
def test_an_epoch_without_skipped_rows_draws_the_others_as_before(seed: int, ratio: float, share: float):
    whole, without = (make_sampler(sizes=(23, 70, 41), weights=(1.0, 2.0, 2.5), seed=seed, ratio=ratio) for _ in "ab")
    random = np.random.default_rng(seed)
    rows = {
        c.name: sorted(random.choice(c.samples, int(share * c.samples), replace=False).tolist())
        for c in whole.manifest.components
    }
    skipped = without.skipped = ids_of(rows, whole.manifest)
    positions = np.arange(whole.schedule.iterations * 12)
    found = [np.stack(sampler.rows(positions)) for sampler in (whole, without)]
    ids = [whole.manifest.sample_ids(component, row) for component, _, row in found]
    np.testing.assert_array_equal(found[0][:2], found[1][:2])  # components and epochs: the plan is the same
    hit = np.isin(ids[0], skipped)
    assert hit.any()
    np.testing.assert_array_equal(ids[0][~hit], ids[1][~hit])
    assert not np.isin(ids[1], skipped).any()
    for at in np.flatnonzero(hit):  # a row of the same epoch stands in, one that its mask keeps
        component, epoch, row = found[1][:, at].tolist()
        mask = without.masks.get((component, epoch))
        assert mask is None or mask.contains(np.asarray([row])).all()
    own = positions[::3]
    np.testing.assert_array_equal(np.stack(without.rows(own)), found[1][:, ::3])


def test_rows_that_stand_in_are_spread_over_the_epoch():
    sampler = make_sampler(sizes=(1000,), weights=(1.0,), ratio=0.0, passes=1)
    sampler.skipped = np.arange(0, 1000, 20)
    ids = sampler.rows(np.arange(1000))[2]
    times = Counter(ids.tolist())
    assert sum(times.values()) == 1000
    assert max(times.values()) <= 3
    assert sum(count > 1 for count in times.values()) >= 45
    distance = [np.diff(np.flatnonzero(ids == row))[0] for row, count in times.items() if count == 2]
    assert min(distance) > 400


def make_file(path: Path, rows: dict[str, list[int]]) -> str:
    write_skipped(path, MANIFEST, rows)
    return str(path)


def skipping(path: str, **settings: str) -> EvolvedSampling:
    """An engine with the setting."""
    return make(**{"order.skip": path, **settings})


def run_of(engine: EvolvedSampling, until: int) -> list[list[int]]:
    """Ids that were trained."""
    fake, found = Fake(engine), []
    while engine.iteration < until:
        found.append(fake.iterate().chosen.tolist())
    return found


@pytest.mark.parametrize("arm", ["es", "plain", "uniform"])
def test_skipped_rows_are_never_trained_and_a_resume_equals_the_whole_run(tmp_path: Path, arm: str):
    skip = make_file(tmp_path / "skipped.json", {NAMES[0]: [3, 4, 30], NAMES[2]: [5]})
    until = make(arm=arm).plan.schedule.iterations
    plain = run_of(make(arm=arm), until)
    engine = skipping(skip, arm=arm)
    assert engine.epochs.skipped.changes == [f"the run leaves out 4 rows ({NAMES[0]} 3, {NAMES[2]} 1)"]
    whole = run_of(engine, until)
    out = {3, 4, 30, SIZES[0] + SIZES[1] + 5}
    assert out & {each for ids in plain for each in ids}
    assert not out & {each for ids in whole for each in ids}
    first = skipping(skip, arm=arm)
    trained = run_of(first, 11)
    first.save(tmp_path / "state")
    second = skipping(skip, arm=arm)
    second.load(tmp_path / "state")
    assert second.epochs.skipped.changes == []
    assert trained + run_of(second, until) == whole


def test_a_checkpoint_knows_the_rows(tmp_path: Path):
    skip = make_file(tmp_path / "skipped.json", {NAMES[0]: [3, 4]})
    skipping(skip).save(tmp_path / "state")
    with pytest.raises(CheckpointError, match=rf"leaves out 2 rows \({NAMES[0]} 2\), but `order.skip` names no file"):
        make().load(tmp_path / "state")
    engine = json.loads((tmp_path / "state" / "state.json").read_text())["engine"]
    with pytest.raises(CheckpointError, match="names no file"):  # as a run over another blend goes on
        make().follow(engine)
    other = skipping(make_file(tmp_path / "other.json", {NAMES[0]: [4], NAMES[1]: [0, 1]}))
    other.load(tmp_path / "state")
    assert other.epochs.skipped.changes == [
        f"the run leaves out 2 rows ({NAMES[1]} 2)",
        f"the run draws again 1 row ({NAMES[0]} 1)",
    ]
    again = skipping(make_file(tmp_path / "none.json", {}))
    again.load(tmp_path / "state")
    assert again.epochs.skipped.changes == [f"the run draws again 2 rows ({NAMES[0]} 2)"]
    make().save(tmp_path / "without")
    assert "skipped" not in json.loads((tmp_path / "without" / "state.json").read_text())["engine"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "must be a file that `es-megatron skip` made"),
        ("[]", "must be a file that `es-megatron skip` made"),
        ('{"components": {"x": {"fingerprint": "f", "rows": [1]}}}', "but some are of `x`"),
        (f'{{"components": {{"{NAMES[0]}": {{"fingerprint": "f", "rows": [60]}}}}}}', r"in \[0, 60\), but one is 60"),
        (f'{{"components": {{"{NAMES[0]}": {{"fingerprint": "f", "rows": [-1]}}}}}}', "but one is -1"),
        (f'{{"components": {{"{NAMES[0]}": {{"fingerprint": "f", "rows": ["1"]}}}}}}', "but one is '1'"),
        (f'{{"components": {{"{NAMES[0]}": {{"fingerprint": "f", "rows": [1]}}}}}}', "made for other text"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: str, told: str):
    path = tmp_path / "skipped.json"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        read_skipped(path, MANIFEST)
    with pytest.raises(DataError, match=told):
        skipping(str(path))


def test_a_component_keeps_rows_to_draw(tmp_path: Path):
    kept = 42  # ceil(0.7 * 60), as an epoch that is pruned draws
    engine = skipping(make_file(tmp_path / "most.json", {NAMES[0]: list(range(kept - 1))}))
    trained = {each for ids in run_of(engine, engine.plan.schedule.iterations) for each in ids}
    assert not trained & set(range(kept - 1))
    with pytest.raises(DataError, match=f"Fewer than {kept} rows of `{NAMES[0]}` may be skipped"):
        skipping(make_file(tmp_path / "more.json", {NAMES[0]: list(range(kept))}))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        skipping(str(tmp_path / "none.json"))


def test_the_audit_has_losses_where_they_are_known(tmp_path: Path):
    engine = make(anneal=0.1)
    fake, audit = Fake(engine, lambda n, t: float("nan") if n == 7 else 1.23456789 + n), Audit(tmp_path / "a", 0, -1)
    first = fake.iterate()  # trains on everything it draws
    audit.write(0, first, 0.5)
    audit.write(1, first._replace(losses=first.losses * np.nan))
    audit.close()
    lines = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert len(lines[0]["loss"]) == B
    assert lines[0]["loss"] == [None if n == 7 else pytest.approx(1.2346 + n) for n in lines[0]["chosen"]]
    assert lines[0]["norm"] == 0.5
    assert set(lines[1]) == {"iteration", "scored", "chosen"}
    while not engine.last.evolving:
        fake.iterate()
    assert engine.last.losses.tolist() == pytest.approx([1.23456789 + n for n in engine.last.chosen])


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12), data=st.data())
def test_rows_of_a_document_are_those_that_it_is_a_document_of(lengths: list[int], data: st.DataObject):
    class File(TokenFile):
        def sequence_starts(self):
            return np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2

        def document_bounds(self):
            return np.arange(len(lengths) + 1)

    length = data.draw(st.integers(1, 9))
    file = File("x", np.dtype(np.uint16), len(lengths), len(lengths), sum(lengths))
    if file.tokens <= length:
        return
    dataset = OneEpochDataset("x", file, length)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for document in range(len(lengths)):
        tokens = set(range(starts[document], starts[document + 1]))
        expected = [r for r in range(len(dataset)) if tokens & set(range(r * length, (r + 1) * length + 1))]
        if expected:
            assert list(rows_of(dataset, document)) == expected
        else:
            with pytest.raises(DataError, match="has no token in any row"):
                rows_of(dataset, document)
    with pytest.raises(DataError, match=rf"must be in \[0, {len(lengths)}\)"):
        rows_of(dataset, len(lengths))


@pytest.mark.parametrize(("word", "numbers"), [("a:3", [3]), ("a:b:3-5", [3, 4, 5])])
def test_rows_are_named_by_component(word: str, numbers: list[int]):
    name, found = parse(word)
    assert (name, list(found)) == (word.rpartition(":")[0], numbers)


@pytest.mark.parametrize("word", ["3", "a:", ":3", "a:5-3", "a:-3", "a:x"])
def test_other_words_are_refused(word: str):
    with pytest.raises(ConfigError, match="such as books:17"):
        parse(word)


def a_run(folder: Path) -> Path:
    """A folder with one checkpoint, as Megatron-LM's `--save` has them."""
    engine = make()
    run_of(engine, 5)
    engine.save(folder / "iter_0000005" / "es_state")
    return folder


def test_skip_adds_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = a_run(tmp_path / "run")
    assert main(["skip", str(run), f"{NAMES[0]}:3", f"{NAMES[1]}:0-1"]) == 0
    assert main(["skip", str(run), f"{NAMES[0]}:1"]) == 0
    told = capsys.readouterr().out
    assert f"skipped.json: leaves out 4 rows ({NAMES[0]} 2, {NAMES[1]} 2) from" in told
    assert f"--es-order-skip {run / 'skipped.json'}" in told
    assert read_skipped(run / "skipped.json", MANIFEST) == {NAMES[0]: [1, 3], NAMES[1]: [0, 1]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Rows or `--documents` must be named"),
        (["x:1"], "but some are of `x`"),
        ([f"{NAMES[0]}:60"], "but one is 60"),
        (["--documents", "x:1"], "but some are of `x`"),
        (["--documents", f"{NAMES[0]}:1"], "are missing or others"),
    ],
)
def test_skip_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
):
    run = a_run(tmp_path / "run")
    assert main(["skip", str(run), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (run / "skipped.json").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in (["skip", str(tmp_path), "a:1"], ["spike", str(tmp_path), "--iteration", "3"]):
        assert main(command) == 2
        assert "must be the folder of a run" in capsys.readouterr().err


def test_a_spike_of_megatron_lm_s_folder_counts_from_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, engine = a_run(tmp_path / "run"), make()
    fake, audit = Fake(engine, lambda n, t: 50.0 if n == 7 else 2.0), Audit(tmp_path / "audit.jsonl", 1, 0)
    drawn = {}
    while 7 not in drawn.get(engine.iteration, []):
        record = fake.iterate()
        drawn[engine.iteration] = record.chosen.tolist()
        audit.write(engine.iteration, record, 1.5)
    audit.close()
    at = engine.iteration
    engine.save(run / f"iter_{at:07d}" / "es_state")
    command = ["spike", str(run), "--iteration", str(at), "--audit", str(tmp_path / "audit.jsonl"), "--top", "2"]
    assert main(command) == 0
    told = capsys.readouterr().out
    first, second, *_ = told.partition("visits after")[2].splitlines()[1:]
    assert first.split()[:3] == [f"{NAMES[0]}:7", str(at), "50"]
    assert second.split()[2] == "2"
    assert f"the oldest after iter_{at:07d}" in told
    assert f"es-megatron skip {run} {NAMES[0]}:7 " in told
    assert "echo" not in told  # Megatron-LM has a file of its own that names the newest checkpoint
    assert main(["spike", str(run), "--iteration", str(at + 1), "--audit", str(tmp_path / "audit.jsonl")]) == 0
    assert f"rows drawn in iteration {at + 1} " in capsys.readouterr().out
    assert main(["spike", str(run), "--iteration", "100000"]) == 2
    assert "cannot be told by the checkpoints" in capsys.readouterr().err
    assert main(["spike", str(run), "--iteration", "-1"]) == 2
    assert "`--iteration` must be >= 0, but is -1 instead" in capsys.readouterr().err
