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

    Joined ones take at most half of it and make room first: no list of names, however long, drops single prefixes.

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
        """Keep a prefix; the least recently used ones make room, joined ones before single ones."""
        with self._lock:
            self._drop(key)
            self._entries[key] = (signature, prefix)
            self._bytes += prefix.num_bytes
            while self._joined_bytes > self.max_joined_bytes:
                self._evict(next(filter(_is_joined, self._entries)))
            while self._bytes > self.max_bytes:
                self._evict(next((one for one in self._entries if _is_joined(one) and one != key), self._oldest()))

    def drop(self, key: CacheKey) -> None:
        """Forget a prefix."""
        with self._lock:
            self._drop(key)

    def drop_joined(self) -> bool:
        """Forget the least recently used joined prefix; false: there is none."""
        with self._lock:
            oldest = next(filter(_is_joined, self._entries), None)
            if oldest is not None:
                self._evict(oldest)
            return oldest is not None

    def count_miss(self) -> None:
        """Count a prefix that has to be read, or joined."""
        with self._lock:
            self._misses += 1

    @property
    def max_joined_bytes(self) -> int:
        """Most that joined prefixes together may take."""
        return self.max_bytes // 2

    @property
    def stats(self) -> CacheStats:
        """What the cache did so far, and what is in it."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, self._bytes, len(self._entries))

    @property
    def _joined_bytes(self) -> int:
        return sum(prefix.num_bytes for key, (_, prefix) in self._entries.items() if _is_joined(key))

    def _oldest(self) -> CacheKey:
        return next(iter(self._entries))

    def _evict(self, key: CacheKey) -> None:
        self._drop(key)
        self._evictions += 1

    def _drop(self, key: CacheKey) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry[1].num_bytes


def _is_joined(key: CacheKey) -> bool:
    return isinstance(key, tuple)
