"""Who gets a free slot: the tenant with the fewest slots, so that no tenant starves another."""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, Protocol, TypeVar

from prefixtune.engine.request import Request

__all__ = ["FairQueue"]


class _Text(Protocol):
    """A text of a request."""

    request: Request


T = TypeVar("T", bound=_Text)


class FairQueue(Generic[T]):
    """Texts that wait for a slot; within a tenant, first come, first served."""

    def __init__(self) -> None:
        # The tenant who has waited longest for a turn comes first.
        self._waiting: dict[str, deque[T]] = {}
        self._slots_held: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, text: T) -> None:
        """Let a text wait."""
        self._waiting.setdefault(text.request.tenant, deque()).append(text)

    def first(self) -> T:
        """The text whose turn it is; there must be one."""
        # The first of those with the fewest slots.
        return self._waiting[min(self._waiting, key=self._slots_held.__getitem__)][0]

    def take(self, text: T) -> None:
        """Give a slot to the first text."""
        tenant = text.request.tenant
        queue = self._waiting.pop(tenant)
        queue.popleft()
        if queue:
            self._waiting[tenant] = queue
        self._slots_held[tenant] += 1

    def release(self, text: T, *, has_slot: bool) -> None:
        """A text has ended, with a slot or before it had one."""
        tenant = text.request.tenant
        if has_slot:
            self._slots_held[tenant] -= 1
            if not self._slots_held[tenant]:
                del self._slots_held[tenant]
        elif text in self._waiting.get(tenant, ()):
            self._waiting[tenant].remove(text)
            if not self._waiting[tenant]:
                del self._waiting[tenant]
