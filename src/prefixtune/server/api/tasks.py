"""`/v1/tasks/{prefix}`: the fields of a prefix's own task -> its output.

The linearization and the text format come from the prefix's file, so a caller need not know them. Decoding is the
task's, but greedy where the task's own is a beam search.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ConfigDict, Field

from prefixtune.data.encoding import default_format
from prefixtune.engine.request import SequenceOutput, join_outputs
from prefixtune.prefix.text_format import read_text_format
from prefixtune.server.api.endpoint import GenerationContext, key_router
from prefixtune.server.api.generation import DONE, KEEP_ALIVE, event, event_stream, start_texts
from prefixtune.server.api.protocol import GenerationRequest
from prefixtune.server.responses import JsonAnswer, bad_request
from prefixtune.server.task_schema import task_decoding, task_schema_of

_PATH = "/v1/tasks/{name:path}"
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
    header = await run_in_threadpool(context.state.catalog.load_header, name, context.caller)
    schema = task_schema_of(header)
    return {
        "id": name,
        "task": header.get("task"),
        "fields": schema.describe() if schema else [],
        "max_tokens": task_decoding(header).get("max_new_tokens"),
    }


@router.post(_PATH, name="do_task")
async def create_task_output(name: str, request: TaskRequest, context: GenerationContext) -> Response:
    """The output of a prefix's task.

    Or of joined prefixes, as in `/v1/tasks/manual+style`.
    """
    state = context.state
    request.check(state.config)
    context.admit(1)
    model = await run_in_threadpool(state.catalog.load, name, context.caller)
    if request.format_of:
        # The same text without the prefix, to compare with.
        if model.prefix is not None:
            raise bad_request("'format_of' names a prefix, and goes with the bare backbone only.", "format_of")
        header = await run_in_threadpool(state.catalog.load_header, request.format_of, context.caller)
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
