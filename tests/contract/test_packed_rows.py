"""Rows of several documents (`cu_seqlens`), flattened as upstream does for attention over one stream of tokens.

Attention that stops at documents stands in for Transformer Engine's, which needs a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from es_megatron.errors import ConfigError
from es_megatron.trainer.model import initialize, loss_of, reads_data
from tests import small_loop
from tests.context_helper import gather_attention
from tests.ranks_helper import run_on_ranks
from tests.small_loop import Loop, RandomRows
from tests.small_run import T, settings_of

from megatron.core.datasets import gpt_dataset  # isort: skip - after the CPU layer
from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip

ITERATIONS = 8


class PackedRows(RandomRows):
    """Rows of one to three documents."""

    def __getitem__(self, sample_id: int) -> dict[str, Tensor]:
        ends = sorted({1 + sample_id % (T - 1), T - sample_id % 5, T})
        bounds = torch.full((T + 1,), T, dtype=torch.int32)
        bounds[: len(ends) + 1] = torch.tensor([0, *ends])
        return {**super().__getitem__(sample_id), "cu_seqlens": bounds, "max_seqlen": torch.tensor(T)}


def flattened(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A micro-batch as one row `[1, b * T]`, and where its documents begin."""
    bounds = [bound + row * T for row, each in enumerate(batch["cu_seqlens"]) for bound in each.unique().tolist()]
    rows = {name: batch[name].reshape(1, -1) for name in ("tokens", "labels", "loss_mask", "position_ids")}
    return rows, torch.tensor(sorted(set(bounds)), dtype=torch.int32)


def packed_step(iterator: Iterator[dict[str, Tensor]], chunk: Any) -> Any:
    """Forward as `pretrain_gpt.py` does with packed rows."""
    assert reads_data(chunk)
    rows, bounds = flattened(next(iterator))
    output = chunk(
        input_ids=rows["tokens"],
        position_ids=rows["position_ids"],
        attention_mask=None,
        labels=rows["labels"],
        packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds),
    )
    return output, functools.partial(loss_of, rows["loss_mask"], counted=rows["loss_mask"].sum())


def run(overrides: tuple[str, ...]) -> tuple[list[list[int]], list[float], list[list[float]]]:
    """Ids, mean losses and gradients by iteration."""
    settings = settings_of(Path("unused"), Path("unused"), "model.position_embedding=learned", *overrides)
    initialize(settings)
    gather_attention(settings, packed=True)
    small_loop.forward_step = packed_step
    loop = Loop(settings, PackedRows())
    assert loop.sampling is not None
    name = next(name for name, _ in loop.chunks[0].named_parameters() if "layernorm" in name)
    ids, losses, gradients = list[list[int]](), list[float](), list[list[float]]()
    for _ in range(ITERATIONS):
        ids.append(loop.evolve(spoil=lambda loop: gradients.append(loop.gradient(name))).chosen)
        losses.append(loop.sampling.engine.last.chosen_loss)  # pyright: ignore[reportOptionalMemberAccess]
    return ids, losses, gradients


WEIGHTED = "evolved_sampling.selection.inclusion_weights=true"
LARGE = ("training.micro_batch_size=4", "evolved_sampling.scorer.micro_batch_size=8")


@pytest.mark.parametrize(
    "changes",
    [(), (WEIGHTED,), ("evolved_sampling.scorer=history",), ("evolved_sampling.selection.policy=grad-norm",)],
    ids=["fresh", "weighted", "history", "grad-norm"],
)
def test_flattened_micro_batches_choose_as_single_rows_do(changes: tuple[str, ...]) -> None:
    alone = run_on_ranks(1, run, ("evolved_sampling.scorer.micro_batch_size=1", *changes), timeout=150)[0]
    flat = run_on_ranks(1, run, (*LARGE, *changes), timeout=150)[0]
    assert flat[0] == alone[0]
    assert {len(ids) for ids in flat[0]} == {4, 16}
    np.testing.assert_allclose(flat[1], alone[1], rtol=2e-6)
    np.testing.assert_allclose(flat[2], alone[2], rtol=1e-3, atol=1e-6)


def test_packed_rows_on_two_ranks() -> None:
    alone = run_on_ranks(1, run, LARGE, timeout=150)[0]
    two = ("training.micro_batch_size=2", "evolved_sampling.scorer.micro_batch_size=4")
    for told in run_on_ranks(2, run, two, timeout=150):
        assert told[0] == alone[0]
        np.testing.assert_allclose(told[1], alone[1], rtol=2e-6)


def refused(told: str, *overrides: str) -> None:
    settings = settings_of(Path("unused"), Path("unused"), *overrides)
    initialize(settings)
    with pytest.raises(ConfigError, match=told):
        Loop(settings, PackedRows())


def test_what_packed_rows_do_not_go_with_is_refused() -> None:
    run_on_ranks(1, refused, "`scorer` must be another one than `prefix`", "evolved_sampling.scorer=prefix", timeout=90)
    run_on_ranks(2, refused, "`context_parallel_size` must be 1 with packed rows", "parallel.context=2", timeout=90)


@pytest.mark.skipif(
    "inter_document_masking" not in gpt_dataset.GPTDatasetConfig.__dataclass_fields__,
    reason="this megatron-core does not tell documents of a row",
)
def test_upstreams_dataset_tells_the_documents_of_our_rows(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers import MegatronTokenizer

    from es_megatron.frameworks.megatron_lm_data import SplitRows, open_token_file, take_rows
    from tests.megatron_lm_helper import write_component

    write_component(tmp_path / "books", 40, seed=5)
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(tmp_path / "cache"),
        split="1,0,0",
        inter_document_masking=True,
        tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=127),
    )
    source = IndexedDataset(str(tmp_path / "books"))
    theirs = gpt_dataset.GPTDataset(source, str(tmp_path / "books"), np.arange(40), None, Split.train, config)
    rows = SplitRows("books", open_token_file(tmp_path / "books"), 32, 40)
    view = take_rows(theirs, rows)
    text = np.concatenate([source[n] for n in range(40)])
    begins = np.cumsum([0, *(len(source[n]) for n in range(40))])
    for row in range(len(rows)):
        sample = view[row]
        assert sample["tokens"].tolist() == text[32 * row : 32 * row + 32].tolist()
        inside = begins[(begins > 32 * row) & (begins < 32 * row + 32)] - 32 * row
        assert sample["cu_seqlens"].unique().tolist() == [0, *inside.tolist(), 32]
