"""What is read from, and done to, the arguments of Megatron-LM and Megatron-DeepSpeed; no megatron is imported."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.core.metrics import RunTotals, saved_share
from es_megatron.core.plan import plan_run
from es_megatron.core.step import StepRecord
from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import CheckpointError, ConfigError, DataError
from es_megatron.frameworks.audit import Audit
from es_megatron.frameworks.megatron_data import open_token_file
from es_megatron.frameworks.megatron_deepspeed import count_tokens, read_sources, training_documents
from es_megatron.frameworks.megatron_lm_data import (
    ComponentRows,
    DataPathEntry,
    Sources,
    SplitRows,
    UnreadLoader,
    check_parts,
    lengths_of,
    make_samples,
    name_sources,
    open_rows,
    training_share,
    weigh_sources,
)
from es_megatron.frameworks.megatron_lm_settings import (
    PassingCheckpoints,
    StartingPoint,
    check_settings,
    find_start,
    plan_length,
)
from tests.es_config import es_config
from tests.megatron_lm_helper import write_component


def arguments(**changes: Any) -> Namespace:
    plain = {
        "train_iters": 100,
        "train_samples": None,
        "lr_decay_iters": None,
        "lr_decay_samples": None,
        "lr_wsd_decay_iters": None,
        "lr_wsd_decay_samples": None,
        "global_batch_size": 16,
        "dataloader_type": "single",
        "load": None,
        "finetune": False,
        "override_opt_param_scheduler": False,
    }
    return Namespace(**{**plain, **changes})


def test_a_length_in_tokens_becomes_one_in_samples():
    args = arguments(train_iters=None, train_tokens=1000 * 128 + 5, seq_length=128, lr_decay_tokens=64_000)
    count_tokens(args)
    assert (args.train_samples, args.train_tokens) == (1000, None)
    length = plan_length(args, StartingPoint(0, None, 0))
    assert length.plain_iterations == 1000 // 16
    told = length.shorten(args, 31)
    assert (args.train_samples, args.lr_decay_tokens) == (31 * 16, 32_000)
    assert "lr_decay_tokens 64000 -> 32000" in told[0]
    with length.original(args):
        assert (args.train_samples, args.lr_decay_tokens) == (1000, 64_000)
    with pytest.raises(ConfigError, match="at least a sequence of 128 tokens"):
        count_tokens(arguments(train_tokens=100, seq_length=128))
    count_tokens(arguments())  # none given
    assert not hasattr(arguments(), "lr_decay_tokens")


START = StartingPoint(0, None, 0)


def test_iterations_are_shortened_and_the_decay_with_them() -> None:
    args = arguments(lr_decay_iters=80, lr_wsd_decay_iters=10)
    length = plan_length(args, START)
    assert (length.samples, length.plain_iterations) == (1600, 100)
    told = length.shorten(args, 75)
    assert (args.train_iters, args.lr_decay_iters, args.lr_wsd_decay_iters) == (75, 60, 8)
    changes = "train_iters 100 -> 75, lr_decay_iters 80 -> 60, lr_wsd_decay_iters 10 -> 8"
    assert told == [f"changed to the planned 75 iterations: {changes}"]


def test_samples_are_shortened() -> None:
    args = arguments(train_iters=None, train_samples=1607, lr_decay_samples=1600)
    length = plan_length(args, START)
    assert length.samples == 1600, "Megatron leaves an incomplete last batch out"
    length.shorten(args, 50)
    assert (args.train_iters, args.train_samples, args.lr_decay_samples) == (None, 800, 800)


def test_plain_length_changes_nothing() -> None:
    args = arguments(lr_decay_iters=80)
    before = dict(vars(args))
    assert plan_length(args, START).shorten(args, 100) == []
    assert vars(args) == before


def test_original_length_for_a_while() -> None:
    args = arguments()
    length = plan_length(args, START)
    length.shorten(args, 60)
    with length.original(args):
        assert args.train_iters == 100
    assert args.train_iters == 60


def test_adopted_run_is_planned_for_what_is_left() -> None:
    args = arguments()
    length = plan_length(args, StartingPoint(40, None, 40))
    assert length.samples == 60 * 16
    assert args.override_opt_param_scheduler, "the checkpoint's own schedule ends later"


def test_run_that_is_over() -> None:
    with pytest.raises(ConfigError, match="must go on beyond iteration 100"):
        plan_length(arguments(), StartingPoint(100, None, 100))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"decrease_batch_size_if_needed": True},
            "`--decrease-batch-size-if-needed` must be off with Evolved Sampling",
        ),
        ({"non_persistent_save_interval": 5}, "must be off without `--non-persistent-ckpt-type global`"),
        (
            {"dataloader_inter_document_masking": True, "context_parallel_size": 2},
            "share a whole micro-batch of packed",
        ),
        ({"sft": True}, "`--sft` must be off"),
        ({"dataloader_type": "external"}, "`--dataloader-type` must be single or cyclic"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_settings(arguments(**changes), es_config())


def test_usual_arguments_are_taken() -> None:
    check_settings(arguments(rampup_batch_size=["4", "4", "9"], iterations_to_skip=[3], sft=False), es_config())
    check_settings(arguments(non_persistent_save_interval=5, non_persistent_ckpt_type="global"), es_config())
    packed = arguments(dataloader_inter_document_masking=True)
    check_settings(packed, es_config())
    with pytest.raises(ConfigError, match="`--dataloader-inter-document-masking` must be off with `scorer: prefix`"):
        check_settings(packed, es_config(scorer="prefix"))


class TestStart:
    def test_nothing_to_load(self, tmp_path: Path) -> None:
        assert find_start(arguments()) == START
        assert find_start(arguments(load=str(tmp_path))) == START
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
        assert find_start(arguments(load=str(tmp_path), finetune=True)) == START

    def test_plain_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("20\n")
        assert find_start(arguments(load=str(tmp_path))) == StartingPoint(20, None, 20)

    def test_checkpoint_with_scores(self, tmp_path: Path) -> None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("50")
        for iteration, began in ((20, 20), (50, 10)):
            folder = tmp_path / f"iter_{iteration:07d}" / "es_state"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
            (folder / "state.json").write_text(f'{{"started_at": {began}}}')
        assert find_start(arguments(load=str(tmp_path))) == StartingPoint(50, str(folder), 10)
        chosen = find_start(arguments(load=str(tmp_path), ckpt_step=20))
        assert (chosen.iteration, chosen.started_at) == (20, 20)

    def test_the_newer_of_persistent_and_passing_checkpoints(self, tmp_path: Path) -> None:
        def save(folder: Path, iteration: int) -> str:
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
            (folder / "state.json").write_text('{"started_at": 0}')
            tracker = folder.parent.parent if folder.name == "es_state" else folder.parent
            (tracker / "latest_checkpointed_iteration.txt").write_text(str(iteration))
            return str(folder)

        args = arguments(load=str(tmp_path), non_persistent_ckpt_type="global", non_persistent_global_ckpt_dir=None)
        assert find_start(args) == START
        kept = save(tmp_path / "iter_0000020" / "es_state", 20)
        older = save(tmp_path / "non_persistent" / "es_state_0000015", 15)
        assert find_start(args) == StartingPoint(20, kept, 0)
        newer = save(tmp_path / "non_persistent" / "es_state_0000025", 25)
        assert find_start(args) == StartingPoint(25, newer, 0)
        assert find_start(arguments(load=str(tmp_path))) == StartingPoint(20, kept, 0), "Megatron does not look there"
        passing = PassingCheckpoints.of_save(Namespace(**{**vars(args), "save": str(tmp_path)}))
        assert passing is not None
        unfinished = passing.state_folder(30)
        unfinished.mkdir()
        assert passing.make_room(35, first=False) == passing.state_folder(35)
        assert Path(older).exists(), "one rank removes"
        passing.make_room(35, first=True)
        assert not Path(older).exists()
        assert Path(newer).exists(), "it is what the tracker names"
        assert unfinished.exists(), "Megatron may still be writing it"
        elsewhere = arguments(
            load=str(tmp_path / "none"),
            non_persistent_ckpt_type="global",
            non_persistent_global_ckpt_dir=str(tmp_path / "non_persistent"),
        )
        assert find_start(elsewhere) == StartingPoint(25, newer, 0)

    def test_released_weights(self, tmp_path: Path) -> None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
        assert find_start(arguments(load=str(tmp_path))) == START

    def test_damaged_tracker(self, tmp_path: Path) -> None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("2x")
        with pytest.raises(CheckpointError, match="must hold an iteration, but holds '2x'"):
            find_start(arguments(load=str(tmp_path)))


def test_splits() -> None:
    assert training_share("969,30,1") == pytest.approx(0.969)
    assert training_share("100/0/0") == 1.0
    with pytest.raises(ConfigError, match="must give the training data a share above 0"):
        training_share("0,1,1")


@pytest.mark.parametrize("documents", [1, 7, 110, 111, 1000])
def test_documents_of_a_split_in_megatron_deepspeed(documents: int) -> None:
    """The three rounded parts need not add up; upstream shifts all borders by what is left over."""
    parts = np.asarray([0.9, 0.05, 0.05])
    borders = np.concatenate([[0], np.cumsum([round(part * documents) for part in parts])])
    borders[1:] -= borders[-1] - documents
    assert training_documents("90,5,5", documents) == borders[1]


def test_sources_of_megatron_deepspeed() -> None:
    sources = read_sources(Namespace(data_path=["0.6", "a", "0.4", "b"], train_data_path=None, split="50,50,0"))
    assert sources.files == [DataPathEntry("a", 0.6), DataPathEntry("b", 0.4)]
    assert sources.training_part(10) == 5
    whole = read_sources(Namespace(data_path=None, train_data_path=["a"], split="50,50,0"))
    assert whole.files == [DataPathEntry("a", None)]
    assert whole.training_part(10) == 10
    with pytest.raises(ConfigError, match="neither is"):
        read_sources(Namespace(data_path=None, train_data_path=None, split="1"))


def test_names_are_short_where_they_can_be() -> None:
    assert name_sources(["x/books", "y/code"]) == ["books", "code"]
    assert name_sources(["x/books", "y/books", "code"]) == ["x/books", "y/books", "code"]


def test_same_file_twice() -> None:
    with pytest.raises(ConfigError, match="`a` stands more than once"):
        weigh_sources(["a", "b", "a"], [1, 2, 3])


def test_rows_of_a_split_end_with_its_documents(tmp_path: Path) -> None:
    write_component(tmp_path / "books", 50, seed=3)
    file = open_token_file(tmp_path / "books")
    starts = file.sequence_starts()
    split = SplitRows("books", file, 32, 40)
    tokens = int(starts[40]) // 2
    assert len(split) == (tokens - 1) // 32
    assert np.concatenate([split.window(row)[:-1] for row in range(len(split))]).tolist() == (
        np.fromfile(file.bin_path, np.uint16)[: 32 * len(split)].tolist()
    )
    with pytest.raises(IndexError):
        split.window(len(split))
    whole = SplitRows("books", file, 32, 50)
    assert len(whole) == (file.tokens - 1) // 32
    assert split.component(None).fingerprint != whole.component(None).fingerprint
    assert split.component(None).weight == len(split)
    with pytest.raises(DataError, match="must have at least 33 tokens"):
        SplitRows("books", file, 32, 0)


class GPTDataset:
    """Stands for upstream's: item r is made from the tokens that `_query_...` looks up."""

    def __init__(self, path: str, first: int, end: int) -> None:
        self.dataset_path, self.indices = path, np.arange(first, end)
        self.masks_and_position_ids_are_cacheable = True
        self.config = Namespace()

    def _query_document_sample_shuffle_indices(self, index: int) -> tuple[Any, ...]:
        return np.zeros(33, np.int64), np.zeros(1, np.int64), [33]

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, _, lengths = self._query_document_sample_shuffle_indices(index)
        assert sum(lengths) == 33
        return {"tokens": text[:-1], "labels": text[1:], "lengths": lengths}


class MockGPTDataset(GPTDataset):
    pass


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Manifest, list[SplitRows]]:
    write_component(tmp_path / "books", 50, seed=3)
    write_component(tmp_path / "code", 30, seed=4)
    files = weigh_sources([str(tmp_path / "books"), str(tmp_path / "code")], [3.0, 1.0])
    return open_rows(Sources(files, lambda documents: documents * 9 // 10), 32)


def test_upstream_makes_samples_of_our_rows(opened: tuple[Manifest, list[SplitRows]]) -> None:
    manifest, rows = opened
    theirs = Namespace(datasets=[GPTDataset(each.file.prefix, 0, each.sequences) for each in rows])
    samples = make_samples(manifest, rows, theirs)
    assert isinstance(samples, ComponentRows)
    assert len(samples) == manifest.total == len(rows[0]) + len(rows[1])
    for sample_id in (0, len(rows[0]) - 1, len(rows[0]), len(samples) - 1):
        part, row = divmod(sample_id, len(rows[0])) if sample_id >= len(rows[0]) else (0, sample_id)
        assert samples[sample_id]["labels"].tolist() == rows[min(part, 1)].window(row).tolist()[1:]
    assert theirs.datasets[0][0]["tokens"].sum() == 0, "upstream's own dataset is as it was"


def test_documents_of_packed_rows_are_told(opened: tuple[Manifest, list[SplitRows]]) -> None:
    manifest, rows = opened
    theirs = Namespace(datasets=[GPTDataset(each.file.prefix, 0, each.sequences) for each in rows])
    assert {len(make_samples(manifest, rows, theirs)[n]["lengths"]) for n in range(9)} == {1}, "nobody looks"
    for each in theirs.datasets:
        each.config.inter_document_masking = True
    samples = make_samples(manifest, rows, theirs)
    lengths = [samples[n]["lengths"] for n in range(len(rows[0]))]
    assert lengths == [lengths_of(rows[0], n) for n in range(len(rows[0]))]
    assert max(map(len, lengths)) > 1


def test_other_documents_than_upstream(opened: tuple[Manifest, list[SplitRows]]) -> None:
    manifest, rows = opened
    theirs = Namespace(datasets=[GPTDataset(each.file.prefix, 0, each.sequences - 1) for each in rows])
    with pytest.raises(DataError, match="Upstream's training split"):
        make_samples(manifest, rows, theirs)
    with pytest.raises(DataError):
        check_parts([(0, 3)], [(0, 3), (0, 4)])


def test_other_kinds_of_dataset(opened: tuple[Manifest, list[SplitRows]]) -> None:
    manifest, rows = opened
    with pytest.raises(ConfigError, match="but is of `MockGPTDataset` instead"):
        make_samples(manifest, rows, MockGPTDataset("a", 0, 1))


def test_nobody_reads_past_us() -> None:
    with pytest.raises(ConfigError, match="read outside the forward-backward schedule"):
        next(iter(UnreadLoader()))


def test_audit_drops_what_is_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "audit.jsonl"
    record = StepRecord(0, True, 16, np.asarray([4, 2]), np.asarray([0, 0]), 1.0, 1.0, 0, {})
    first = Audit(path, 1, 0)
    for iteration in (1, 2, 3):
        first.write(iteration, record)
    with path.open("a") as file:
        file.write('{"iteration": 4, "sco')  # the process was killed
    first.close()
    second = Audit(path, 1, 2)
    second.write(3, record)
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert lines[2] == {"iteration": 3, "scored": 16, "chosen": [4, 2]}
    assert caplog.records == []


@pytest.mark.parametrize(
    ("kept", "missing", "at"), [([], 3, 1), ([1, 2], 1, 3), ([2, 3], 1, 1), ([1, 3], 1, 2), ([1, 1, 3], 1, 2)]
)
def test_missing_audit_lines_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: list[int], missing: int, at: int
) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text("".join(f'{{"iteration": {each}}}\n' for each in [0, *kept, 4]))
    Audit(path, 1, 3).close()
    (record,) = caplog.records
    assert f"lacks the lines of {missing} of the 3 iterations that were run so far, the first of them {at}" in (
        record.getMessage()
    )


def test_saved_share_of_work() -> None:
    """Selecting a quarter costs 1 + 3/4 forward units a sequence, of the plain run's 3."""
    manifest = Manifest((Component("books", "books", 64, 64.0, "mark"),), 32)
    plan = plan_run(es_config(preset="paper", anneal=0.0), manifest, 16, 4, 128)
    totals = RunTotals(1, 16)
    assert saved_share(plan, 0, totals) == 0.0
    totals.sequences_scored, totals.sequences_trained = 3 * 16, 3 * 4
    assert saved_share(plan, 3, totals) == pytest.approx(1 - 1.75 / 3)
    totals.sequences_scored, totals.sequences_trained = 3 * 16, 3 * 16
    assert saved_share(plan, 3, totals) == pytest.approx(-1 / 3)
