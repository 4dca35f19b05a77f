"""Samples of meta-batches, read ahead by loader workers, and the micro-batches made of them. torch only."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from es_megatron.data.sampler import MetaBatch, Sampler
from es_megatron.errors import ConfigError, DataError

Int64 = npt.NDArray[np.int64]
Sample = Mapping[str, Tensor]
LOGGER = logging.getLogger(__name__)

KILLED = "DataLoader worker (pid"
"""What torch says of a worker that is gone."""
STARTS = 3
"""How often the loader of one iteration is tried."""


class Rows(Protocol):
    """A blend's samples by id."""

    def __getitem__(self, sample_id: int, /) -> Sample:
        """Read one sample: tensors `[T]` by name."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...


class MetaBatchFeed:
    """This rank's share of each meta-batch, with rows of other ranks read on demand by their id."""

    def __init__(
        self, rows: Rows, sampler: Sampler, own: Int64, *, workers: int = 0, prefetch: int = 2, mask_lag: int = 1
    ) -> None:
        """Set the loader up; nothing is read before the first `fetch`.

        Args:
            rows: the blend's samples, picklable for workers.
            sampler: tells the ids of each iteration; lives in this process only.
            own: positions of a full meta-batch that this rank reads ahead, int64[B/D]; of a smaller one it reads those
                that it has.
            workers: loader processes; 0 reads in this process.
            prefetch: meta-batches a worker reads ahead.
            mask_lag: iterations by which kept masks are decided ahead.

        Raises:
            ConfigError: workers would ask for meta-batches whose kept masks are not decided yet.
        """
        ahead = workers * prefetch
        if ahead > mask_lag:
            raise ConfigError(
                f"`order.mask_lag` must be >= {ahead} (loader workers times prefetch), but is {mask_lag} instead. "
                "Raise it, or use fewer workers."
            )
        self._rows, self._sampler, self._own = rows, sampler, own
        self._workers, self._prefetch = workers, prefetch
        self._loader: Iterator[Any] | None = None
        self._next = -1
        self._held: dict[int, tuple[MetaBatch, dict[str, Tensor]]] = {}
        self._iteration = -1
        self._slot: dict[int, int] = {int(position): slot for slot, position in enumerate(own)}  # own is rising

    def fetch(self, batch: MetaBatch) -> None:
        """Hold this rank's rows of a meta-batch; going anywhere but forward restarts the loader."""
        self._iteration = batch.iteration
        self._held = {at: held for at, held in self._held.items() if at == batch.iteration}
        self._hold(batch)

    def fetch_ahead(self, batch: MetaBatch) -> None:
        """Hold this rank's rows of the meta-batch after that of `fetch` too."""
        self._hold(batch)

    def micro_batches(self, positions: Int64, size: int, iteration: int | None = None) -> list[dict[str, Tensor]]:
        """Pack positions of a held meta-batch into micro-batches.

        Args:
            positions: int64[k * size]; positions of other ranks are read by id.
            size: sequences in a micro-batch.
            iteration: of the meta-batch; None: the one of `fetch`.

        Returns:
            k dicts of tensors `[size, T]`.
        """
        rows = self._gather(positions, self._iteration if iteration is None else iteration)
        return [
            {name: tensor[start : start + size] for name, tensor in rows.items()}
            for start in range(0, len(positions), size)
        ]

    def _hold(self, batch: MetaBatch) -> None:
        if batch.iteration in self._held:
            return
        if self._loader is None or self._next != batch.iteration:
            self._loader = self._start(batch.iteration)
        self._held[batch.iteration] = batch, self._read(self._loader, batch.iteration)
        self._next = batch.iteration + 1

    def _read(self, loader: Iterator[Any], iteration: int) -> dict[str, Tensor]:
        """Take the next rows; workers that were killed are started again, and read the same."""
        for _ in range(STARTS):
            try:
                return cast(dict[str, Tensor], next(loader))
            except RuntimeError as error:
                if KILLED not in str(error):  # what a worker raised comes through as it is
                    raise
                LOGGER.warning("%s; the loader of iteration %d starts again", str(error).rstrip("."), iteration)
            self._loader = loader = self._start(iteration)
        raise DataError(
            f"Loader workers were killed {STARTS} times in a row at iteration {iteration}. Is there enough memory, "
            "also under /dev/shm? Use fewer workers (`num_workers`), or 0, which reads in the training process."
        )

    def _gather(self, positions: Int64, iteration: int) -> dict[str, Tensor]:
        if iteration not in self._held:
            raise RuntimeError("`fetch` must be called before `micro_batches`.")
        batch, rows = self._held[iteration]
        away = [position for position in positions.tolist() if position not in self._slot]
        own = self._own[self._own < len(batch.id)]
        if not away and len(positions) == len(own) and (positions == own).all():
            return rows
        moved = collate([self._rows[int(batch.id[position])] for position in away]) if away else {}
        order = {position: slot for slot, position in enumerate(away)}
        offset = len(own)
        index = torch.tensor(
            [self._slot[p] if p in self._slot else offset + order[p] for p in positions.tolist()], dtype=torch.int64
        )
        return {
            name: (torch.cat([held, moved[name]]) if away else held).index_select(0, index)
            for name, held in rows.items()
        }

    def _start(self, iteration: int) -> Iterator[Any]:
        loader = DataLoader(
            cast(Any, self._rows),
            batch_sampler=self._ids_from(iteration),
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # a loader that starts draws a seed: not from the model's dropout
        )
        before = signal.getsignal(signal.SIGCHLD)
        started = iter(loader)
        if self._workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever training happens to be when a worker is killed; without it `next` does.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return started

    def _ids_from(self, iteration: int) -> Any:
        return OwnIds(self._sampler, self._own, iteration)


class OwnIds:
    """Batches of sample ids from an iteration to the end of the run; runs in the main process."""

    def __init__(self, sampler: Sampler, own: Int64, iteration: int) -> None:
        """Remember where to begin."""
        self._sampler, self._own, self._iteration = sampler, own, iteration

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's ids of each iteration."""
        for iteration in range(self._iteration, self._sampler.schedule.iterations):
            ids = self._sampler.batch(iteration).id
            yield ids[self._own[self._own < len(ids)]].tolist()


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stack samples `[T]` to `[n, T]`, name by name."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
