"""What several commands need: the names of metrics, JSON on stdout, and texts for a terminal."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Annotated, Any

from pydantic import AfterValidator

from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.utils.config import CommaList

__all__ = ["MetricNames", "check_metrics", "print_event", "print_json", "safe_text"]


def _check_named(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("names no metric")
    return names


MetricNames = Annotated[CommaList[str], AfterValidator(_check_named)]
"""The names of `--metrics`; whether there are such metrics depends on the task."""


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
    """One JSON value on a line of stdout, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_event(event: dict[str, Any]) -> None:
    """One event of a training as a line of JSON; the training goes on if a reader such as `head` closes the pipe."""
    with suppress(BrokenPipeError):
        print_json(event)


def safe_text(text: str) -> str:
    r"""A text from elsewhere for a terminal: characters that would steer it are replaced.

    >>> safe_text("a\x1b[2Jb\n")
    'a\ufffd[2Jb\n'
    """
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)
