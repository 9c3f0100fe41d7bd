"""`/v1/tasks/{prefix}`: a task's own fields in, its output out.

The linearization and the text around it come from the artifact, so that a caller need not know them; decoding is the
task's, greedy where the task's own is a beam search.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat
from prefixtune.server.api.endpoint import Call
from prefixtune.server.api.generation import (
    Generation,
    Written,
    collect,
    in_turn,
    read_json,
    start_generation,
    stream,
    stream_outputs,
    usage,
)
from prefixtune.server.api.prompting import encode_source, with_customs
from prefixtune.server.api.protocol import parse_task
from prefixtune.server.models.catalog import Served
from prefixtune.server.models.task_schema import task_schema_of
from prefixtune.server.responses import ALIVE, DONE, bad_request, event, reply

__all__ = ["describe_task", "do_task"]


async def describe_task(call: Call) -> ASGIApp:
    """`GET /v1/tasks/{prefix}`: what it takes."""
    call.services.catalog.check(call.name, call.caller)
    return reply(call.services.catalog.describe_task(call.name))


async def do_task(call: Call) -> ASGIApp:
    """`POST /v1/tasks/{prefix}`."""
    services, name = call.services, call.name
    body = await read_json(call)
    served = await services.catalog.open(name, call.caller)
    served = _in_the_format_of(call, served, body.get("format_of"))
    form = task_schema_of(served.header)
    ask = parse_task(body, services.limits, form.columns if form else ())
    source = ask.source
    if source is None:
        if form is None:
            raise bad_request("this model takes no fields.", "source", hint="give 'source'.")
        try:
            source = await in_turn(call, partial(form.source, ask.fields))
        except DataError as error:
            raise bad_request(error.message, hint=error.hint) from None
    text_format = services.catalog.text_format(served.header)
    ask, length = await with_customs(call, ask, served)
    most = ask.sampling.max_new_tokens if ask.says_length else length
    prompt = await encode_source(call, served, text_format, source, most)
    if services.config.log_prompts:
        call.facts["source"] = source
    job = start_generation(call, ask, served, [prompt], length, verbatim=False)
    head = {"id": f"task-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if ask.stream:
        return stream(call, _events(call, job, text_format, source, head))
    ((written,),) = await collect(call, job)
    return reply(_whole(call, job, text_format, source, head, written), headers=call.headers)


def _in_the_format_of(call: Call, served: Served, prefix: Any) -> Served:
    """The bare backbone with a prefix's header: the same text without the prefix, to compare with."""
    if prefix in (None, ""):
        return served
    if served.prefix is not None or not isinstance(prefix, str):
        raise bad_request("'format_of' names a prefix, and goes with the bare backbone only.", "format_of")
    call.services.catalog.check(prefix, call.caller)
    return Served(served.name, None, call.services.catalog.header(prefix))


async def _events(
    call: Call, job: Generation, text_format: TextFormat, source: str, head: dict[str, Any]
) -> AsyncGenerator[str]:
    # Words around the target can be taken off the whole output only.
    in_pieces = not any(text_format.target_words)
    written = Written()
    async for output in stream_outputs(call, job):
        if output is None:
            yield ALIVE
            continue
        written.add(output)
        if in_pieces and output.text:
            yield event({**head, "object": "task.output.chunk", "delta": output.text})
    yield event(_whole(call, job, text_format, source, head, written))
    yield DONE


def _whole(
    call: Call, job: Generation, text_format: TextFormat, source: str, head: dict[str, Any], written: Written
) -> dict[str, Any]:
    output = text_format.extract_target(written.text)
    if call.services.config.log_prompts:
        call.facts["outputs"] = [output]
    return {
        **head,
        "object": "task.output",
        "source": source,
        "output": output,
        "finish_reason": written.finished,
        "usage": usage(job),
    }
