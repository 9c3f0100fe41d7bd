"""The loaded prefixes: a cache that is bounded in bytes and drops the least recently used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from prefixtune.prefix.folder import Signature
from prefixtune.prefix.prefix import Prefix

__all__ = ["CacheKey", "CacheStats", "PrefixCache"]


@dataclass(frozen=True)
class CacheStats:
    """What the cache did so far, and what is in it.

    Attributes:
        hits: Requested prefixes that were in memory.
        misses: Those that had to be read, or joined.
        evictions: Prefixes dropped to make room.
        bytes: Memory of the prefixes.
        loaded: How many there are.
    """

    hits: int
    misses: int
    evictions: int
    bytes: int
    loaded: int


CacheKey = str | tuple[str, ...]
"""The name of a prefix; or of joined ones the hashes of the parts, in their order."""


class PrefixCache:
    """Loaded prefixes by name, each with the version of its file, and joined ones. May be used from any thread.

    Args:
        max_bytes: Most that all prefixes together may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[CacheKey, tuple[Signature | None, Prefix]] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    def get(self, key: CacheKey, signature: Signature | None) -> Prefix | None:
        """The prefix of this very version of the file; None: it is not in memory."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] != signature:
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry[1]

    def put(self, key: CacheKey, signature: Signature | None, prefix: Prefix) -> None:
        """Keep a prefix; the least recently used ones make room."""
        with self._lock:
            self._drop(key)
            self._entries[key] = (signature, prefix)
            self._bytes += prefix.num_bytes
            while self._bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
                self._evictions += 1

    def drop(self, key: CacheKey) -> None:
        """Forget a prefix."""
        with self._lock:
            self._drop(key)

    def count_miss(self) -> None:
        """Count a prefix that has to be read, or joined."""
        with self._lock:
            self._misses += 1

    @property
    def stats(self) -> CacheStats:
        """What the cache did so far, and what is in it."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, self._bytes, len(self._entries))

    def _drop(self, key: CacheKey) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry[1].num_bytes
