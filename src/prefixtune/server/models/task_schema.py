"""A task's own fields -> the source that a prefix was trained on, and what a page needs to ask for them.

What a prefix reads is told by its header: the task, and the template of one's own records. Knows nothing of tokenizers
and of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefixtune.data import TASKS
from prefixtune.data.files import join_lines, one_line
from prefixtune.data.tasks import dart, e2e, webnlg
from prefixtune.data.tasks.records import check_template, render
from prefixtune.data.tasks.triples import check_triples
from prefixtune.data.toy import table_to_text as toy
from prefixtune.errors import ConfigError, DataError

__all__ = ["Field", "TaskSchema", "decoding_of", "task_schema_of"]


_WHERE = "the request"
_DOCUMENTS = ("summarization", "xsum", "scitldr")


@dataclass(frozen=True)
class Field:
    """One field of a task.

    Attributes:
        name: As in the request.
        kind: `line` or `text` (a longer one), `attributes` (a meaning representation), or `triples`.
        example: A value that fits, to start from.
        parts: The attributes of `attributes`.
    """

    name: str
    kind: str
    example: Any = ""
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSchema:
    """What a task takes.

    Attributes:
        task: Its name.
        fields: All needed.
        linearize: A record -> the source.
    """

    task: str
    fields: tuple[Field, ...]
    linearize: Callable[[Mapping[str, Any]], str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields' names."""
        return tuple(each.name for each in self.fields)

    def source(self, record: Mapping[str, Any]) -> str:
        """The source of a record.

        Raises:
            DataError: A field is missing or wrong.
        """
        absent = [name for name in self.columns if name not in record]
        if absent:
            raise DataError(
                f"{_WHERE} lacks {', '.join(map(repr, absent))}.", hint=f"task {self.task!r} takes all of its fields."
            )
        return self.linearize(record)

    def describe(self) -> list[dict[str, Any]]:
        """The fields, as JSON."""
        return [asdict(each) for each in self.fields]


def task_schema_of(header: Mapping[str, Any]) -> TaskSchema | None:
    """The form of the task that a prefix's header tells of; None: it takes a source only."""
    task, stored = header.get("task"), header.get("text_format")
    template = stored.get("source") if isinstance(stored, Mapping) else None
    if not isinstance(task, str) or not isinstance(template, str | None):
        return None
    if task in _MADE:
        return _MADE[task]
    if task in _DOCUMENTS:
        return _of_template(task, template or "document")
    return _of_template(task, template) if task == "records" and template else None


def decoding_of(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoding settings that are customary for a header's task; empty where it names none."""
    task = header.get("task")
    return TASKS[task].decoding if isinstance(task, str) and task in TASKS else {}


def _of_template(task: str, template: str) -> TaskSchema | None:
    """The form of a table with columns of one's own. The template is filled in by name; nothing in it is run."""
    try:
        columns = tuple(dict.fromkeys(check_template(template)))
    except ConfigError:
        return None
    # What is the whole source may be long; the columns of a template are a few words each.
    kind = "text" if len(columns) == 1 else "line"

    def linearize(record: Mapping[str, Any]) -> str:
        text = render(template, record, _WHERE)
        return join_lines(text) if task in _DOCUMENTS else text

    return TaskSchema(task, tuple(Field(name, kind) for name in columns), linearize)


def _meaning(record: Mapping[str, Any]) -> str:
    return e2e.linearize(one_line(record["mr"], "mr", _WHERE))


def _triples(linearize: Callable[[Any], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda record: linearize(check_triples(record["triples"], "triples", _WHERE))


def _table(columns: Sequence[str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda record: toy.linearize({name: one_line(record[name], name, _WHERE) for name in columns})


_TRIPLES = [["Aarhus", "country", "Denmark"], ["Aarhus", "leaderName", "Jacob_Bundsgaard"]]
_BOARD = {"train": "Heron", "to": "Westport", "time": "19:30", "platform": "C", "fare": "8", "sky": "fog"}

_MADE = {
    form.task: form
    for form in (
        TaskSchema(
            "e2e",
            (
                Field(
                    "mr",
                    "attributes",
                    "name[The Vaults], eatType[pub], priceRange[cheap], area[riverside]",
                    tuple(e2e.ATTRIBUTES),
                ),
            ),
            _meaning,
        ),
        TaskSchema("webnlg", (Field("triples", "triples", _TRIPLES),), _triples(webnlg.linearize)),
        TaskSchema("dart", (Field("triples", "triples", _TRIPLES),), _triples(dart.linearize)),
        TaskSchema("toy", tuple(Field(name, "line", value) for name, value in _BOARD.items()), _table(tuple(_BOARD))),
    )
}
