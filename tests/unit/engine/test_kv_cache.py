"""Slots: how far texts are attended to together, growing, and wiping."""

from __future__ import annotations

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.engine.attention import CALL_OVERHEAD, shared_length
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.kv_cache import KVCache
from prefixtune.errors import ConfigError, RequestError
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix

SHAPES = (LayerShape(2, 4, 3), LayerShape(1, 8, 8))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12), st.integers(0, 5))
def test_the_cheapest_common_length(lengths: list[int], holes: int):
    rows = len(lengths) + holes

    def cost(common: int) -> int:
        alone = sum(n + CALL_OVERHEAD for n in lengths if n > common)
        return alone + (rows * common + CALL_OVERHEAD if common else 0)

    found = shared_length(lengths, rows)
    assert found in (0, *lengths)
    assert cost(found) == min(cost(common) for common in (0, *lengths))


def make(num_slots: int = 3, max_length: int = 1000) -> KVCache:
    return KVCache(SHAPES, num_slots, max_length, torch.float32, torch.device("cpu"))


def prefix(length: int) -> Prefix:
    pairs = (
        (torch.randn(s.num_kv_heads, length, s.key_dim), torch.randn(s.num_kv_heads, length, s.value_dim))
        for s in SHAPES
    )
    return Prefix({"decoder": tuple(pairs)})


def test_growing_keeps_what_is_there_and_wiping_leaves_nothing():
    cache, given_prefix = make(), prefix(5)
    cache.put(1, given_prefix)
    before = cache.capacity
    cache.reserve(before + 1)
    assert cache.capacity == 2 * before
    for number, (key, value) in enumerate(given_prefix.layers["decoder"]):
        assert torch.equal(cache.keys[number][1, :, :5], key)
        assert torch.equal(cache.values[number][1, :, :5], value)
        assert cache.keys[number].shape == (3, SHAPES[number].num_kv_heads, 2 * before, SHAPES[number].key_dim)
    assert cache.num_bytes == 3 * 2 * before * sum(shape.size for shape in SHAPES) * 4
    cache.wipe(1, 5)
    assert not any(buffer.any() for buffer in (*cache.keys, *cache.values))


def test_slots_grow_to_the_longest_text_and_no_further():
    cache = make(max_length=300)
    cache.reserve(257)
    assert cache.capacity == 300
    with pytest.raises(RequestError, match="301 positions"):
        cache.reserve(301)


def test_more_slots_than_memory_has_room_for():
    shapes = (LayerShape(4, 64, 64),)
    with pytest.raises(ConfigError, match=r"no room for the 488,281,250\.0 GiB of 1,000,000,000,000 slots") as error:
        KVCache(shapes, 10**12, 256, torch.float32, torch.device("cpu"))
    assert error.value.hint == "lower num_slots."
    with pytest.raises(ConfigError, match="num_slots"):
        EngineConfig(num_slots=65_537)


def test_a_long_text_takes_memory_for_itself_alone():
    """Slots become as long as the longest text, in memory that only written positions take."""
    cache = KVCache((LayerShape(4, 64, 64),), 32, 20_000, torch.float32, torch.device("cpu"))
    process, mib = psutil.Process(), 2**20
    cache.put(1, Prefix({"decoder": ((torch.ones(4, 200, 64), torch.ones(4, 200, 64)),)}))
    before = process.memory_info().rss
    cache.reserve(8_000)
    cache.reserve(20_000)
    cache.keys[0][0, :, :8_000] = 1.0
    assert cache.num_bytes == 20_000 * cache.bytes_per_position > 1_000 * mib
    assert process.memory_info().rss - before < 64 * mib
    # What reads a free slot, behind a mask, takes none either.
    assert not cache.values[0][2:12].any()
    assert cache.keys[0][1, :, :200].all()
    assert process.memory_info().rss - before < 64 * mib
