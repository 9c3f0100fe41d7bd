"""Print a command's result on stdout: one JSON value a line for programs, or lines and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixtune.utils.console import Figure, safe_text

if TYPE_CHECKING:
    from prefixtune.results import Evaluation, Score

_LONGEST = 200
"""Characters of a value in an outline."""


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


class Table(NamedTuple):
    """A table of a result; None is an empty cell."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Figure | None]]


def outline(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Nested facts as lines, for people; long values are cut, and none can steer a terminal."""
    for name, value in facts.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(number): one for number, one in enumerate(value, start=1)}
        if isinstance(value, Mapping) and value:
            yield safe_text(f"{indent}{name}")
            yield from outline(value, f"{indent}  ")
        else:
            text = (
                ", ".join(map(str, value)) if isinstance(value, list | Mapping) else str("" if value is None else value)
            )
            shown = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
            yield safe_text(f"{indent}{name}: {shown or 'none'}".replace("\n", "\\n"))


def score_tables(title: str, outcome: Evaluation) -> Iterator[Table]:
    """The scores of an evaluation, and those of its groups."""
    rows = [[name, format_score(score), score.implementation] for name, score in outcome.scores.items()]
    yield Table(title, ["metric", "score", "implementation"], rows)
    for grouping, groups in outcome.groups.items():
        names = list(dict.fromkeys(name for part in groups.values() for name in part.scores))
        rows = [
            [
                group,
                f"{part.num_examples:,}",
                *(format_score(s) if (s := part.scores.get(name)) else "" for name in names),
            ]
            for group, part in groups.items()
        ]
        yield Table(f"by {grouping}", ["", "examples", *names], rows)


def format_score(score: Score) -> str:
    """A score with two digits after the point on a scale of 100, otherwise four; and its interval."""
    text = f"{score.score:.{2 if abs(score.score) >= 10 else 4}f}"
    return f"{text} [{score.interval[0]:.4g}, {score.interval[1]:.4g}]" if score.interval else text


def for_stdout(text: str) -> str:
    """A model's text, without what would steer a terminal that shows it."""
    return safe_text(text.replace("\r", "")) if sys.stdout.isatty() else text
