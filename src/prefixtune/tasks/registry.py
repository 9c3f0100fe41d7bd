"""The tasks by name: how each is read, and how its outputs are decoded unless told otherwise.

Knows nothing of how a model decodes; the settings are handed on by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.tasks.classification import read_classification
from prefixtune.tasks.e2e import read_e2e
from prefixtune.tasks.examples import Example
from prefixtune.tasks.records import read_records
from prefixtune.tasks.tagging import read_tagging
from prefixtune.tasks.toy import make_toy
from prefixtune.tasks.toy_labels import make_toy_labels
from prefixtune.tasks.toy_tags import make_toy_tags

__all__ = ["TASKS", "Task", "read_task"]

_PARTS = ("train", "held_out")


@dataclass(frozen=True)
class Task:
    """One kind of data.

    Attributes:
        name: As written in a configuration.
        description: One line for people.
        read: (path, source template, target template) -> examples.
        decoding: Decoding settings, by name; copy it before changing it.
        kind: What a target is: a text (generation), one label (classification), or a tag for each token, with a space
            between (tagging). It decides how outputs are scored.
        parts: Of a set that is made here: the names that stand in for a file's path, the training part first.
    """

    name: str
    description: str
    read: Callable[[Path, str | None, str | None], list[Example]]
    decoding: dict[str, Any]
    kind: Literal["generation", "classification", "tagging"] = "generation"
    parts: tuple[str, ...] = ()


def read_task(task: str, path: Path | str, *, source: str | None = None, target: str | None = None) -> list[Example]:
    """Read the examples of a task.

    >>> len(read_task("toy", "train")), len(read_task("toy", "held_out"))
    (320, 40)

    Args:
        task: A name of `TASKS`.
        path: The file; `train` or `held_out` for the sets made here (`toy`, `toy_labels`, `toy_tags`).
        source: Template of the source, for `records`, which needs it, and `classification`; a column's name for
            `tagging`.
        target: Likewise of the target.

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
                hint=f"leave {name} out, or use a task that reads your own columns, such as 'records'.",
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


def _made(
    name: str, make: Callable[[], tuple[list[Example], list[Example]]]
) -> Callable[[Path, str | None, str | None], list[Example]]:
    """The reader of a set that is made here."""

    def read(path: Path, source: str | None, target: str | None) -> list[Example]:
        _no_templates(name, source, target)
        part = str(path)
        if part not in _PARTS:
            raise ConfigError(
                f"task {name!r} is made, not read: its path is one of {', '.join(_PARTS)}; got {part!r}.",
                hint=did_you_mean(part, _PARTS),
            )
        return make()[_PARTS.index(part)]

    return read


# Where labels and tags are generated as text: greedily, and on one line.
_LABEL: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 16, "ban_newlines": True}
_TAGS: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 200, "ban_newlines": True}

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
            _made("toy", make_toy),
            {"num_beams": 1, "max_new_tokens": 100},
            parts=_PARTS,
        ),
        Task(
            "classification",
            "a text and its label: JSON lines, JSON, CSV or TSV, columns text and label unless named",
            read_classification,
            _LABEL,
            "classification",
        ),
        Task(
            "toy_labels",
            "messages to a night-train office and their departments, made here",
            _made("toy_labels", make_toy_labels),
            _LABEL,
            "classification",
            parts=_PARTS,
        ),
        Task(
            "tagging",
            "tokens and their BIO tags: JSON lines, JSON, or CoNLL files of one token a line",
            read_tagging,
            _TAGS,
            "tagging",
        ),
        Task(
            "toy_tags",
            "messages to a night-train office with trains, stations, times and coaches, made here",
            _made("toy_tags", make_toy_tags),
            _TAGS,
            "tagging",
            parts=_PARTS,
        ),
    )
}
