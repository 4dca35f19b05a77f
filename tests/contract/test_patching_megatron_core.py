"""The registry of patches against the installed megatron-core: wrap its schedule getter, use it, undo it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from megatron.core import package_info
from megatron.core.pipeline_parallel import schedules

from es_megatron.errors import PatchError
from es_megatron.patching import PatchList, apply, check, read_patches, report, undo, untested, upstream_version

VERSION = ".".join(package_info.__version__.split(".")[:2])

LIST = """
upstream: megatron-core
version: megatron.core.package_info:__version__
tested: ["{tested}"]
patches:
  - name: schedule
    target: megatron.core.pipeline_parallel.schedules:get_forward_backward_func
    glue: {glue}:count_calls
    parameters: [{parameters}]
    why: counts how often the schedule is asked for
  - name: step
    target: megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining
    glue: {glue}:count_calls
    parameters: [forward_step_func, data_iterator, model, num_microbatches, micro_batch_size, collect_non_loss_data]
    why: the keywords that the hook changes are there
"""

GLUE = """
calls = []

def count_calls(original):
    def replacement(*args, **kwargs):
        calls.append(original.__name__)
        return original(*args, **kwargs)
    return replacement
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "counting_glue.py").write_text(GLUE)

    def write(tested: str = VERSION, parameters: str = "") -> PatchList:
        path = tmp_path / "patches.yaml"
        path.write_text(LIST.format(tested=tested, parameters=parameters, glue="counting_glue"))
        return read_patches(path)

    return write


def test_schedule_is_wrapped_and_given_back(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = write()
    original = schedules.get_forward_backward_func
    assert [status.state for status in check(patches)] == ["ready", "ready"]
    lines = report(patches, apply(patches))
    assert lines[0] == f"es_megatron patches megatron-core {upstream_version(patches)}:"
    import counting_glue  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(schedules.parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)
    found = schedules.get_forward_backward_func()
    assert found is schedules.forward_backward_no_pipelining
    assert counting_glue.calls == ["get_forward_backward_func"]
    assert undo(patches) == ["step", "schedule"]
    assert schedules.get_forward_backward_func is original


def test_parameter_it_does_not_have(write: Any) -> None:
    original = schedules.get_forward_backward_func
    with pytest.raises(PatchError, match="get_forward_backward_func` must take `stages`"):
        apply(write(parameters="stages"))
    assert schedules.get_forward_backward_func is original


def test_version_that_was_not_tested(write: Any) -> None:
    patches = write(tested="0.99")
    version = re.escape(upstream_version(patches))
    with pytest.raises(PatchError, match=rf"megatron-core {version} has not been tested .*\(0\.99 have\)"):
        apply(patches, strict=True)
    assert [status.state for status in apply(patches)] == ["applied", "applied"]
    undo(patches)


def test_megatron_lm_without_its_checkout_says_so() -> None:
    """The wheel may have megatron.core alone; what the patches of Megatron-LM need is not in it then."""
    if importlib.util.find_spec("megatron.training") is not None:
        pytest.skip("this wheel of megatron-core has megatron.training")
    patches = read_patches("megatron-lm")
    with pytest.raises(PatchError, match=r"module `megatron\.training` does not exist"):
        apply(patches)


def test_megatron_lm_of_the_wheel_is_as_declared() -> None:
    """megatron-core 0.19.2 ships megatron.training, too."""
    if importlib.util.find_spec("megatron.training") is None:
        pytest.skip("this wheel of megatron-core has no megatron.training")
    patches = read_patches("megatron-lm")
    assert {status.state for status in check(patches)} == {"ready"}
    assert untested(patches) is None
