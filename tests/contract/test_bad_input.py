"""Wrong data files and settings are told on every rank, with the thing and the cure, and no rank hangs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from es_megatron import cli
from es_megatron.errors import DataError, EsError, LayoutError
from es_megatron.frameworks.megatron_data import open_token_file
from es_megatron.frameworks.token_hash import take_hash, write_hash
from tests.ranks_helper import run_on_ranks
from tests.small_run import Trainer, settings_of, train, write_blend

SECONDS = 60


@pytest.fixture
def blend(tmp_path: Path) -> Path:
    return write_blend(tmp_path / "data")


def told_by_every_rank(ranks: int, settings: Any, kind: type[EsError] = EsError) -> str:
    """Build the trainer on every rank; every one must raise the same words in time."""

    def refuse() -> str:
        with pytest.raises(kind) as raised:
            Trainer(settings)
        return str(raised.value)

    told = run_on_ranks(ranks, refuse, timeout=SECONDS)
    assert len(set(told)) == 1
    return told[0]


# --- data files ---


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file(suffix: str, blend: Path, tmp_path: Path) -> None:
    (blend.parent / f"b.{suffix}").unlink()
    message = told_by_every_rank(2, settings_of(blend, tmp_path / "run"), DataError)
    assert f"b.{suffix}` does not exist" in message
    assert "es-megatron prepare" in message


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_truncated_file(suffix: str, blend: Path, tmp_path: Path) -> None:
    path = blend.parent / f"b.{suffix}"
    path.write_bytes(path.read_bytes()[:-6])
    message = told_by_every_rank(2, settings_of(blend, tmp_path / "run"), DataError)
    assert str(path) in message
    assert "bytes" in message
    assert "es-megatron prepare" in message


def test_a_file_that_only_one_rank_misses(blend: Path, tmp_path: Path) -> None:
    """A node whose disk lacks the data stops all, not itself alone."""

    def refuse() -> str:
        chosen = blend if dist.get_rank() == 0 else tmp_path / "elsewhere" / "blend.yaml"
        with pytest.raises(EsError) as raised:
            Trainer(settings_of(chosen, tmp_path / "run"))
        return str(raised.value)

    told = run_on_ranks(2, refuse, timeout=SECONDS)
    assert told[0] == told[1]
    assert "rank 1" in told[0]
    assert "elsewhere/blend.yaml` does not exist" in told[0]


def test_data_of_another_tokenizer(blend: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(blend.read_text())
    blend.write_text(yaml.safe_dump({**content, "vocab_size": 8}))

    def refuse() -> str:
        with pytest.raises(EsError, match="another tokenizer") as raised:
            train(settings_of(blend, tmp_path / "run"))
        return str(raised.value)

    assert "must be in [0, 8)" in run_on_ranks(1, refuse)[0]


@pytest.mark.parametrize("hashed", [True, False])
def test_data_that_does_not_fit_is_told_to_every_rank_before_the_first_iteration(
    hashed: bool, blend: Path, tmp_path: Path
) -> None:
    """Text that was written anew under the same hash; without a hash, ids that the model has not."""
    path = blend.parent / "b.bin"
    if hashed:
        file = open_token_file(path.with_suffix(""))
        write_hash(file, take_hash(file))
        path.write_bytes(bytes(2) + path.read_bytes()[:-2])
    else:
        path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")

    def refuse() -> tuple[str, int]:
        trainer = Trainer(settings_of(blend, tmp_path / "run"))
        with pytest.raises(DataError) as raised:
            trainer.run()
        return str(raised.value), trainer.engine.iteration

    told = run_on_ranks(2, refuse, timeout=SECONDS)
    assert told[0] == told[1]
    assert ("is not the file it was" if hashed else "`b` must be in [0, 96)") in told[0][0]
    assert told[0][1] == 0


def test_a_change_that_is_found_late_ends_the_run_before_it_is_saved(blend: Path, tmp_path: Path) -> None:
    file = open_token_file(blend.parent / "b")
    write_hash(file, take_hash(file))
    path = blend.parent / "b.bin"
    path.write_bytes(bytes(2) + path.read_bytes()[:-2])

    def refuse() -> str:
        settings = settings_of(blend, tmp_path / "run")
        trainer = Trainer(settings)
        trainer.data._done.wait(SECONDS)  # found, and nobody has asked
        trainer.data.agree, agree = lambda *_: None, trainer.data.agree
        save = trainer._save
        trainer._save = lambda journal: (setattr(trainer.data, "agree", agree), save(journal))[1]
        with pytest.raises(DataError, match="is not the file it was") as raised:
            trainer.run()
        assert trainer.engine.iteration > 0
        return str(raised.value)

    told = run_on_ranks(2, refuse, timeout=SECONDS)
    assert told[0] == told[1]
    assert not list((tmp_path / "run").rglob("es_state"))


# --- settings, through the command line as under torchrun ---


def command_line(arguments: list[str]) -> tuple[int, str]:
    """Exit code and what the command said on standard error."""
    import contextlib
    import io

    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        code = cli.main(arguments)
    return code, heard.getvalue()


SETTINGS = [
    ("training.learning_rate=1", "Unknown key `learning_rate`", "Did you mean `lr`?"),
    ("evolved_sampling.keepratio=0.5", "Unknown key `keepratio`", "Did you mean `selection.keep_ratio`?"),
    ("evolved_sampling.scores.beta1=1.5", "`scores.beta1` must be in [0, 1], but is 1.5 instead", ""),
    ("evolved_sampling.scores.beta2=1", "`scores.beta2` must be in [0, 1), but is 1.0 instead", ""),
    ("evolved_sampling.selection.keep_ratio=0", "`selection.keep_ratio` must be in (0, 1], but is 0.0 instead", ""),
    ("evolved_sampling.selection.keep_ratio=0.2", "must be a multiple of 2", "Use `keep_ratio` 0.25"),
    ("evolved_sampling.pruning.ratio=1", "`pruning.ratio` must be in [0, 1), but is 1.0 instead", ""),
    ("evolved_sampling.arm=unifrom", "`arm` must be one of", "Did you mean `uniform`?"),
    ("evolved_sampling.scorer.micro_batch_size=3", "`scorer.micro_batch_size` must cut", "Use one of [1, 2, 4, 8]"),
    ("training.global_batch_size=15", "`global_batch_size` must be a multiple of", "Use 16"),
    ("training.passes=2", "Exactly one of `passes` and `train_samples`", "Give one"),
    ("parallel.tensor=4", "must be a multiple of tensor x pipeline = 4 x 1", "Start 4"),
    ("evolved_sampling.order.mask_lag=1", "`prefetch` must be at most `order.mask_lag` = 1", "but is 2 instead"),
]


@pytest.mark.parametrize(("override", "said", "cure"), SETTINGS, ids=[setting[0] for setting in SETTINGS])
def test_settings(override: str, said: str, cure: str, blend: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(plain_settings(blend, tmp_path)))
    for code, heard in run_on_ranks(2, command_line, ["pretrain", "--config", str(path), override], timeout=SECONDS):
        assert code == 2
        assert heard.startswith("es-megatron pretrain: error: ")
        assert said in heard
        assert cure in heard
        assert "Traceback" not in heard


def plain_settings(blend: Path, folder: Path) -> dict[str, Any]:
    """The small run as a configuration file has it."""
    return {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
        "data": {"blend": str(blend)},
        "training": {"train_samples": 320, "global_batch_size": 16, "micro_batch_size": 1},
        "run": {"directory": str(folder / "run")},
    }


@pytest.mark.parametrize(
    ("overrides", "said", "cure"),
    [
        (
            ("training.micro_batch_size=16", "evolved_sampling.selection.keep_ratio=1"),
            "but are 1 instead",
            "micro_batch_size",
        ),
        (("evolved_sampling.selection.keep_ratio=0.0625",), "must be a multiple of 2", "Use `keep_ratio` 0.125"),
        (
            ("evolved_sampling.scorer.micro_batch_size=16",),
            "into a multiple of 2 micro-batches",
            "Use one of [1, 2, 4, 8]",
        ),
    ],
    ids=["training", "chosen", "scoring"],
)
def test_too_few_micro_batches_for_virtual_stages(
    overrides: tuple[str, ...], said: str, cure: str, blend: Path, tmp_path: Path
) -> None:
    virtual = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    message = told_by_every_rank(2, settings_of(blend, tmp_path / "run", *virtual, *overrides))
    assert said in message
    assert cure in message


def test_a_world_that_cannot_hold_the_layout(blend: Path, tmp_path: Path) -> None:
    message = told_by_every_rank(3, settings_of(blend, tmp_path / "run", "parallel.pipeline=2"), LayoutError)
    assert "1 x 2, but is 3 instead" in message


@pytest.fixture(autouse=True)
def _no_logging_from_before() -> Iterator[None]:
    """The command line sets logging up; other tests want it as it was."""
    import logging

    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers = before
