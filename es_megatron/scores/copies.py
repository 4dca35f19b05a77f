"""Copies of a range of scores across tensor and pipeline ranks."""

from __future__ import annotations

from collections.abc import Callable

from es_megatron.errors import LayoutError
from es_megatron.rank_grid import RankGrid


def check_copies(grid: RankGrid, checksum: Callable[[], int], iteration: int) -> None:
    """Compare the copies of each range across tensor and pipeline ranks; collective over the world.

    Args:
        grid: the ranks.
        checksum: of this rank's copy.
        iteration: the next one, for the message.

    Raises:
        LayoutError: on every rank, if copies differ.
    """
    if grid.mp_size == 1:
        return
    copies: dict[int, dict[int, int]] = {}
    for data_rank, model_rank, found in grid.gather_objects((grid.dp_rank, grid.mp_rank, checksum())):
        copies.setdefault(data_rank, {})[model_rank] = found
    for data_rank, checksums in sorted(copies.items()):
        if len(set(checksums.values())) > 1:
            raise LayoutError(
                f"The scores of data-parallel rank {data_rank} must be equal on its tensor- and pipeline-parallel "
                f"ranks, but differ before iteration {iteration} (checksums by rank: {checksums}). Resume from the "
                "last checkpoint; if it comes again, look for a rank with faulty memory or other software."
            )
