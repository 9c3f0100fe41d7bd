"""What every tracker does, which there are, and whether they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from prefixtune.errors import ConfigError

__all__ = ["KINDS", "Outcome", "TrackedRun", "Tracker", "check_installed"]

KINDS = ("step", "evaluation", "examples")
"""Kinds of events that trackers are told of."""

Outcome = Literal["finished", "stopped", "failed"]
"""How a run ends; one that is stopped may be resumed."""


@dataclass(frozen=True)
class TrackedRun:
    """A run, as a tracker is to know it.

    Attributes:
        folder: That of the run; the tracker's files go into it.
        project: What the user calls a group of runs; empty: the tracker's own variable, or `prefixtune`.
        name: Of the run.
        hyperparameters: Its configuration.
        identity: What the tracker stored of the run that is resumed; empty: a new tracked run starts.
        step: The step that is resumed after; 0 for a new run.
        logged: The last step of each kind of event (`KINDS`) that the run's log had before it was resumed.
    """

    folder: Path
    project: str
    name: str
    hyperparameters: Mapping[str, str | int | float]
    identity: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    logged: Mapping[str, int] = field(default_factory=dict)


class Tracker(Protocol):
    """A run in a tracker, from its start on. Any method may raise any error.

    Attributes:
        identity: What continues this tracked run later.
        logged: The last step of each kind of event (`KINDS`) that it held when it was started. A resumed run computes
            some of these steps again, with the same figures, and they are not logged twice; what is missing before
            them comes from the run's log.
        how_to_see: A command that shows the run.
    """

    identity: dict[str, str]
    logged: Mapping[str, int]
    how_to_see: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step."""

    def log_text(self, title: str, text: str, step: int) -> None:
        """A text in Markdown."""

    def finish(self, outcome: Outcome) -> None:
        """The run is over for now; everything that was logged is written."""


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed; all at once.

    Raises:
        ConfigError: One or more are missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"report_to names {' and '.join(missing)}, which {verb} not installed.",
            hint=f"pip install {' '.join(missing)}, or leave {'it' if len(missing) == 1 else 'them'} out of report_to.",
        )
