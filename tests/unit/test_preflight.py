"""How nodes talk in the pre-flight check."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from es_megatron.checks.findings import Finding, ok
from es_megatron.checks.preflight import gather


class LateStore:
    """A store whose node is slow once it has said that it has read all."""

    def __init__(self, store: TCPStore, go_on: threading.Event) -> None:
        self.store, self.go_on = store, go_on

    def set(self, key: str, value: str) -> None:
        self.store.set(key, value)
        if "/read/" in key:
            assert self.go_on.wait(30)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_a_slow_node_does_not_need_the_one_that_hosts_the_store_any_more() -> None:
    brief = timedelta(seconds=30)
    host = TCPStore("127.0.0.1", 0, is_master=True, timeout=brief, wait_for_workers=False)
    other = TCPStore("127.0.0.1", host.port, is_master=False, timeout=brief, wait_for_workers=False)
    gone, found = threading.Event(), list[list[Finding] | Exception]()

    def slow() -> None:
        try:
            found.append(gather(LateStore(other, gone), 1, 2, ok("node", "1")))
        except Exception as error:  # noqa: BLE001 - the test tells it
            found.append(error)

    thread = threading.Thread(target=slow)
    thread.start()
    first = gather(host, 0, 2, ok("node", "0"))
    del host  # as when the process ends
    gone.set()
    thread.join(60)
    assert [finding.told for finding in first] == ["0", "1"]
    assert found == [first]
