"""What several commands need: the names of metrics, paths, and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Annotated, Any

from pydantic import AfterValidator

from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.utils.config import CommaList

__all__ = ["MetricNames", "PathText", "check_metrics", "print_event", "print_json"]


def _check_named(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("names no metric")
    return names


MetricNames = Annotated[CommaList[str], AfterValidator(_check_named)]
"""The names of `--metrics`; whether there are such metrics depends on the task."""


def _check_path(text: str) -> str:
    if not text:
        raise ValueError("is empty, but must name a file or a folder")
    return text


PathText = Annotated[str, AfterValidator(_check_path)]
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
