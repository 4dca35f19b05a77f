"""No process outlives its test."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.faults.job import Job


@pytest.fixture(autouse=True)
def _no_process_stays() -> Generator[None]:
    yield
    while Job.started:
        Job.started.pop().end()
