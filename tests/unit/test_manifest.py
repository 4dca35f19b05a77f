"""Stable identity of samples, and what a manifest refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import CheckpointError, DataError
from tests.unit.naive import make_manifest


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_ids_number_the_rows_of_all_components_in_order(sizes):
    manifest = make_manifest(sizes)
    expected = [(c, row) for c, size in enumerate(sizes) for row in range(size)]
    assert manifest.total == len(expected)
    component, row = manifest.locate(np.arange(manifest.total))
    assert component.dtype == row.dtype == np.int64
    assert list(zip(component.tolist(), row.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(manifest.sample_ids(component, row), np.arange(manifest.total))


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(2**30, 2**33), min_size=2, max_size=5),
    data=st.data(),
)
def test_ids_past_32_bits(sizes, data):
    manifest = make_manifest(sizes)
    assert manifest.offsets.dtype == np.int64
    for c, size in enumerate(sizes):
        row = data.draw(st.integers(0, size - 1))
        rows = np.asarray([0, row, size - 1])
        ids = manifest.sample_ids(c, rows)
        assert ids.tolist() == [sum(sizes[:c]) + r for r in rows.tolist()]
        component, back = manifest.locate(ids)
        assert component.tolist() == [c] * 3
        np.testing.assert_array_equal(back, rows)


def test_shapes_are_kept():
    manifest = make_manifest([3, 4])
    component, row = manifest.locate(np.asarray([[0, 3], [6, 2]]))
    assert component.tolist() == [[0, 1], [1, 0]]
    assert row.tolist() == [[0, 0], [3, 2]]


def test_json_form_reads_back_through_text():
    manifest = make_manifest([3, 2**33], [0.1, 1 / 3])
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.parametrize("broken", ["missing", "unknown", "no list"])
def test_saved_form_that_is_not_known_is_an_error(broken):
    data = make_manifest([3]).to_json()
    if broken == "missing":
        del data["components"][0]["samples"]
    elif broken == "unknown":
        data["components"][0]["colour"] = "red"
    else:
        del data["components"]
    with pytest.raises(CheckpointError, match="not of a known form"):
        Manifest.from_json(data)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(DataError, match="`weight` of component `books` must be finite and >= 0"):
        Component("books", "books", 5, weight, "")


def test_component_without_samples_names_the_cure():
    with pytest.raises(DataError, match=r"`books` must have at least 1 sample, but has 0 .*`seq_length`"):
        Component("books", "books", 0, 1.0, "")


def test_blend_as_a_whole_is_checked():
    one = Component("a", "a", 5, 0.0, "")
    with pytest.raises(DataError, match="at least 1 component"):
        Manifest((), 8)
    with pytest.raises(DataError, match="unique"):
        Manifest((one, one), 8)
    with pytest.raises(DataError, match="weight above 0"):
        Manifest((one,), 8)
