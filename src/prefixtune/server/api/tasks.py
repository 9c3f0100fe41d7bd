"""`/v1/tasks/{prefix}`: the fields of a prefix's own task -> its output.

The linearization and the text format come from the prefix's file, so a caller need not know them. Decoding is the
task's, but greedy where the task's own is a beam search.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import Response

from prefixtune.engine.request import SequenceOutput, join_outputs
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat
from prefixtune.server.api.body import parse_in_turn, read_json
from prefixtune.server.api.endpoint import GenerationContext, KeyContext, RequestContext
from prefixtune.server.api.generation import Generation, collect_outputs, stream_outputs
from prefixtune.server.api.openapi import NAME, api_router, errors, json_body, whole_or_stream
from prefixtune.server.api.prompting import run_in_turn, start_targets
from prefixtune.server.api.schemas import Task, TaskOutput, TaskOutputChunk
from prefixtune.server.api.streaming import DONE, KEEP_ALIVE, event, event_stream
from prefixtune.server.api.task_protocol import TaskRequest, parse_task
from prefixtune.server.models.catalog import ServedModel
from prefixtune.server.models.task_schema import TaskSchema, task_schema_of
from prefixtune.server.responses import bad_request, json_response

__all__ = ["router"]


_PATH = "/v1/tasks/{name:path}"
router = api_router(401, 403, 404, 429, 500, 503)


@router.get(_PATH, name="show_task", response_model=Task, responses=errors(400), openapi_extra=NAME)
async def describe_task(context: KeyContext) -> Response:
    """The fields of a prefix's task.

    Or of joined prefixes, as in `/v1/tasks/manual+style`.
    """
    catalog = context.state.catalog
    if len(catalog.parts(context.name)) > 1:
        context.count()
    header = await catalog.load_header(context.name, context.caller, tenant=context.tenant)
    return json_response(catalog.describe_task(context.name, header))


@router.post(
    _PATH,
    name="do_task",
    responses=whole_or_stream(TaskOutput, TaskOutputChunk, TaskOutput) | errors(400, 408, 413, 415, 504),
    openapi_extra={**NAME, **json_body(TaskRequest, source="a source", max_tokens=50)},
)
async def create_task_output(context: GenerationContext) -> Response:
    """The output of a prefix's task.

    Or of joined prefixes, as in `/v1/tasks/manual+style`.
    """
    state = context.state
    body = await read_json(context, dict)
    context.prepare(1)
    model = await state.catalog.load(context.name, context.caller, tenant=context.tenant)
    model = await _with_format_of(context, model, body.get("format_of"))
    schema = task_schema_of(model.header)
    parse = partial(parse_task, body, state.limits, schema.columns if schema else ())
    # A body with a great many fields must not block streams.
    request = parse() if len(body) < 100 else await parse_in_turn(context, parse)
    source = await _source(context, request, schema)
    text_format = state.catalog.text_format(model.header)
    generation = await start_targets(context, request, model, text_format, [source])
    if state.config.log_prompts:
        context.log_fields["source"] = source
    head = {"id": f"task-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    if request.stream:
        return event_stream(context, _events(context, generation, text_format, source, head))
    (output,) = await collect_outputs(context, generation)
    return json_response(_task_output(context, generation, text_format, source, head, output), headers=context.headers)


async def _with_format_of(context: RequestContext, model: ServedModel, prefix_name: Any) -> ServedModel:
    """The bare backbone with a prefix's header: the same text without the prefix, to compare with."""
    if prefix_name in (None, "") or not isinstance(prefix_name, str):
        # What is no name is refused with the other fields.
        return model
    if model.prefix is not None:
        raise bad_request("'format_of' names a prefix, and goes with the bare backbone only.", "format_of")
    header = await context.state.catalog.load_header(prefix_name, context.caller, tenant=context.tenant)
    return ServedModel(model.name, None, header)


async def _source(context: RequestContext, request: TaskRequest, schema: TaskSchema | None) -> str:
    """The source: as it is, or linearized from the task's fields."""
    if request.source is not None:
        return request.source
    if schema is None:
        raise bad_request("this model takes no fields.", "source", hint="give 'source'.")
    try:
        return await run_in_turn(context, partial(schema.source, request.record))
    except DataError as error:
        raise bad_request(error.message, hint=error.hint) from None


async def _events(
    context: RequestContext, generation: Generation, text_format: TextFormat, source: str, head: dict[str, Any]
) -> AsyncGenerator[bytes]:
    # Words around the target can only be removed from the whole output.
    in_pieces = not any(text_format.target_words)
    outputs: list[SequenceOutput] = []
    async for output in stream_outputs(context, generation):
        if output is None:
            yield KEEP_ALIVE
            continue
        outputs.append(output)
        if in_pieces and output.text:
            yield event({**head, "object": "task.output.chunk", "delta": output.text})
    yield event(_task_output(context, generation, text_format, source, head, join_outputs(outputs)))
    yield DONE


def _task_output(
    context: RequestContext,
    generation: Generation,
    text_format: TextFormat,
    source: str,
    head: dict[str, Any],
    output: SequenceOutput,
) -> dict[str, Any]:
    target = text_format.extract_target(output.text)
    if context.state.config.log_prompts:
        context.log_fields["outputs"] = [target]
    return {
        **head,
        "object": "task.output",
        "source": source,
        "output": target,
        "finish_reason": output.finish_reason,
        "usage": generation.usage(),
    }
