"""What a step's row consists of."""

from __future__ import annotations

from dataclasses import dataclass

from prefixtune.engine.shared_prefix import SharedPrefix

__all__ = ["QuerySpan"]


@dataclass(frozen=True)
class QuerySpan:
    """Tokens of one sequence that a step computes.

    Attributes:
        slot: The sequence's slot.
        start: Position of the first of them; the prefix starts at 0.
        count: How many tokens.
        prefix_length: Length of the sequence's prefix.
        shared: The prefix, if it stands outside the slot; None: the slot begins with it, or there is none.
    """

    slot: int
    start: int
    count: int
    prefix_length: int
    shared: SharedPrefix | None = None

    @property
    def stop(self) -> int:
        """The position after the last of them."""
        return self.start + self.count

    @property
    def columns(self) -> slice:
        """Where the slot has them."""
        first = self.start if self.shared is None else self.start - self.shared.length
        return slice(first, first + self.count)
