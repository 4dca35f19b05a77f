"""Ranks of a job that end together: one that fails tells the others, and no rank waits for one that is gone.

Failures travel through the store that the ranks met by, on a connection of their own, since a rank that is stuck in a
collective can be told nothing by another collective. A daemon thread of each rank looks there about once a second. Once
a failure is known every rank has `GRACE_SECONDS` to end with an error of its own; one that is stuck by then says why
and leaves its process. A request to stop takes the same way, and is heeded by all ranks at the same iteration.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch.distributed as dist

from es_megatron.errors import EsError, PeerError

LOGGER = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
"""How long a rank may take to end once a failure is known."""
POLL_SECONDS = 1.0
CLOSE_SECONDS = 5.0
RANKS_A_SECOND = 1000
"""In larger jobs a rank looks less often, so that the store is not asked more often than this, times two."""
EXIT_CODE = 2
"""Of a process that had to be left: what the command returns after other errors, too."""
SHOWN = 500
"""Characters of a failure that are told."""

FAILURE, HEARD, STOP = "failure", "heard", "stop"
LOST = ("gloo", "pair closure", "nccl", "connection reset", "connection closed")
"""What a collective says, in small letters, whose other side is gone or does not answer."""


class Alarm:
    """One rank's way of telling and hearing; in a job of one process nobody is told and nobody is left.

    As a context manager it watches its body: an exception in it is told to all ranks, and where it is the echo of
    another rank's failure, a `PeerError` that names that rank takes its place.
    """

    _connected = 0
    """Alarms of this process so far: every run of a job has keys of its own, the same on all ranks."""

    def __init__(self, grace: float = GRACE_SECONDS, leave: Callable[[int], Any] = os._exit) -> None:
        """Nobody is told before `connect`.

        Args:
            grace: seconds from the first failure to the end of a rank that is stuck.
            leave: ends the process at once.
        """
        self.stop_asked = False
        """Whether the run is to save and end; on rank 0 after any rank was asked."""
        self._grace, self._leave = grace, leave
        self._rank, self._world = 0, 1
        self._store: Any = None
        self._failure: dict[str, Any] | None = None
        self._known = threading.Lock()
        self._deadline = 0.0
        self._armed = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def connect(self) -> None:
        """Begin to listen, once the process group stands; every rank of the job must."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        Alarm._connected += 1
        own: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        if hasattr(own, "clone"):  # of torch 2.8 and later; without it a rank that joins a group holds the store
            own = own.clone()
        self._store = dist.PrefixStore(f"es_megatron/alarm/{Alarm._connected}", own)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="es-alarm")
        self._thread.start()

    def __enter__(self) -> Alarm:
        """From now on a stuck process is left."""
        self._armed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell an exception; without one, listen no more."""
        if error is None:
            self.close()
            return
        if self._world == 1 or not isinstance(error, Exception):
            self.tell(error)
            return
        lost = any(is_lost(each) for each in causes(error))
        if lost:
            self._wait_for_a_reason()
        unknown = self._failure is None
        self.tell(error)
        if self._is_of_another() and (lost or not isinstance(error, EsError)):
            raise PeerError(self._reason()) from error
        if lost and unknown:
            raise PeerError(
                f"Rank {self._rank} lost another rank and ends: {brief(error)}. Look for the first error of the other "
                "ranks; if all of them worked, and one for longer than the others waited, raise "
                "`parallel.timeout_minutes`."
            ) from error

    def check(self) -> None:
        """Raise if another rank has failed.

        Raises:
            PeerError: names the rank and what it said.
        """
        if self._is_of_another():
            raise PeerError(self._reason())

    def ask_to_stop(self) -> None:
        """Have all ranks save and end; may be called by a signal's handler, so the listening thread passes it on."""
        self.stop_asked = True

    def tell(self, error: BaseException) -> None:
        """Tell all ranks that this one fails, and wait a moment until they have heard."""
        if self._store is None or self._failure is not None:
            return
        said = json.dumps({"rank": self._rank, "type": type(error).__name__, "message": brief(error)})
        try:
            first = self._store.compare_set(FAILURE, "", said)
        except RuntimeError:  # the store is gone: this rank ends by itself, which closes its connections
            self._note(json.loads(said))
            return
        self._note(json.loads(first))
        until = time.monotonic() + 2 * self._interval()
        with suppress(RuntimeError):
            while self._store.add(HEARD, 0) < self._world and time.monotonic() < until:
                time.sleep(0.05)

    def close(self) -> None:
        """Listen no more, and leave the process alone."""
        self._armed = False
        self._over.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)  # an interpreter that ends under a thread that asks the store may crash

    def _interval(self) -> float:
        return POLL_SECONDS * max(1.0, self._world / RANKS_A_SECOND)

    def _listen(self) -> None:
        while not self._over.wait(self._interval()):
            try:
                if self._store is not None:
                    self._hear(self._store)
            except RuntimeError as error:
                if not self._over.is_set() and self._failure is None:
                    LOGGER.warning(
                        "the store of the job cannot be reached (%s): its launcher or rank 0 has ended. Rank %d goes "
                        "on, but hears of no other rank's failure, and SIGTERM must reach rank 0",
                        brief(error),
                        self._rank,
                    )
                self._store = None
            if self._failure is None and self._store is None:
                return
            if self._failure is not None and self._armed and time.monotonic() > self._deadline:
                self._end()
                return

    def _hear(self, store: Any) -> None:
        """Look for a failure, and pass requests to stop on."""
        if self._failure is None and store.check([FAILURE]):
            self._note(json.loads(store.get(FAILURE)))
        if self._rank == 0:
            self.stop_asked = self.stop_asked or store.check([STOP])
        elif self.stop_asked and not store.check([STOP]):
            store.set(STOP, str(self._rank))

    def _note(self, failure: dict[str, Any]) -> None:
        """Remember the first failure, and when this process must have ended."""
        with self._known:
            if self._failure is not None:
                return
            self._deadline = time.monotonic() + self._grace
            self._failure = failure
        with suppress(RuntimeError):  # whoever waits for it waits but a moment
            self._store.add(HEARD, 1)

    def _wait_for_a_reason(self) -> None:
        """Give a rank that is gone the time that its last words take."""
        until = time.monotonic() + 2 * self._interval()
        while self._failure is None and time.monotonic() < until:
            time.sleep(0.05)

    def _is_of_another(self) -> bool:
        return self._failure is not None and self._failure["rank"] != self._rank

    def _reason(self) -> str:
        failure: dict[str, Any] = self._failure or {}
        return (
            f"Rank {failure['rank']} failed with {failure['type']}: {failure['message']}. The other ranks cannot go on "
            "without it. Mend that, and start again: the run resumes from its newest checkpoint."
        )

    def _end(self) -> None:
        told = f"es-megatron: error: {self._reason()} Rank {self._rank} was stuck meanwhile, and its process ends."
        print(told, file=sys.stderr, flush=True)
        self._leave(EXIT_CODE)


@contextmanager
def ending_soon(seconds: float = GRACE_SECONDS, leave: Callable[[int], Any] = os._exit) -> Generator[None]:
    """Leave the process of a rank of several some seconds after an exception in the body, if it is still there.

    For commands: what runs at the exit of a process, threads and libraries, may wait for ranks that are gone.
    """
    try:
        yield
    except BaseException:
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            timer = threading.Timer(seconds, leave, (EXIT_CODE,))
            timer.daemon = True
            timer.start()
        raise


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that the other side of a collective is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in LOST)


def brief(error: BaseException) -> str:
    """One line of what an exception says."""
    text = " ".join(str(error).split()) or "no message"
    return text[:SHOWN].rstrip(" .")
