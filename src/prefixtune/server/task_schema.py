"""The fields of a prefix's task: how they become its source, and what a page needs to show a form.

The header of a prefix's file names its task and, for a user's own records, the template of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prefixtune.data import TASKS, toy
from prefixtune.data.benchmarks import ATTRIBUTES, check_triples, linearize_dart, linearize_e2e, linearize_webnlg
from prefixtune.data.files import join_lines, one_line
from prefixtune.data.forms import check_template, render
from prefixtune.errors import ConfigError, DataError

_WHERE = "the request"
_SUMMARIZATION_TASKS = ("summarization", "scitldr")

FieldKind = Literal["line", "text", "attributes", "triples"]
"""How a page asks for a field: one line, a longer text, a meaning representation, or triples."""


@dataclass(frozen=True)
class TaskField:
    """One field of a task.

    Attributes:
        name: As in the request.
        kind: How a page asks for it.
        example: A valid value, to start from.
        parts: The attributes of `attributes`.
    """

    name: str
    kind: FieldKind
    example: Any = ""
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSchema:
    """The input of a task.

    Attributes:
        task: Its name.
        fields: All are required.
        linearize: A record -> the source.
    """

    task: str
    fields: tuple[TaskField, ...]
    linearize: Callable[[Mapping[str, Any]], str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields' names."""
        return tuple(field.name for field in self.fields)

    def source(self, record: Mapping[str, Any]) -> str:
        """The source of a record.

        Raises:
            DataError: A field is missing or wrong.
        """
        missing = [name for name in self.columns if name not in record]
        if missing:
            raise DataError(
                f"{_WHERE} lacks {', '.join(map(repr, missing))}.",
                hint=f"the task {self.task!r} needs all of its fields.",
            )
        return self.linearize(record)

    def describe(self) -> list[dict[str, Any]]:
        """The fields, as JSON."""
        return [asdict(field) for field in self.fields]


def task_schema_of(header: Mapping[str, Any]) -> TaskSchema | None:
    """The fields of the task in a prefix's header; None: it takes a source only."""
    task, stored = header.get("task"), header.get("text_format")
    template = stored.get("source") if isinstance(stored, Mapping) else None
    if not isinstance(task, str) or not isinstance(template, str | None):
        return None
    if task in _TASK_SCHEMAS:
        return _TASK_SCHEMAS[task]
    if task in _SUMMARIZATION_TASKS:
        return _template_schema(task, template or "document")
    return _template_schema(task, template) if task == "records" and template else None


def task_decoding(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """The default decoding settings of a header's task; empty if it names none."""
    task = header.get("task")
    return TASKS[task].decoding if isinstance(task, str) and task in TASKS else {}


def _template_schema(task: str, template: str) -> TaskSchema | None:
    """The fields of a user's own records. The template is filled in by name; nothing in it is executed."""
    try:
        columns = tuple(dict.fromkeys(check_template(template)))
    except ConfigError:
        return None
    # A column that is the whole source may be long; several columns are a few words each.
    kind: FieldKind = "text" if len(columns) == 1 else "line"

    def linearize(record: Mapping[str, Any]) -> str:
        text = render(template, record, _WHERE)
        return join_lines(text) if task in _SUMMARIZATION_TASKS else text

    return TaskSchema(task, tuple(TaskField(name, kind) for name in columns), linearize)


def _triples(linearize: Callable[[Any], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda record: linearize(check_triples(record["triples"], "triples", _WHERE))


_EXAMPLE = "name[The Vaults], eatType[pub], priceRange[cheap], area[riverside]"
_TRIPLES = TaskField(
    "triples", "triples", [["Aarhus", "country", "Denmark"], ["Aarhus", "leaderName", "Jacob_Bundsgaard"]]
)
_TOY = {"train": "Heron", "to": "Westport", "time": "19:30", "platform": "C", "fare": "8", "sky": "fog"}
_TASK_SCHEMAS = {
    schema.task: schema
    for schema in (
        TaskSchema(
            "e2e",
            (TaskField("mr", "attributes", _EXAMPLE, tuple(ATTRIBUTES)),),
            lambda record: linearize_e2e(one_line(record["mr"], "mr", _WHERE)),
        ),
        TaskSchema("webnlg", (_TRIPLES,), _triples(linearize_webnlg)),
        TaskSchema("dart", (_TRIPLES,), _triples(linearize_dart)),
        TaskSchema(
            "toy",
            tuple(TaskField(name, "line", value) for name, value in _TOY.items()),
            lambda record: toy.linearize({name: one_line(record[name], name, _WHERE) for name in _TOY}),
        ),
    )
}
