"""OpenAI's `/v1/completions` and `/v1/chat/completions`, whole and as streams.

With a prefix, a prompt or a chat's last message is a source: it is put into the text format that the prefix was trained
with, and the response is the target alone. Otherwise (the bare backbone, token ids, `raw_completions`, a prefix whose
file has no format) a prompt goes to the model as it is, and a chat in the backbone's own template; the response is what
the model generated, white space around it included.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.types import ASGIApp

from prefixtune.prefix.target_stream import TargetStream
from prefixtune.prefix.text_format import TextFormat
from prefixtune.server.api.body import read_json
from prefixtune.server.api.choices import ChatChoices, CompletionChoices
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.generation import Generation, collect_outputs, start_generation, stream_outputs
from prefixtune.server.api.prompting import chat_source, encode_chat, encode_source, encode_text, with_task_defaults
from prefixtune.server.api.protocol import GenerationRequest, parse_chat, parse_completion
from prefixtune.server.api.streaming import DONE, KEEP_ALIVE, event, event_stream
from prefixtune.server.models.catalog import ServedModel
from prefixtune.server.responses import json_response

__all__ = ["create_chat_completion", "create_completion"]


Choices = CompletionChoices | ChatChoices


async def create_completion(context: RequestContext) -> ASGIApp:
    """`POST /v1/completions`."""
    state = context.state
    request = parse_completion(await read_json(context), state.limits)
    model = await state.catalog.load(request.model, context.caller)
    if state.config.log_prompts:
        context.log_fields["prompts"] = request.prompts
    texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
    raw = state.config.raw_completions or not texts
    text_format = None if raw else state.catalog.trained_format(model.header)
    choices = CompletionChoices(state.backbone, text_format)
    if text_format is not None:
        return await _respond_to_sources(context, request, model, text_format, texts, choices)
    prompts = [await encode_text(context, prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
    generation = start_generation(context, request, model, prompts, state.config.default_max_tokens, verbatim=True)
    return await _respond(context, request, generation, choices)


async def create_chat_completion(context: RequestContext) -> ASGIApp:
    """`POST /v1/chat/completions`."""
    state = context.state
    request = parse_chat(await read_json(context), state.limits)
    model = await state.catalog.load(request.model, context.caller)
    if state.config.log_prompts:
        context.log_fields["messages"] = request.messages
    text_format = state.catalog.trained_format(model.header)
    choices = ChatChoices(state.backbone)
    if text_format is not None:
        source = chat_source(context, request.messages)
        return await _respond_to_sources(context, request, model, text_format, [source], choices)
    prompt = await encode_chat(context, request.messages)
    generation = start_generation(context, request, model, [prompt], state.config.default_max_tokens, verbatim=True)
    return await _respond(context, request, generation, choices)


async def _respond_to_sources(
    context: RequestContext,
    request: GenerationRequest,
    model: ServedModel,
    text_format: TextFormat,
    sources: Sequence[str],
    choices: Choices,
) -> ASGIApp:
    """Generate the targets of sources, as `/v1/tasks` does."""
    request, task_length = await with_task_defaults(context, request, model)
    length = request.sampling.max_new_tokens if request.has_max_tokens else task_length
    prompts = [await encode_source(context, model, text_format, source, length) for source in sources]
    generation = start_generation(context, request, model, prompts, task_length, verbatim=False)
    return await _respond(context, request, generation, choices, text_format)


async def _respond(
    context: RequestContext,
    request: GenerationRequest,
    generation: Generation,
    choices: Choices,
    text_format: TextFormat | None = None,
) -> ASGIApp:
    head = {
        "id": f"{choices.id_prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": generation.model,
        "object": choices.chunk_object if request.stream else choices.whole_object,
    }
    if request.stream:
        return event_stream(context, _events(context, request, generation, choices, head, text_format))
    outputs = await collect_outputs(context, generation)
    targets = [output.text if text_format is None else text_format.extract_target(output.text) for output in outputs]
    if context.state.config.log_prompts:
        context.log_fields["outputs"] = targets

    def respond() -> ASGIApp:
        pairs = enumerate(zip(outputs, targets, strict=True))
        whole = [choices.whole(index, output, target) for index, (output, target) in pairs]
        return json_response({**head, "choices": whole, "usage": generation.usage()}, headers=context.headers)

    # Decoding the likeliest tokens of thousands of positions takes seconds.
    return respond() if request.sampling.logprobs is None else await asyncio.to_thread(respond)


async def _events(
    context: RequestContext,
    request: GenerationRequest,
    generation: Generation,
    choices: Choices,
    head: dict[str, Any],
    text_format: TextFormat | None,
) -> AsyncGenerator[str]:
    indices = range(generation.num_texts)
    targets = None if text_format is None else [TargetStream(text_format) for _ in indices]
    # As OpenAI's, which has usage in the last event alone.
    no_usage = {"usage": None} if request.include_usage else {}
    for index in indices:
        for choice in choices.opening(index):
            yield event({**head, "choices": [choice], **no_usage})
    async for output in stream_outputs(context, generation):
        if output is None:
            yield KEEP_ALIVE
            continue
        index = generation.text_index(output)
        last = output.finish_reason is not None
        target = output.text if targets is None else targets[index].add(output.text, last=last)
        for choice in choices.pieces(index, output, target):
            yield event({**head, "choices": [choice], **no_usage})
    if request.include_usage:
        yield event({**head, "choices": [], "usage": generation.usage()})
    yield DONE
