"""What one rank tells the others, with the two ends of it in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from es_megatron.errors import ConfigError, PeerError
from es_megatron.trainer import alarm as module
from es_megatron.trainer.alarm import EXIT_CODE, Alarm, ending_soon
from tests.faults.job import free_port

PATIENCE = 20.0


class Ranks:
    """Alarms of a job's ranks over one store, and the codes of processes that were left."""

    def __init__(self, store: Any, grace: float = 0.2) -> None:
        self.left: list[tuple[int, int]] = []
        self.store = store
        self.alarms = [Alarm(grace, lambda code, rank=rank: self.left.append((rank, code))) for rank in range(2)]
        for rank, alarm in enumerate(self.alarms):
            alarm._rank, alarm._world, alarm._store = rank, 2, store
            alarm._thread = threading.Thread(target=alarm._listen, daemon=True)
            alarm._thread.start()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Ranks]:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    found = Ranks(dist.FileStore(str(tmp_path / "store"), 2))
    yield found
    for alarm in found.alarms:
        alarm.close()


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stuck_rank_is_left_with_the_reason(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.alarms[0].__enter__()  # and waits in a collective
    with pytest.raises(OSError, match="no room"), ranks.alarms[1]:
        raise OSError("no room")
    until(lambda: len(ranks.left) == 2)
    assert sorted(ranks.left) == [(0, EXIT_CODE), (1, EXIT_CODE)], "rank 1 does not end by itself here, either"
    assert "Rank 1 failed with OSError: no room. " in capsys.readouterr().err


def test_the_loop_hears_of_it(ranks: Ranks) -> None:
    ranks.alarms[0].check()
    ranks.alarms[1].tell(ConfigError("wrong"))

    def heard() -> bool:
        return ranks.alarms[0]._failure is not None

    until(heard)
    with pytest.raises(PeerError, match="Rank 1 failed with ConfigError: wrong"):
        ranks.alarms[0].check()
    ranks.alarms[1].check()
    time.sleep(0.5)
    assert ranks.left == [], "outside of its body an alarm leaves no process"


def test_the_first_failure_counts_and_an_error_of_ones_own_stays(ranks: Ranks) -> None:
    for rank in range(2):
        with pytest.raises(ConfigError, match=f"of {rank}"), ranks.alarms[rank]:
            raise ConfigError(f"of {rank}")
    assert {json.dumps(alarm._failure) for alarm in ranks.alarms} == {
        '{"rank": 0, "type": "ConfigError", "message": "of 0"}'
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_connection_that_broke_is_told_as_what_broke_it(ranks: Ranks, wrapped: bool) -> None:
    def lose() -> None:
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:550] Connection closed by peer [127.0.0.1]:4711")
        except RuntimeError as error:
            if wrapped:
                raise ConfigError("Could not be saved") from error
            raise

    threading.Timer(0.02, ranks.alarms[1].tell, (KeyError("b"),)).start()
    with pytest.raises(PeerError, match="Rank 1 failed with KeyError: 'b'"), ranks.alarms[0]:
        lose()


def test_a_connection_that_broke_for_no_known_reason(ranks: Ranks) -> None:
    with (
        pytest.raises(PeerError, match=r"Rank 0 lost another rank .* raise `parallel.timeout_minutes`"),
        ranks.alarms[0],
    ):
        raise RuntimeError("[gloo] Timed out waiting 600000ms for recv operation to complete")


def test_a_request_to_stop_reaches_rank_0(ranks: Ranks) -> None:
    assert not ranks.alarms[0].stop_asked
    ranks.alarms[1].ask_to_stop()
    until(lambda: ranks.alarms[0].stop_asked)


def test_a_body_that_ends_well_ends_the_listening(ranks: Ranks) -> None:
    with ranks.alarms[0]:
        pass
    ranks.alarms[1].tell(KeyError("late"))
    time.sleep(0.3)
    assert ranks.alarms[0]._failure is None


def test_without_the_store_the_run_goes_on(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Broken pipe")

    ranks.alarms[0]._store = Gone()
    until(lambda: ranks.alarms[0]._store is None)
    assert ["the store of the job cannot be reached" in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(OSError, match="no room"), ranks.alarms[0]:
        raise OSError("no room")


def test_alone_nobody_is_told() -> None:
    alarm = Alarm()
    alarm.connect()
    with pytest.raises(KeyError), alarm:
        raise KeyError("a")
    alarm.check()


def test_the_exit_of_a_rank_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    for ranks, expected in (("1", []), ("2", [EXIT_CODE])):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with pytest.raises(KeyError), ending_soon(0.05, left.append):
            raise KeyError("a")
        time.sleep(0.5)
        assert left == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_meets_nobody_says_where_it_waited(rank: int) -> None:
    program = """
import sys
from datetime import timedelta
from es_megatron.testing import cpu
cpu.install()
from es_megatron.errors import PeerError
from es_megatron.trainer import model
try:
    model._join_process_group(timedelta(seconds=1))
except PeerError as error:
    sys.exit(str(error))
"""
    port = str(free_port())
    meeting = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ended = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **meeting}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert f"The 2 ranks did not meet at 127.0.0.1:{port}" in ended.stderr
    assert "raise `parallel.timeout_minutes`" in ended.stderr
