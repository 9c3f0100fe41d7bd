"""One measured figure, with its goal where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefixtune.utils.console import format_figure


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        part: The part that measured it.
        what: The figure's name.
        value: The figure; None: it was not measured.
        unit: Its unit; empty for none.
        at_least: The goal: no less than this.
        at_most: The goal: no more than this.
        reason: Why it was not measured.
    """

    part: str
    what: str
    value: float | None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    reason: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where there is none, or no figure."""
        if self.value is None:
            return None
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    def cells(self) -> list[str | None]:
        """For the table."""
        if self.value is None:
            return [self.part, self.what, f"not measured: {self.reason}", None, None]
        goal = None
        if self.at_least is not None:
            goal = f">= {self.at_least:g}"
        elif self.at_most is not None:
            goal = f"<= {self.at_most:g}"
        value = f"{format_figure(self.value)} {self.unit}".rstrip()
        return [self.part, self.what, value, goal, {True: "reached", False: "missed", None: None}[self.reached]]

    def to_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "part": self.part,
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "goal": {"at_least": self.at_least, "at_most": self.at_most} if self.reached is not None else None,
            "reached": self.reached,
            **({"not_measured": self.reason} if self.value is None else {}),
        }
