"""What a view of a prefix found: numbers, and one sentence on what they can and cannot show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OUT_OF_TIME", "SHOWS", "TITLES", "View"]


TITLES = {
    "attention": "Attention to the prefix",
    "loss": "Loss with parts left out",
    "nearest": "Nearest real text",
    "description": "The model's own description",
}
"""The views, in the order in which they are made."""

SHOWS = {
    "attention": "It shows where attention goes while the targets are predicted, not what comes from there: a position "
    "with much attention may give next to nothing, as attention sinks do.",
    "loss": "It shows what the rest cannot make up for on these rows, each part alone: parts that do the same work "
    "each look as if they did none, and intervals are not corrected for the number of parts.",
    "nearest": "It shows which tokens' values point in a similar direction, and misleads about meaning: what "
    "is nearest need not be near, and need not say what the prefix does.",
    "description": "It shows what the model says of its prefix, and how much of the prefix's gain the words bring when "
    "they stand in its place; a small model's words may be wrong, or right by the examples in the question.",
}
"""What each view can and cannot show."""

OUT_OF_TIME = "the time was over before it began (--minutes)."


@dataclass(frozen=True)
class View:
    """One look at a prefix.

    Attributes:
        name: Of `TITLES`.
        numbers: What was found, as JSON; see docs/memories.md.
        notes: What a reader should know of this run of it, such as parts that were left out for time.
        left_out: Why there is nothing; empty: there is.
    """

    name: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: str = ""

    @property
    def title(self) -> str:
        """Its heading."""
        return TITLES[self.name]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: its numbers, or why there are none."""
        if self.left_out:
            return {"left_out": self.left_out}
        return {**self.numbers, "shows": SHOWS[self.name], "notes": list(self.notes)}
