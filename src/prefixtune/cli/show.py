"""Print the result of a command on stdout: one JSON value a line for programs, or lines and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from prefixtune.utils.console import Console, Figure

__all__ = ["Table", "print_event", "print_json", "show"]


class Table(NamedTuple):
    """A table of a result; None is an empty cell."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Figure | None]]


def show(facts: Mapping[str, Any], *parts: str | Table, as_json: bool) -> None:
    """Print a command's result.

    Args:
        facts: For programs.
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
