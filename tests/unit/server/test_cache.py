"""Loaded prefixes: bounds, and many threads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from prefixtune.prefix.prefix import Prefix
from prefixtune.server.models.store import PrefixStore


def test_the_cache_is_bounded_and_drops_the_least_recently_used(tmp_path: Path, save: Any, llama: Any):
    for name in "abcd":
        save(name)
    one = PrefixStore(tmp_path, llama).get("a").num_bytes
    store = PrefixStore(tmp_path, llama, max_bytes=2 * one + one // 2)
    first = store.get("a")
    store.get("b")
    assert store.get("a") is first
    store.get("c")
    assert (store.stats.evictions, store.stats.loaded, store.stats.bytes) == (1, 2, 2 * one)
    assert store.get("a") is first, "b had been unused for longer"
    misses = store.stats.misses
    store.get("b")
    assert store.stats.misses == misses + 1


def test_a_prefix_larger_than_the_cache_is_refused(tmp_path: Path, save: Any, llama: Any):
    save("small", length=1)
    save("large", length=50)
    store = PrefixStore(tmp_path, llama, max_bytes=2000)
    assert store.names() == ["small"]
    assert "bytes" in store.refused["large"]


def test_thousands_of_files_and_a_small_cache(tmp_path: Path, save: Any, llama: Any):
    original = save("n0000", length=1)
    for index in range(1, 2000):
        os.link(original, tmp_path / f"n{index:04}.safetensors")
    began = time.monotonic()
    one = PrefixStore(tmp_path, llama, max_bytes=2**20)
    seconds = time.monotonic() - began
    # 0.4 s were measured with one thread.
    assert seconds < 8
    assert len(one.names()) == 2000
    size = one.get("n0000").num_bytes
    store = PrefixStore(tmp_path, llama, max_bytes=20 * size)
    for index in range(0, 2000, 10):
        store.get(f"n{index:04}")
        assert store.stats.bytes <= 20 * size
    assert (store.stats.evictions, store.stats.loaded, store.stats.known) == (180, 20, 2000)
    began = time.monotonic()
    store.names()
    # Nothing changed: no file is read.
    assert time.monotonic() - began < 4


def test_many_threads_at_once(tmp_path: Path, save: Any, llama: Any):
    for index in range(8):
        save(f"p{index}", index)
    spare = save("spare", 9, folder=tmp_path / "elsewhere")
    one = PrefixStore(tmp_path, llama).get("p0").num_bytes
    store = PrefixStore(tmp_path, llama, max_bytes=3 * one)
    errors: list[BaseException] = []

    def request_prefixes(thread: int) -> None:
        try:
            for turn in range(25):
                name = f"p{(thread * 7 + turn) % 8}"
                if thread == 0 and turn % 5 == 0:
                    store.put("p0", spare)
                if thread == 1 and turn % 5 == 0:
                    store.names()
                assert store.get(name).prefix_length == 3
                assert store.stats.bytes <= 3 * one
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=request_prefixes, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store.names()) == 8


def test_many_threads_that_request_one_prefix_read_it_once(tmp_path: Path, save: Any, llama: Any):
    save("p")
    store = PrefixStore(tmp_path, llama)
    prefixes: list[Prefix] = []
    threads = [threading.Thread(target=lambda: prefixes.append(store.get("p"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(prefix) for prefix in prefixes}) == 1
    assert (store.stats.misses, store.stats.hits) == (1, 7)
