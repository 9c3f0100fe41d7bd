"""`/v1/tasks/{prefix}`: the fields of a prefix's own task -> its output.

The fields of a prefix's task: how they become its source, and what a page needs to show a form. They and the text
format come from the prefix's file, whose header names its task and, for a user's own records, the template of the
source; so a caller need not know them. Decoding is the
task's, but greedy where the task's own is a beam search.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from fastapi import Response
from pydantic import ConfigDict, Field

from prefixtune.data import toy
from prefixtune.data.benchmarks import ATTRIBUTES, check_triples, linearize_dart, linearize_e2e, linearize_webnlg
from prefixtune.data.encoding import default_format
from prefixtune.data.files import join_lines, one_line
from prefixtune.data.forms import check_template, render
from prefixtune.data.registry import default_decoding
from prefixtune.engine.request import SequenceOutput, join_outputs
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.text_format import read_text_format
from prefixtune.server.api.endpoint import GenerationContext, key_router
from prefixtune.server.api.generation import DONE, KEEP_ALIVE, event, event_stream, start_texts
from prefixtune.server.api.protocol import GenerationRequest
from prefixtune.server.responses import JsonAnswer, bad_request

_PATH = "/v1/tasks/{name:path}"
_WHERE = "the request"
_SUMMARIZATION_TASKS = ("summarization", "scitldr")
router = key_router()


class TaskRequest(GenerationRequest):
    """A body of `/v1/tasks/{name}`: options, and beside them the task's own fields, which GET lists."""

    model_config = ConfigDict(extra="allow")

    # Greedy unless the request says otherwise, as in the task's evaluation.
    temperature: float = Field(0.0, ge=0, le=2, description="0: the likeliest token each time.")
    source: str | None = Field(None, description="A text that is already linearized; instead of the task's own fields.")
    fields: dict[str, Any] | None = Field(
        None,
        description="The task's own fields, if one has the name of an option; else they may be beside the options.",
    )
    format_of: str | None = Field(
        None, description="With the bare backbone: the prefix whose text format and fields are used."
    )

    @property
    def record(self) -> Mapping[str, Any]:
        """The task's own fields; empty if there is a `source`."""
        return self.model_extra or {} if self.fields is None else self.fields

    def check_record(self, columns: Sequence[str]) -> None:
        """Refuse names that are not those of a task's own fields.

        Raises:
            ApiError: 400.
        """
        outside = self.model_extra or {}
        if self.fields is not None and outside:
            name = next(iter(outside))
            raise bad_request(f"{name!r} is outside 'fields', but all of the task's fields must be inside.", name)
        if unknown := [name for name in self.record if name not in columns]:
            raise bad_request(f"{unknown[0]}: unknown field.", unknown[0], "unknown_field")
        if self.source is not None and self.record:
            raise bad_request("give either 'source' or the task's fields, not both.", "source")
        if self.source is None and not self.record:
            hint = f"give {', '.join(map(repr, columns))}, or 'source'." if columns else "give 'source'."
            name = columns[0] if columns else "source"
            raise bad_request("the request has none of the task's fields.", name, hint=hint)


@router.get(_PATH, name="show_task")
async def describe_task(name: str, context: GenerationContext) -> dict[str, Any]:
    """The fields of a prefix's task.

    Or of joined prefixes, as in `/v1/tasks/manual+style`.
    """
    header = await context.state.run_loading(context.state.catalog.load_header, name, context.caller)
    schema = task_schema_of(header)
    return {
        "id": name,
        "task": header.get("task"),
        "fields": schema.fields if schema else [],
        "max_tokens": default_decoding(header.get("task"), [header]).get("max_new_tokens"),
    }


@router.post(_PATH, name="do_task")
async def create_task_output(name: str, request: TaskRequest, context: GenerationContext) -> Response:
    """The output of a prefix's task.

    Or of joined prefixes, as in `/v1/tasks/manual+style`.
    """
    state = context.state
    request.check(state.config)
    context.admit(1)
    model = await state.run_loading(state.catalog.load, name, context.caller)
    if request.format_of:
        # The same text without the prefix, to compare with.
        if model.prefix is not None:
            raise bad_request("'format_of' names a prefix, and goes with the bare backbone only.", "format_of")
        header = await state.run_loading(state.catalog.load_header, request.format_of, context.caller)
        model = replace(model, header=header)
    schema = task_schema_of(model.header)
    request.check_record(schema.columns if schema else ())
    source = request.source
    if source is None:
        assert schema is not None, "`check_record` refuses this"
        source = await context.tokenize(partial(schema.source, request.record))
    text_format = read_text_format(model.header) or default_format(state.backbone)
    generation = await start_texts(context, request, model, text_format, [source])
    head = {"id": f"task-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}

    def whole(output: SequenceOutput) -> dict[str, Any]:
        target, reason = text_format.extract_target(output.text), output.finish_reason
        more = {"source": source, "output": target, "finish_reason": reason, "usage": generation.usage()}
        return {**head, "object": "task.output", **more}

    if not request.stream:
        return JsonAnswer(whole(*await generation.collect()), headers=context.headers)

    async def events() -> AsyncGenerator[bytes]:
        # Words around the target can only be removed from the whole output.
        in_pieces, outputs = not any(text_format.target_words), list[SequenceOutput]()
        async for one in generation.outputs():
            if one is None:
                yield KEEP_ALIVE
                continue
            outputs.append(one[1])
            if in_pieces and one[1].text:
                yield event({**head, "object": "task.output.chunk", "delta": one[1].text})
        yield event(whole(join_outputs(outputs)))
        yield DONE

    return event_stream(context, events())


# --- the fields of a task ---------------------------------------------------------------------------------------------

FieldKind = Literal["line", "text", "attributes", "triples"]
"""How a page asks for a field: one line, a longer text, a meaning representation, or triples."""


def _field(name: str, kind: FieldKind, example: Any = "", parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """A field, as JSON: its name in the request, a valid value to start from, and the attributes of `attributes`."""
    return {"name": name, "kind": kind, "example": example, "parts": parts}


@dataclass(frozen=True)
class TaskSchema:
    """The input of a task.

    Attributes:
        task: Its name.
        fields: All are required.
        linearize: A record -> the source.
    """

    task: str
    fields: tuple[dict[str, Any], ...]
    linearize: Callable[[Mapping[str, Any]], str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields' names."""
        return tuple(field["name"] for field in self.fields)

    def source(self, record: Mapping[str, Any]) -> str:
        """The source of a record.

        Raises:
            DataError: A field is missing or wrong.
        """
        missing = [name for name in self.columns if name not in record]
        if missing:
            what = f"{_WHERE} lacks {', '.join(map(repr, missing))}."
            raise DataError(what, hint=f"the task {self.task!r} needs all of its fields.")
        return self.linearize(record)


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

    return TaskSchema(task, tuple(_field(name, kind) for name in columns), linearize)


def _triples(linearize: Callable[[Any], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda record: linearize(check_triples(record["triples"], "triples", _WHERE))


_EXAMPLE = "name[The Vaults], eatType[pub], priceRange[cheap], area[riverside]"
_TRIPLES = _field(
    "triples", "triples", [["Aarhus", "country", "Denmark"], ["Aarhus", "leaderName", "Jacob_Bundsgaard"]]
)
_TOY = {"train": "Heron", "to": "Westport", "time": "19:30", "platform": "C", "fare": "8", "sky": "fog"}
_TASK_SCHEMAS = {
    schema.task: schema
    for schema in (
        TaskSchema(
            "e2e",
            (_field("mr", "attributes", _EXAMPLE, tuple(ATTRIBUTES)),),
            lambda record: linearize_e2e(one_line(record["mr"], "mr", _WHERE)),
        ),
        TaskSchema("webnlg", (_TRIPLES,), _triples(linearize_webnlg)),
        TaskSchema("dart", (_TRIPLES,), _triples(linearize_dart)),
        TaskSchema(
            "toy",
            tuple(_field(name, "line", value) for name, value in _TOY.items()),
            lambda record: toy.linearize({name: one_line(record[name], name, _WHERE) for name in _TOY}),
        ),
    )
}
