"""The tasks by name: how each is read, and how its outputs are decoded unless told otherwise.

Knows nothing of how a model decodes; the settings are handed on by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.tasks.e2e import read_e2e
from prefixtune.tasks.examples import Example
from prefixtune.tasks.records import read_records
from prefixtune.tasks.toy import make_toy

__all__ = ["TASKS", "Task", "read_task"]

_TOY_PARTS = ("train", "held_out")


@dataclass(frozen=True)
class Task:
    """One kind of data.

    Attributes:
        name: As written in a configuration.
        description: One line for people.
        read: (path, source template, target template) -> examples.
        decoding: Decoding settings, by name; copy it before changing it.
    """

    name: str
    description: str
    read: Callable[[Path, str | None, str | None], list[Example]]
    decoding: dict[str, Any]


def read_task(task: str, path: Path | str, *, source: str | None = None, target: str | None = None) -> list[Example]:
    """Read the examples of a task.

    >>> len(read_task("toy", "train")), len(read_task("toy", "held_out"))
    (320, 40)

    Args:
        task: A name of `TASKS`.
        path: The file; for `toy`, `train` or `held_out`.
        source: Template of the source; for `records` only, and needed there.
        target: Template of the target; for `records` only.

    Raises:
        ConfigError: The task is unknown, or a template is missing, malformed or given to a task that takes none.
        DataError: The file or one of its rows is wrong.
    """
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}.", hint=did_you_mean(task, TASKS))
    return TASKS[task].read(Path(path), source, target)


def _no_templates(task: str, source: str | None, target: str | None) -> None:
    for name, value in (("source", source), ("target", target)):
        if value is not None:
            raise ConfigError(
                f"task {task!r} has its own format and takes no {name} template; got {value!r}.",
                hint=f"leave {name} out, or use the task 'records'.",
            )


def _read_e2e(path: Path, source: str | None, target: str | None) -> list[Example]:
    _no_templates("e2e", source, target)
    return read_e2e(path)


def _read_records(path: Path, source: str | None, target: str | None) -> list[Example]:
    if source is None:
        raise ConfigError(
            "task 'records' needs a source template; got none.",
            hint="give a column's name, or text with {column} in it.",
        )
    return read_records(path, source, target)


def _read_toy(path: Path, source: str | None, target: str | None) -> list[Example]:
    _no_templates("toy", source, target)
    part = str(path)
    if part not in _TOY_PARTS:
        raise ConfigError(
            f"task 'toy' is made, not read: its path is one of {', '.join(_TOY_PARTS)}; got {part!r}.",
            hint=did_you_mean(part, _TOY_PARTS),
        )
    return make_toy()[_TOY_PARTS.index(part)]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "e2e",
            "E2E NLG: restaurant descriptions; the release's CSV, or JSON lines",
            _read_e2e,
            # Li & Liang 2021: beam 5, 5 to 100 new tokens, no line breaks.
            {"num_beams": 5, "min_new_tokens": 5, "max_new_tokens": 100, "ban_newlines": True, "length_penalty": 1.0},
        ),
        Task(
            "records",
            "your own records: JSON lines, JSON, CSV or TSV, with templates",
            _read_records,
            {"num_beams": 1, "max_new_tokens": 100},
        ),
        Task(
            "toy",
            "a small night-train board made here, to try things on",
            _read_toy,
            {"num_beams": 1, "max_new_tokens": 100},
        ),
    )
}
