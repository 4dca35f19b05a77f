"""Settings shared by every test: one thread per process, and where upstream's warnings are tolerated."""

from __future__ import annotations

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors, except where the code under test is upstream's and so are the warnings.

    The mark goes first: it beats pyproject.toml, and a mark of the test itself beats it.
    """
    for item in items:
        if any(folder in item.path.parents for folder in RELAXED):
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
