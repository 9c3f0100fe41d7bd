"""The pool of keys and values: pages, and what they take of memory."""

from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.kv_cache import PAGE, KVCache
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import ConfigError, ContextLengthError, RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import complete
from prefixtune.inference.prompts import Prompt
from prefixtune.prefix.geometry import LayerShape
from prefixtune.utils.machine import free_memory

SHAPES = (LayerShape(2, 4, 3), LayerShape(1, 8, 8))
CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=40),
    st.sampled_from([1, 4]),
)
def test_pages_are_one_texts_or_shared_and_all_room_comes_back(asked, page):
    cache = KVCache(SHAPES, 100, torch.float32, CPU, page=page)
    held = []
    for length, leaving, number in asked:
        other, common = held[number % len(held)] if held and number > 5 else (None, 0)
        shared = other.numbers[: min(length - 1, common) // page] if other else ()
        pages = cache.take(length, shared)
        free = 100 // page - len(cache.used)
        if pages is None:
            assert -(-length // page) - len(shared) > free
        else:
            places = [place for part in pages.places(0, length) for place in part]
            assert len(set(places)) == length
            assert places == [pages.numbers[at // page] * page + at % page for at in range(length)]
            cut = [place for part in pages.places(length // 3, length // 2) for place in part]
            assert cut == places[length // 3 : length // 2]
            assert list(pages.numbers[: len(shared)]) == list(shared)
            others = {n for other, _ in held for n in other.numbers}
            assert others & set(pages.numbers) == set(shared)
            held.append((pages, length))
            cache.keys[0][places] = cache.values[1][places] = 1
        if leaving < len(held):
            cache.give_back(*held.pop(leaving))
        assert cache.used == Counter(n for pages, _ in held for n in pages.numbers)
        for pages, length in held:
            # What is shared is wiped with its last text alone.
            assert all(cache.keys[0][part.start : part.stop].all() for part in pages.places(0, length))
    for pages, length in held:
        cache.give_back(pages, length)
    assert not cache.used
    assert not any(buffer.any() for buffer in (*cache.keys, *cache.values))
    assert cache.take(100).places(0, 100) == [range(100)]


def test_more_than_memory_has_room_for_is_refused():
    with pytest.raises(ConfigError) as error:
        KVCache((LayerShape(4, 64, 64),), 10**15, torch.float32, CPU)
    assert error.value.hint
    with pytest.raises(ConfigError):
        KVCache(SHAPES, 0, torch.float32, CPU)
    with pytest.raises(ConfigError, match="num_slots"):
        EngineConfig(num_slots=65_537)


def test_a_long_text_takes_memory_for_itself_alone():
    """A text of 8,192 positions beside 31 short ones: what is there, in the pool's books and in the process."""
    shape = LayerShape(4, 64, 64)
    cache = KVCache((shape,), 32 * 8192, torch.float32, CPU)
    process = psutil.Process()
    lengths = [100] * 20 + [8192] + [200] * 11
    needed = sum(lengths) * shape.size * 4
    before = process.memory_info().rss
    for length in lengths:
        (places,) = cache.take(length).places(0, length)
        cache.keys[0][places.start : places.stop] = 1.0
        cache.values[0][places.start : places.stop] = 1.0
    assert process.memory_info().rss - before <= 1.3 * needed + 2**22
    assert cache.num_positions > 20 * sum(lengths)


def scarce(backbone, positions, monkeypatch, **options):
    """An engine with room for so many positions."""
    each = sum(shape.size for site in ("decoder", "cross") for shape in backbone.geometry.get(site, ()))
    monkeypatch.setattr("prefixtune.engine.model_runner.free_memory", lambda _: 2 * positions * each * 4)
    return TorchEngine(backbone, **options)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_text_waits_for_room_and_what_never_fits_is_refused(name, tiny_backbone, random_prefix, monkeypatch):
    backbone = tiny_backbone(name)
    engine = scarce(backbone, 64, monkeypatch, num_slots=8)
    assert [cache.num_positions for cache in engine.runner.caches] == [64] * len(engine.runner.caches)
    few = SamplingParams(max_new_tokens=11, min_new_tokens=11)
    asked = [Request((1, 2, 3) * 5, None, few) for _ in range(7)]
    expected = TorchEngine(backbone).run([asked[0]])[0][0].tokens
    for request in asked:
        engine.add(request)
    most, found = 0, []
    while engine.busy:
        found += [token for output in engine.step() for token in output.tokens]
        most = max(most, len(engine.snapshot().running))
        assert all(len(cache.used) <= 4 for cache in engine.runner.caches)
    # 25 positions each of an encoder-less model, two pages; 15 and 11 of the other, a page each.
    assert most == (2 if name == "llama" else 4)
    assert len(found) == 7 * 11
    assert sorted(token.id for token in found) == sorted(token.id for token in expected * 7)
    assert not any(cache.used for cache in engine.runner.caches)
    with pytest.raises(ContextLengthError) as error:
        engine.add(Request((1,) * 65, None, few))
    assert "kv_cache_mib" in error.value.hint
    with pytest.raises(ContextLengthError):
        engine.add(Request((1,), random_prefix(backbone, 65), few))
    assert not engine.busy


def test_a_lack_of_memory_is_told_before_any_text_is_computed(tiny_backbone, monkeypatch):
    backbone, done = tiny_backbone("llama"), []
    scarce(backbone, 40, monkeypatch)
    config = GenerateConfig(max_new_tokens=10, batch_size=1)
    with pytest.raises(RequestError):
        done.extend(complete(backbone, [Prompt([1], None, 10), Prompt([1] * 35, None, 10)], config))
    assert done == []


def test_the_pool_has_the_size_that_is_said(tiny_backbone):
    engine = TorchEngine(tiny_backbone("llama"), kv_cache_mib=1)
    (cache,) = engine.runner.caches
    each = sum(shape.size for shape in engine.backbone.geometry["decoder"]) * 4
    assert 2**20 - PAGE * each < cache.num_positions * each <= 2**20
    # No more than all texts can ever need.
    few = TorchEngine(tiny_backbone("llama"), num_slots=2, max_length=50)
    assert few.runner.caches[0].num_positions <= 2 * (50 + PAGE)
    assert few.max_length == 50


def test_a_containers_own_limit_counts(monkeypatch):
    texts = {"memory.max": "3000000", "memory.current": "1000000", "memory.stat": "file 600000\ninactive_file 500000\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: texts[self.name])
    assert free_memory(CPU) == 2_500_000
    texts["memory.max"] = "max"
    assert free_memory(CPU) > 2_500_000
