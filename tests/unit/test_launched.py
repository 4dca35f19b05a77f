"""What a launcher must have told a process of a run."""

from __future__ import annotations

import pytest

from es_megatron.errors import LayoutError
from es_megatron.trainer.launched import launched_ranks

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "a", "LOCAL_RANK": "0"}, {"RANK": "", "WORLD_SIZE": ""}]
)
def test_a_process_without_a_launcher_is_alone(environment):
    assert launched_ranks(environment) == 1


def test_a_launcher_tells_how_many_there_are():
    assert launched_ranks(WHOLE) == 2
    assert launched_ranks({**WHOLE, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}) == 1


@pytest.mark.parametrize("name", WHOLE)
def test_half_a_launcher_is_refused(name):
    with pytest.raises(LayoutError, match=f"{name} must be set where"):
        launched_ranks({**WHOLE, name: ""})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "first"}, "must be integers.*'first'"),
        ({"MASTER_PORT": "x"}, "must be integers"),
        ({"RANK": "2"}, r"RANK must be in \[0, WORLD_SIZE\).*RANK=2"),
        ({"RANK": "-1"}, r"RANK must be in \[0, WORLD_SIZE\)"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes, message):
    with pytest.raises(LayoutError, match=message):
        launched_ranks({**WHOLE, **changes})
