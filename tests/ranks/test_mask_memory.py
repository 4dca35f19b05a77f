"""Kept masks that the ranks of a node share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.core.epoch_pruning import EpochPruning
from es_megatron.data.mask import mask_bytes
from es_megatron.errors import ConfigError
from es_megatron.rank_grid import RankGrid
from es_megatron.scores import mask_memory
from es_megatron.scores.mask_memory import MaskMemory
from es_megatron.scores.store import ScoreStore
from tests.es_config import es_config
from tests.ranks_helper import run_on_ranks
from tests.unit.naive import make_manifest

SAMPLES = 1_000_003


@pytest.fixture
def folder() -> Generator[Path]:
    """In memory where there is such a file system, as on a real node."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield path
    shutil.rmtree(path)


def mapped_bytes(name: str) -> int:
    """Bytes of this process's maps of files whose name has this in it."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if name in line:
            low, high = (int(edge, 16) for edge in line.split()[0].split("-"))
            total += high - low
    return total


def decide(folder: Path | None) -> Any:
    grid = RankGrid.data_parallel()
    config = es_config(preset="paper", pruning_ratio=0.3, mask_folder=None if folder is None else str(folder))
    store = ScoreStore(make_manifest((SAMPLES, 40)), config, grid)
    pruning = EpochPruning(store)
    masks = [pruning.prune(0, 1), pruning.prune(1, 1), pruning.prune(0, 2)]
    grid.barrier()  # the last file loses its name after the masks are there
    left = [] if folder is None else os.listdir(folder)
    rows = [mask.select(np.arange(0, mask.count, 11)).tobytes() for mask in masks]
    packed = [mask.packed.tobytes() for mask in masks]
    mapped = mapped_bytes("es-mask-")
    writable = [mask.packed.flags.writeable for mask in masks]
    del masks, pruning
    return packed, rows, left, mapped, mapped_bytes("es-mask-"), writable


def test_ranks_of_a_node_map_the_masks_that_one_of_them_wrote(folder: Path) -> None:
    alone = run_on_ranks(1, decide, None)[0]
    told = run_on_ranks(3, decide, folder)
    for rank, (packed, rows, left, mapped, after, writable) in enumerate(told):
        assert (packed, rows) == alone[:2]
        assert left == [], "no name is left, whatever ends a process"
        assert mapped >= 2 * mask_bytes(SAMPLES)
        assert after == 0, "dropped masks are unmapped"
        assert writable == [rank == 0] * 3


def test_nodes_with_folders_of_their_own_do_not_share(tmp_path: Path) -> None:
    def decide_on_node() -> tuple[int, str]:
        grid = RankGrid.data_parallel()
        folder = tmp_path / f"node{grid.world_rank // 2}"
        folder.mkdir(exist_ok=True)
        memory = MaskMemory(str(folder), grid)
        mask = memory.share(np.asarray([0b101, 0b1], np.uint8), 9)
        assert mask.count == 3
        return int(memory._writes), memory._token

    told = run_on_ranks(4, decide_on_node)
    assert [writes for writes, _ in told] == [1, 0, 1, 0]
    assert told[0][1] == told[1][1] != told[2][1] == told[3][1]


def test_a_full_node_is_told_on_every_rank(tmp_path: Path) -> None:
    def fill() -> None:
        def full(*_: int) -> None:
            raise OSError(28, "No space left on device")

        mask_memory.os.posix_fallocate = full
        with pytest.raises(ConfigError, match=r"`mask_folder` must be a folder .* No space left on device"):
            decide(tmp_path)
        assert os.listdir(tmp_path) == []

    run_on_ranks(2, fill)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    memory = MaskMemory(str(tmp_path / "missing"), RankGrid.alone())
    with pytest.raises(ConfigError, match=r"missing.*No such file"):
        memory.share(np.zeros(1, np.uint8), 3)
