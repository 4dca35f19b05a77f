"""Random numbers are those of Philox4x64-10 at a counter that names what they are for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_megatron.algorithm import randomness
from es_megatron.algorithm.randomness import Purpose, component_key, raw, uniforms

MASK = (1 << 64) - 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011) in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product_0, product_1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(product_1 >> 64) ^ c[1] ^ k[0], product_1 & MASK, (product_0 >> 64) ^ c[3] ^ k[1], product_0 & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    purpose=st.sampled_from(Purpose),
    component=st.integers(0, 2**63 - 1),
    time=st.integers(0, 2**40),
    start=st.one_of(st.integers(0, 40), st.integers(2**32 - 5, 2**34)),
    count=st.integers(0, 11),
)
def test_bits_are_philox_at_index_time_component_purpose(seed, purpose, component, time, start, count):
    # numpy steps the counter before its first block, hence the 1
    expected = [
        philox((index // 4 + 1, time, component, int(purpose)), (seed, 0))[index % 4]
        for index in range(start, start + count)
    ]
    assert raw(seed, purpose, component, time, start, count).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 300), count=st.integers(0, 300))
def test_any_piece_equals_the_piece_of_the_whole(start, count):
    whole = raw(9, Purpose.PRUNE, 4, 2, 0, 600)
    np.testing.assert_array_equal(raw(9, Purpose.PRUNE, 4, 2, start, count), whole[start : start + count])


def test_streams_that_differ_in_one_word_share_no_number():
    streams = [
        raw(seed, purpose, component, time, 0, 256)
        for seed in (0, 1)
        for purpose in Purpose
        for component in (0, 1, 2)
        for time in (0, 1, 2)
    ]
    assert len(np.unique(np.concatenate(streams))) == 256 * len(streams)


def test_purposes_are_numbered_once_and_for_all():
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "SELECT": 1,
        "PRUNE": 2,
        "PERMUTE": 3,
        "SHUFFLE_BATCH": 4,
        "SHUFFLE_MASK": 5,
    }


def test_uniforms_lie_in_the_open_interval_at_both_ends(monkeypatch):
    ends = np.asarray([0, (1 << 12) - 1, 1 << 12, MASK], dtype=np.uint64)
    monkeypatch.setattr(randomness, "raw", lambda *_: ends)
    low, same, second, high = uniforms(0, Purpose.SELECT, 0, 0, 0, 4).tolist()
    assert low == same == 2.0**-53
    assert second == 3 * 2.0**-53
    assert high == 1 - 2.0**-53


def test_uniforms_fill_the_interval_evenly():
    u = uniforms(3, Purpose.SELECT, 0, 17, 5, 1 << 17)
    counts = np.histogram(u, bins=256, range=(0, 1))[0]
    assert 160 < ((counts - 512) ** 2 / 512).sum() < 370  # 255 degrees of freedom, 4 to 5 sigma
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(len(u))


def test_key_of_a_component_is_63_bits_of_its_name_in_every_process():
    assert component_key("books") == 4_618_257_485_399_658_809
    keys = {component_key(f"c{i}") for i in range(10_000)}
    assert len(keys) == 10_000
    assert all(0 <= key < 1 << 63 for key in keys)
    assert max(keys) > 1 << 62


@pytest.mark.parametrize("name", ["", "größe", "a" * 1000])
def test_any_name_has_a_key(name):
    assert component_key(name) == component_key(str(name))
    assert component_key(name) != component_key(name + " ")
