"""What several commands need: the names of metrics, paths, scores as tables, and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.utils.console import Console, Figure

__all__ = [
    "PathText",
    "Table",
    "check_metrics",
    "format_score",
    "print_event",
    "print_json",
    "show",
    "show_scores",
]


PathText = Annotated[str, Field(min_length=1)]
"""A path that, left out, means something else: an empty one, as of a shell's variable that is not set, is refused."""


def check_metrics(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse unknown metrics, all at once.

    Raises:
        ConfigError: One is unknown.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        hints = [did_you_mean(name, known) for name in unknown]
        raise ConfigError(f"there is no metric {listed} for this task.", hint=" ".join(dict.fromkeys(hints)))


def print_json(value: object) -> None:
    """One JSON value on a line of stdout, at once; with escapes if stdout's encoding lacks a character."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    print(line, flush=True)


def print_event(event: dict[str, Any]) -> None:
    """One event of a training as a line of JSON; the training goes on if a reader such as `head` closes the pipe."""
    with suppress(BrokenPipeError):
        print_json(event)


def show_scores(console: Console, title: str, result: Mapping[str, Any], counted: str) -> None:
    """Print the scores of an evaluation, and those of its groups.

    Args:
        console: Where.
        title: Of the table of all scores.
        result: As `evaluation.records.summarize` makes it.
        counted: What the groups have so many of.
    """
    rows = [[name, format_score(score), score["implementation"]] for name, score in result["scores"].items()]
    console.table(title, ["metric", "score", "implementation"], rows, result=True)
    for grouping, groups in result.get("groups", {}).items():
        rows = [
            [group, f"{part['num_examples']:,}", *map(format_score, part["scores"].values())]
            for group, part in groups.items()
        ]
        names = list(next(iter(groups.values()))["scores"])
        console.table(f"by {grouping}", ["", counted, *names], rows, result=True)


class Table(NamedTuple):
    """A table of a result; None is an empty cell."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Figure | None]]


def show(facts: Mapping[str, Any], *parts: str | Table, as_json: bool) -> None:
    """Print a command's result on stdout.

    Args:
        facts: For programs, as one JSON value.
        parts: The same for people: lines and tables, in order.
        as_json: Print `facts`, not `parts`.
    """
    if as_json:
        print_json(facts)
        return
    console = Console()
    for part in parts:
        if isinstance(part, Table):
            console.table(*part, result=True)
        else:
            print(part)


def format_score(score: Mapping[str, Any]) -> str:
    """A score with two digits after the point on a scale of 100, otherwise four; and its interval."""
    value, interval = score["score"], score.get("interval")
    text = f"{value:.{2 if abs(value) >= 10 else 4}f}"
    return f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else text
