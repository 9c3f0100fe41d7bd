"""Who may use, see and delete which name: what a job made is its owner's, all else goes by the patterns of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.server.auth import Caller
from prefixtune.server.models.store import PrefixStore

__all__ = ["ModelAccess"]


class ModelAccess:
    """The rules, for single names.

    Args:
        store: The prefixes.
        backbone_id: The bare backbone's name, which hides a prefix of that name.
        is_open: Whether no key is configured: what jobs made is then everybody's.
    """

    def __init__(self, store: PrefixStore, backbone_id: str, *, is_open: bool) -> None:
        self._store, self._backbone_id, self._is_open = store, backbone_id, is_open

    def is_known(self, name: str) -> bool:
        """Whether there is such a model, served or refused."""
        return name == self._backbone_id or name in self._store or name in self._store.refused

    def is_checkpoint(self, name: str) -> bool:
        """Whether a prefix is a checkpoint of a job, and not its result."""
        origin = self._origin(name)
        return origin is not None and origin.step is not None

    def owns(self, name: str, caller: Caller) -> bool:
        """Whether a job of the caller made a prefix; for admins, and where there are no keys, a job of anybody."""
        origin = self._origin(name)
        return origin is not None and self._is_theirs(origin, caller)

    def may_copy(self, header: Mapping[str, Any], caller: Caller) -> bool:
        """Whether the caller may have a prefix, or what is trained from it, by the header of its file.

        Owners and admins may; where there are no keys, everybody.
        """
        origin = job_origin(header)
        return self._is_open or caller.rules.admin or (origin is not None and origin.owner == caller.name)

    def may_use(self, name: str, caller: Caller) -> bool:
        """Whether the caller may use a name; there need not be such a model."""
        return self._allows(name, self._origin(name), caller)

    def may_use_header(self, name: str, header: Mapping[str, Any], caller: Caller) -> bool:
        """The same of a file whose header was read; it may have replaced the one that is known."""
        return self._allows(name, job_origin(header), caller)

    def _origin(self, name: str) -> JobOrigin | None:
        return None if name == self._backbone_id else self._store.origin(name)

    def _allows(self, name: str, origin: JobOrigin | None, caller: Caller) -> bool:
        return caller.may_use(name) if origin is None else self._is_theirs(origin, caller)

    def _is_theirs(self, origin: JobOrigin, caller: Caller) -> bool:
        return self._is_open or caller.rules.admin or origin.owner == caller.name
