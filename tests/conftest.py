"""Settings shared by every test: one thread per process, and where upstream's warnings are tolerated."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"  # before numpy and torch read them; a rank forked from a threaded process may hang

from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# No deadline: how long one example takes tells more about what else the machine does.
hypothesis.settings.register_profile("project", deadline=None, print_blob=True)
hypothesis.settings.load_profile("project")

HERE = Path(__file__).parent
RELAXED = (HERE / "contract", HERE / "end_to_end")


def _is_relaxed(path: Path) -> bool:
    """Warnings are errors, except where the code under test is upstream's and so are the warnings."""
    return any(folder in path.parents for folder in RELAXED)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Relax the warnings of what a test file imports; a test's marks do not reach them."""
    with warnings.catch_warnings():
        if _is_relaxed(collector.path):
            warnings.simplefilter("default")
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Relax the warnings of tests; put first, the mark beats pyproject.toml, and the test's own marks beat it."""
    for item in items:
        if _is_relaxed(item.path):
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
