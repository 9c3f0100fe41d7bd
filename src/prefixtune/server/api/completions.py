"""OpenAI's `/v1/completions` and `/v1/chat/completions`, whole and as streams.

With a prefix, a prompt or a chat's last message is a source: it is put into the text format that the prefix was trained
with, and the response is the target alone. Where that format has a chat template, all messages of a chat are written by
it, and a prompt is one user message. Otherwise (the bare backbone, token ids, `raw_completions`, a prefix whose
file has no format) a prompt goes to the model as it is, and a chat in the backbone's own template; the response is what
the model generated, white space around it included.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool

from prefixtune.engine.request import SequenceOutput
from prefixtune.prefix.target_stream import TargetStream
from prefixtune.prefix.text_format import TextFormat
from prefixtune.server.api.choices import ChatChoices, CompletionChoices
from prefixtune.server.api.endpoint import GenerationContext, RequestContext
from prefixtune.server.api.generation import Generation, collect_outputs, start_generation, stream_outputs
from prefixtune.server.api.openai_protocol import ChatRequest, CompletionRequest, OpenAIRequest
from prefixtune.server.api.prompting import (
    chat_source,
    compile_grammar,
    decode_prompts,
    encode_chat,
    encode_text,
    start_targets,
)
from prefixtune.server.api.streaming import DONE, KEEP_ALIVE, event, event_stream
from prefixtune.server.models.catalog import ServedModel
from prefixtune.server.responses import json_response

__all__ = ["router"]


Choices = CompletionChoices | ChatChoices
router = APIRouter()


@router.post("/v1/completions", name="complete")
async def create_completion(request: CompletionRequest, context: GenerationContext) -> Response:
    """Continue a prompt."""
    state = context.state
    model = await _load(context, request)
    if state.config.log_prompts:
        context.log_fields["prompts"] = request.prompts
    texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
    raw = state.config.raw_completions or not texts
    text_format = None if raw else state.catalog.trained_format(model.header)
    if text_format is not None:
        generation = await start_targets(context, request, model, text_format, texts, request.n, verbatim=request.echo)
    else:
        prompts = [one if not isinstance(one, str) else await encode_text(context, one) for one in request.prompts]
        generation = await _continue(context, request, model, prompts)
    if not request.echo:
        choices = CompletionChoices(state.backbone, text_format)
        return await _respond(context, request, generation, choices, text_format)
    # What the model read, and what it generated, both as they are.
    read = [one.prompt for one in generation.requests]
    prompt_texts = texts if raw and texts else await decode_prompts(context, read)
    return await _respond(
        context, request, generation, CompletionChoices(state.backbone, None, prompt_texts, request.n)
    )


@router.post("/v1/chat/completions", name="chat")
async def create_chat_completion(request: ChatRequest, context: GenerationContext) -> Response:
    """Answer a chat, in the prefix's text format or the backbone's chat template."""
    state, conversation = context.state, request.conversation
    model = await _load(context, request)
    if state.config.log_prompts:
        context.log_fields["messages"] = conversation
    text_format = state.catalog.trained_format(model.header)
    choices = ChatChoices(state.backbone)
    if text_format is not None:
        source = chat_source(context, conversation, text_format)
        generation = await start_targets(context, request, model, text_format, [source], request.n)
        return await _respond(context, request, generation, choices, text_format)
    prompt, ends = await encode_chat(context, conversation)
    return await _respond(context, request, await _continue(context, request, model, [prompt], ends), choices)


async def _load(context: RequestContext, request: OpenAIRequest) -> ServedModel:
    """The requested model, once the request is checked and counted."""
    request.check(context.state.limits)
    context.admit(request.num_prompts * request.n)
    return await run_in_threadpool(context.state.catalog.load, request.model, context.caller, request.prefixes)


async def _continue(
    context: RequestContext,
    request: OpenAIRequest,
    model: ServedModel,
    prompts: Sequence[tuple[int, ...]],
    ends: Sequence[int] = (),
) -> Generation:
    """Generate after prompts as they are; the `ends` end a text, besides the tokenizer's end token."""
    state = context.state
    default = state.config.default_max_tokens if request.length is None else None
    sampling = request.sampling(state.limits).replace(end_ids=tuple(ends))
    grammar = await compile_grammar(context, request)
    return start_generation(
        context, model, prompts, sampling, n=request.n, default_max_tokens=default, verbatim=True, grammar=grammar
    )


async def _respond(
    context: RequestContext,
    request: OpenAIRequest,
    generation: Generation,
    choices: Choices,
    text_format: TextFormat | None = None,
) -> Response:
    head = {
        "id": f"{choices.id_prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": generation.model.name,
        "object": choices.chunk_object if request.stream else choices.whole_object,
    }
    if request.stream:
        return event_stream(context, _events(context, request, generation, choices, head, text_format))
    outputs = await collect_outputs(context, generation)
    targets = [output.text if text_format is None else text_format.extract_target(output.text) for output in outputs]
    if context.state.config.log_prompts:
        context.log_fields["outputs"] = targets

    has_logprobs = request.num_logprobs is not None

    def respond() -> Response:
        pairs = enumerate(zip(outputs, targets, strict=True))
        whole = [choices.whole(index, output, target) for index, (output, target) in pairs]
        body = {**head, "choices": whole, "usage": generation.usage()}
        return json_response(body, headers=context.headers)

    # Decoding the likeliest tokens of thousands of positions takes seconds.
    return await run_in_threadpool(respond) if has_logprobs else respond()


async def _events(
    context: RequestContext,
    request: OpenAIRequest,
    generation: Generation,
    choices: Choices,
    head: dict[str, Any],
    text_format: TextFormat | None,
) -> AsyncGenerator[bytes]:
    indices = range(generation.num_texts)
    targets = None if text_format is None else [TargetStream(text_format) for _ in indices]
    logged = [""] * generation.num_texts if context.state.config.log_prompts else None
    if logged is not None:
        # As far as they get: the client may disconnect.
        context.log_fields["outputs"] = logged
    # As OpenAI's, which has usage in the last event alone.
    no_usage = {"usage": None} if request.include_usage else {}

    def write(index: int, output: SequenceOutput, target: str) -> list[bytes]:
        return [event({**head, "choices": [piece], **no_usage}) for piece in choices.pieces(index, output, target)]

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
        if logged is not None:
            logged[index] += target
        # Decoding a long prompt's likeliest tokens takes seconds.
        written = partial(write, index, output, target)
        for piece in await run_in_threadpool(written) if output.prompt_tokens else written():
            yield piece
    if request.include_usage:
        yield event({**head, "choices": [], "usage": generation.usage()})
    yield DONE
