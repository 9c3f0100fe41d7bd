"""Loaded prefixes: bounds, and many threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from prefixtune.server.prefixes import PrefixFolder


def test_the_cache_is_bounded_and_drops_the_least_recently_used(tmp_path: Path, save: Any, llama: Any):
    for name in "abcd":
        save(name)
    one = PrefixFolder(tmp_path, llama).get("a").num_bytes
    store = PrefixFolder(tmp_path, llama, max_bytes=2 * one + one // 2)
    first = store.get("a")
    store.get("b")
    assert store.get("a") is first
    store.get("c")
    assert (store.evictions, store.num_loaded, store.num_bytes) == (1, 2, 2 * one)
    assert store.get("a") is first, "b had been unused for longer"
    misses = store.misses
    store.get("b")
    assert store.misses == misses + 1


def test_a_prefix_larger_than_the_cache_is_refused(tmp_path: Path, save: Any, llama: Any):
    save("small", length=1)
    save("large", length=50)
    store = PrefixFolder(tmp_path, llama, max_bytes=2000)
    assert store.names() == ["small"]
    assert "bytes" in store.refused["large"]


def test_many_threads_at_once(tmp_path: Path, save: Any, llama: Any):
    for index in range(8):
        save(f"p{index}", index)
    spare = save("spare", 9, folder=tmp_path / "elsewhere")
    one = PrefixFolder(tmp_path, llama).get("p0").num_bytes
    store = PrefixFolder(tmp_path, llama, max_bytes=3 * one)
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
                assert store.num_bytes <= 3 * one
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=request_prefixes, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store.names()) == 8
