"""Prefixes that a request joins: one after the other, as `prefixtune compose` joins files.

The result is kept by the content of its parts, in their order, in the same memory as single prefixes. A part that is
replaced has another content, so that no old result is used for it. Results that requests hold are counted, kept or not,
so that waiting requests with ever new joins do not fill the memory.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary, WeakValueDictionary

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import PrefixError, RequestError
from prefixtune.prefix.compose import check_join, concatenate
from prefixtune.prefix.composition import content_hash
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.rotation import Rotation
from prefixtune.server.models.store import PrefixStore

__all__ = ["SEPARATOR", "JoinsInUseError", "PrefixJoiner"]


SEPARATOR = "+"
"""Between the names of joined prefixes; no file's name may have it."""


def _version_of(prefix: Prefix) -> str:
    """A hash of a prefix's tensors and of its header, whose text format the joined prefix may take over."""
    header = json.dumps(dict(prefix.header), sort_keys=True, default=str).encode("utf-8", "replace")
    return f"{content_hash(prefix)} {hashlib.sha256(header).hexdigest()}"


class JoinsInUseError(PrefixError):
    """The joined prefixes that requests hold leave no room for another."""


class PrefixJoiner:
    """Joins prefixes of a store. May be used from any thread; not for the event loop.

    Args:
        store: The prefixes; its memory also keeps what was joined.
        backbone: The model, which says how keys turn with their position.
        max_length: Most positions of a text, prefix included.
    """

    def __init__(self, store: PrefixStore, backbone: Backbone, max_length: int) -> None:
        self.store, self.backbone, self.max_length = store, backbone, max_length
        self._hashes: WeakKeyDictionary[Prefix, str] = WeakKeyDictionary()
        self._alive: WeakValueDictionary[tuple[str, ...], Prefix] = WeakValueDictionary()
        self._rotation: Rotation | PrefixError | None = None
        self._hash_lock = threading.Lock()
        # One thread joins at a time: requests for the same prefixes at once wait for one result.
        self._lock = threading.Lock()

    def joined(self, parts: Sequence[Prefix]) -> Prefix | None:
        """What is in memory of these prefixes, joined in their order; None: nothing. Waits for no other join."""
        return self.store.cache.get(tuple(map(self._hash, parts)), None)

    def join(self, names: Sequence[str], parts: Sequence[Prefix]) -> Prefix:
        """Prefixes joined in their order.

        Args:
            names: Of the parts, for messages.
            parts: The prefixes, loaded.

        Raises:
            RequestError: Together they are too long or too large.
            JoinsInUseError: There is no room for them now.
            PrefixError: They cannot be joined.
        """
        self._check_size(names, parts)
        cache, key = self.store.cache, tuple(map(self._hash, parts))
        joined = cache.get(key, None)
        if joined is not None:
            return joined
        with self._lock:
            # Another thread may have joined them meanwhile, or a request has them still.
            joined = cache.get(key, None) or self._alive.get(key)
            if joined is None:
                cache.count_miss()
                check_join(parts, self.rotation(), names=names)
                self._make_room(sum(part.num_bytes for part in parts))
                # The names are the first caller's, and the result is for all: its header numbers the parts.
                joined = self._alive[key] = concatenate(parts, self.rotation())
            cache.put(key, None, joined)
            return joined

    def _make_room(self, num_bytes: int) -> None:
        """Refuse a join for which those that are held, or kept, leave no room.

        Raises:
            JoinsInUseError: Requests hold too many bytes.
        """
        most = self.store.cache.max_bytes
        while self._alive_bytes() + num_bytes > most and self.store.cache.drop_joined():
            pass
        if self._alive_bytes() + num_bytes > most:
            raise JoinsInUseError(
                f"the joined prefixes of the requests under way take {self._alive_bytes():,} bytes, and {num_bytes:,} "
                f"more would be over {most:,}.",
                hint="try again later.",
            )

    def _alive_bytes(self) -> int:
        return sum(prefix.num_bytes for prefix in list(self._alive.values()))

    def rotation(self) -> Rotation:
        """How keys turn with their position; found once, by trying it on the model.

        Raises:
            BackboneError: It cannot be found: no prefixes are joined for this model.
        """
        if self._rotation is None:
            try:
                self._rotation = self.backbone.rotation
            except PrefixError as error:
                self._rotation = error
        if isinstance(self._rotation, PrefixError):
            raise self._rotation
        return self._rotation

    def _hash(self, prefix: Prefix) -> str:
        with self._hash_lock:
            if prefix not in self._hashes:
                self._hashes[prefix] = _version_of(prefix)
            return self._hashes[prefix]

    def _check_size(self, names: Sequence[str], parts: Sequence[Prefix]) -> None:
        lengths = [part.length() for part in parts]
        # A decoder's text follows its prefix; those of an encoder-decoder take none of its positions.
        if self.backbone.kind != "encoder-decoder" and sum(lengths) >= self.max_length:
            listed = " + ".join(f"{length} ({name})" for name, length in zip(names, lengths, strict=True))
            raise RequestError(
                f"the joined prefixes take {listed} = {sum(lengths)} positions, but the limit is {self.max_length}, "
                "text included.",
                hint="join fewer of them.",
            )
        num_bytes, most = sum(part.num_bytes for part in parts), self.store.cache.max_joined_bytes
        if num_bytes > most:
            raise RequestError(
                f"the joined prefixes take {num_bytes:,} bytes, but {most:,} are the most.", hint="join fewer of them."
            )
