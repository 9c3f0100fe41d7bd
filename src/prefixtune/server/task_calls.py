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
from prefixtune.server.asks import parse_task
from prefixtune.server.catalog import Served
from prefixtune.server.endpoint import Call
from prefixtune.server.forms import form_of
from prefixtune.server.jobs import Job
from prefixtune.server.prompting import encode_source, with_customs
from prefixtune.server.replies import ALIVE, DONE, event, reply, wrong
from prefixtune.server.writing import Written, begin, collect, follow, in_turn, read_json, stream, usage
from prefixtune.text_format import TextFormat

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
    form = form_of(served.header)
    ask = parse_task(body, services.limits, form.columns if form else ())
    source = ask.source
    if source is None:
        if form is None:
            raise wrong("this model takes no fields.", "source", hint="give 'source'.")
        try:
            source = await in_turn(call, partial(form.source, ask.fields))
        except DataError as error:
            raise wrong(error.message, hint=error.hint) from None
    text_format = services.catalog.text_format(served.header)
    ask, length = await with_customs(call, ask, served)
    most = ask.sampling.max_new_tokens if ask.says_length else length
    prompt = await encode_source(call, served, text_format, source, most)
    if services.config.log_prompts:
        call.facts["source"] = source
    job = begin(call, ask, served, [prompt], length, verbatim=False)
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
        raise wrong("'format_of' names a prefix, and goes with the bare backbone only.", "format_of")
    call.services.catalog.check(prefix, call.caller)
    return Served(served.name, None, call.services.catalog.header(prefix))


async def _events(
    call: Call, job: Job, text_format: TextFormat, source: str, head: dict[str, Any]
) -> AsyncGenerator[str]:
    # Words around the target can be taken off the whole output only.
    in_pieces = not any(text_format.target_words)
    written = Written()
    async for heard in follow(call, job):
        if heard is None:
            yield ALIVE
            continue
        written.add(heard.output)
        if in_pieces and heard.output.text:
            yield event({**head, "object": "task.output.chunk", "delta": heard.output.text})
    yield event(_whole(call, job, text_format, source, head, written))
    yield DONE


def _whole(
    call: Call, job: Job, text_format: TextFormat, source: str, head: dict[str, Any], written: Written
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
